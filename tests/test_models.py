"""The built-in models: shapes, sizes, and what their papers promise."""

from itertools import pairwise
from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from toolkit.errors import JobError
from toolkit.models.cnn import Cnn
from toolkit.models.gpt import Gpt
from toolkit.models.mlp import Mlp
from toolkit.models.resnet import Block, ResNet
from toolkit.models.vit import Vit


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def seeded(model: type[nn.Module], *args: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return model(*args, **options)


def tokens(*shape: int) -> Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 8, 8), (3, 9, 7)])
@pytest.mark.parametrize("norm", [True, False])
def test_cnn_gives_one_score_a_class(shape: tuple[int, int, int], norm: bool) -> None:
    assert seeded(Cnn, shape, 7, width=4, norm=norm)(torch.zeros(5, *shape)).shape == (5, 7)


def test_cnn_for_mnist_stays_under_a_hundred_thousand_parameters() -> None:
    layers = [1 * 36 * 9, 36 * 36 * 9, 36 * 72 * 9, 72 * 72 * 9]
    norms = 2 * (36 + 36 + 72 + 72)
    assert parameters_of(Cnn((1, 28, 28), 10, width=36)) == sum(layers) + norms + 72 * 10 + 10 <= 100_000


@pytest.mark.parametrize("model", [Cnn, ResNet])
def test_convolutions_are_laid_out_channels_last(model: Any) -> None:
    weight = next(module.weight for module in model((3, 8, 8), 10).modules() if isinstance(module, nn.Conv2d))
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


@pytest.mark.parametrize(("norm", "alone"), [(False, True), (True, False)])
def test_without_norm_a_sample_does_not_see_the_others_of_its_batch(norm: bool, alone: bool) -> None:
    model = seeded(Cnn, (1, 8, 8), 10, width=4, norm=norm)
    inputs = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model(inputs)[:2], model(inputs[:2]), atol=1e-6) is alone


@pytest.mark.parametrize(("shape", "hidden"), [((1, 8, 8), (64,)), ((5,), ()), ((2, 3), (4, 7))])
def test_mlp_has_a_linear_layer_between_each_two_widths(shape: tuple[int, ...], hidden: tuple[int, ...]) -> None:
    model = seeded(Mlp, shape, 3, hidden)
    widths = [torch.Size(shape).numel(), *hidden, 3]
    assert model(torch.zeros(4, *shape)).shape == (4, 3)
    assert parameters_of(model) == sum((before + 1) * after for before, after in pairwise(widths))


@pytest.mark.parametrize("model", [(Mlp, (1, 8, 8), 10), (Cnn, (1, 8, 8), 10), (Vit, (1, 8, 8), 10, 4)])
def test_dropout_acts_in_training_and_never_in_evaluation(model: Any) -> None:
    dropping = seeded(*model, dropout=0.5)
    if isinstance(dropping, Vit):
        nn.init.normal_(dropping.head.weight)  # which begins at 0
    inputs = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(dropping(inputs), dropping(inputs))
    dropping.eval()
    assert torch.equal(dropping(inputs), dropping(inputs))


@pytest.mark.parametrize("length", [1, 5, 16])
def test_gpt_gives_logits_for_every_place_of_any_length_up_to_its_context(length: int) -> None:
    assert seeded(Gpt, 50, (16,), layers=2, heads=2, width=8)(tokens(3, length)).shape == (3, length, 50)


@pytest.mark.parametrize(("vocabulary", "context", "layers", "width"), [(50, 16, 2, 8), (65, 128, 4, 128)])
def test_gpt_has_as_many_parameters_as_its_formula(vocabulary: int, context: int, layers: int, width: int) -> None:
    block = 12 * width**2 + 13 * width  # attention 4 w^2 + 4 w, feed-forward 8 w^2 + 5 w, two norms 4 w
    expected = (vocabulary + context) * width + layers * block + 2 * width
    assert parameters_of(Gpt(vocabulary, (context,), layers=layers, heads=4, width=width)) == expected


@pytest.mark.parametrize("changed", [1, 7, 15])
def test_gpt_sees_no_token_before_its_time(changed: int) -> None:
    model, before = seeded(Gpt, 50, (16,), layers=2, heads=2, width=16), tokens(2, 16)
    after = before.clone()
    after[:, changed] = (after[:, changed] + 1) % 50
    difference = (model(after) - model(before)).abs().amax((0, 2))
    assert (difference[:changed] < 1e-6).all()
    assert (difference[changed:] > 1e-6).all()


def test_gpt_knows_the_order_of_tokens() -> None:
    model, before = seeded(Gpt, 50, (16,), layers=1, heads=2, width=16), tokens(1, 16)
    swapped = before[:, [1, 0, *range(2, 16)]]
    assert not torch.allclose(model(before)[:, -1], model(swapped)[:, -1], atol=1e-6)


def test_gpt_ties_its_output_to_its_embedding() -> None:
    model = seeded(Gpt, 50, (16,), layers=1, heads=2, width=8)
    assert model.logits.weight is model.tokens.weight
    model(tokens(2, 16)).sum().backward()
    unused = sorted(set(range(50)) - set(tokens(2, 16).flatten().tolist()))
    assert model.tokens.weight.grad[unused].abs().sum() > 0  # only the output layer reaches tokens that do not occur


@pytest.mark.parametrize("layers", [2, 8])
def test_gpt_starts_as_gpt_2_does(layers: int) -> None:
    for name, parameter in seeded(Gpt, 300, (128,), layers=layers, heads=4, width=64).named_parameters():
        if parameter.ndim == 2:
            std = 0.02 / sqrt(2 * layers) if name.endswith("out.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.06), name
            assert abs(parameter.mean().item()) < 5 * std / sqrt(parameter.numel()), name
        else:
            assert (parameter == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name


def test_gpt_2_small_has_its_124_million_parameters() -> None:
    with torch.device("meta"):
        assert parameters_of(Gpt(50257, (1024,), layers=12, heads=12, width=768)) == 124_439_808


@pytest.mark.parametrize("heads", [3, 5, 16])
@pytest.mark.parametrize("model", [(Gpt, 50, (16,)), (Vit, (3, 32, 32), 10)])
def test_heads_that_do_not_divide_the_width_are_refused(model: Any, heads: int) -> None:
    kind, *shapes = model
    with pytest.raises(JobError, match=f"width 8 is not a multiple of heads {heads}"):
        kind(*shapes, heads=heads, width=8)


@pytest.mark.parametrize(
    ("depth", "stem", "classes", "parameters"),
    [
        (18, "imagenet", 1000, 11_689_512),
        (34, "imagenet", 1000, 21_797_672),
        (50, "imagenet", 1000, 25_557_032),
        (18, "cifar", 10, 11_173_962),
    ],
)
def test_resnet_has_the_known_number_of_parameters(depth: Any, stem: Any, classes: int, parameters: int) -> None:
    with torch.device("meta"):
        assert parameters_of(ResNet((3, 224, 224), classes, depth, stem)) == parameters


@pytest.mark.parametrize(("depth", "stages", "widest"), [(18, [2, 2, 2, 2], 512), (50, [3, 4, 6, 3], 2048)])
@pytest.mark.parametrize(("stem", "size", "sizes"), [("imagenet", 224, [56, 28, 14, 7]), ("cifar", 32, [32, 16, 8, 4])])
def test_resnet_has_the_sizes_of_the_papers_table(
    depth: Any, stages: list[int], widest: int, stem: Any, size: int, sizes: list[int]
) -> None:
    with torch.device("meta"):
        model, shapes = ResNet((3, size, size), 10, depth, stem), list[torch.Size]()
        for block in model.blocks:
            block.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
        assert model(torch.zeros(2, 3, size, size)).shape == (2, 10)
    widths = [widest // 8, widest // 4, widest // 2, widest]
    stage_by_stage = zip(stages, widths, sizes, strict=True)
    assert shapes == [(2, width, side, side) for count, width, side in stage_by_stage for _ in range(count)]


@pytest.mark.parametrize("bottleneck", [True, False])
def test_a_block_of_resnet_begins_as_the_identity_and_can_leave_it(bottleneck: bool) -> None:
    torch.manual_seed(0)
    block = Block(8, 2 if bottleneck else 8, stride=1, bottleneck=bottleneck)
    block.begin_as_the_identity()
    inputs = torch.rand(4, 8, 5, 5)
    assert torch.equal(block(inputs), inputs)
    block(inputs).square().sum().backward()
    assert block.layers[-1].weight.grad.abs().min() > 0


def test_resnet_starts_with_hes_variance() -> None:
    model = seeded(ResNet, (3, 32, 32), 10, width=16)
    assert all((block.layers[-1].weight == 0).all() for block in model.blocks)
    for name, weight in model.named_parameters():
        if weight.ndim == 4 and weight.numel() > 3000:
            outputs = weight.shape[0] * weight.shape[2] * weight.shape[3]
            assert weight.std().item() == pytest.approx(sqrt(2 / outputs), rel=0.06), name


@pytest.mark.parametrize(
    ("sizes", "parameters"),
    [
        ({}, 5_717_416),
        ({"heads": 6, "width": 384}, 22_050_664),
        ({"heads": 12, "width": 768}, 86_567_656),
        ({"heads": 16, "width": 1024, "layers": 24}, 304_326_632),
    ],
    ids=["Ti", "S", "B", "L"],
)
def test_vit_has_the_known_number_of_parameters(sizes: dict[str, int], parameters: int) -> None:
    with torch.device("meta"):
        model = Vit((3, 224, 224), 1000, **sizes)
        assert parameters_of(model) == parameters
        assert model.positions.shape[1] == 1 + 14 * 14
        assert model(torch.zeros(2, 3, 224, 224)).shape == (2, 1000)


@pytest.fixture
def vit() -> Any:
    model = seeded(Vit, (3, 8, 12), 5, patch=4, layers=2, heads=2, width=16)
    nn.init.normal_(model.head.weight)  # which begins at 0
    return model


def test_the_class_token_of_vit_sees_every_patch(vit: Any) -> None:
    inputs = torch.rand(1, 3, 8, 12).requires_grad_()
    vit(inputs)[0, 0].backward()
    assert inputs.grad is not None
    assert (inputs.grad.abs().sum(1) > 0).all()


def test_vit_knows_where_a_patch_is(vit: Any) -> None:
    inputs = torch.rand(1, 3, 8, 12)
    mirrored = torch.cat([inputs[..., 8:], inputs[..., 4:8], inputs[..., :4]], 3)
    assert not torch.allclose(vit(inputs), vit(mirrored), atol=1e-6)
    nn.init.zeros_(vit.positions)
    assert torch.allclose(vit(inputs), vit(mirrored), atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 30, 32), (3, 32, 30)])
def test_images_that_are_not_whole_patches_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(JobError, match=f"images of {shape[1]}x{shape[2]} are not whole patches of 16x16"):
        Vit(shape, 10)
