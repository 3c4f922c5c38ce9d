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


def test_cnn_is_laid_out_channels_last() -> None:
    weight = next(module.weight for module in Cnn((3, 8, 8), 10).modules() if isinstance(module, nn.Conv2d))
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


@pytest.mark.parametrize("model", [(Mlp, (1, 8, 8), 10), (Cnn, (1, 8, 8), 10)])
def test_dropout_acts_in_training_and_never_in_evaluation(model: Any) -> None:
    dropping = seeded(*model, dropout=0.5)
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


@pytest.mark.parametrize("heads", [3, 5, 16])
def test_heads_that_do_not_divide_the_width_are_refused(heads: int) -> None:
    with pytest.raises(JobError, match=f"width 8 is not a multiple of heads {heads}"):
        Gpt(50, (16,), heads=heads, width=8)
