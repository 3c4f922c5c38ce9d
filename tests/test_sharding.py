"""Blocks, activation checkpointing, and models that cannot be sharded. tests/dist/test_fsdp.py has real ranks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from toolkit import sharding
from toolkit.errors import JobError
from toolkit.models.cnn import Cnn
from toolkit.models.gpt import Gpt
from toolkit.models.mlp import Mlp
from toolkit.models.resnet import ResNet
from toolkit.models.vit import Vit

CPU = torch.device("cpu")


def test_blocks_are_those_that_a_model_names_or_the_elements_of_its_outermost_lists() -> None:
    gpt, mlp = Gpt(11, (6,), layers=2, heads=2, width=8), Mlp((4,), 3, hidden=(5,), dropout=0.1)
    assert sharding.blocks(gpt) == [*gpt.blocks]
    assert sharding.blocks(mlp) == [mlp.layers[1], mlp.layers[4]], "those without parameters are none"
    for model in (ResNet((3, 8, 8), 10, width=4), Vit((3, 8, 8), 10, patch=4, layers=2)):
        assert sharding.blocks(model) == [*model.blocks]
    stages = nn.ModuleList([nn.ModuleList([nn.Linear(1, 1), nn.ReLU()]), nn.Sequential(nn.Linear(1, 1))])
    assert sharding.blocks(nn.ModuleDict({"stages": stages})) == [stages[0][0], stages[1]]
    mlp.blocks = nn.ModuleList([mlp.layers[1]] * 2)
    assert sharding.blocks(mlp) == [mlp.layers[1]]


def test_a_weight_that_two_parts_share_keeps_both_out_of_groups_of_their_own() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    model[2].weight = model[0].weight
    assert sharding._untied(model) == [model[1], model[3]]


class Counting(nn.Module):
    """Its output depends on a buffer that every pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.passes += 1
        return (inputs * self.weight * self.passes).tanh()


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: Gpt(11, (6,), layers=2, heads=2, width=8, dropout=0.2), torch.arange(24).view(4, 6) % 11),
        (lambda: Cnn((1, 8, 8), 3, width=4, dropout=0.2), torch.randn(5, 1, 8, 8)),
        (lambda: ResNet((3, 8, 8), 3, 18, "cifar", width=4), torch.randn(5, 3, 8, 8)),
        (lambda: ResNet((3, 16, 16), 3, 50, "imagenet", width=4), torch.randn(5, 3, 16, 16)),
        (lambda: Vit((3, 8, 8), 3, patch=4, layers=2, heads=2, width=8, dropout=0.2), torch.randn(5, 3, 8, 8)),
        (lambda: nn.Sequential(Counting(), nn.Dropout(0.5), Counting()), torch.randn(5, 3)),
    ],
    ids=["gpt", "cnn", "resnet18", "resnet50", "vit", "counting"],
)
def test_computing_activations_again_changes_no_bit(make: Callable[[], nn.Module], inputs: Tensor) -> None:
    def trained(again: bool) -> tuple[dict[str, Tensor], int]:
        torch.manual_seed(0)
        model = make()
        passes = 0

        def count(*_: object) -> None:
            nonlocal passes
            passes += 1

        for block in sharding.blocks(model):
            for part in block.modules():
                part.register_forward_hook(count) if not [*part.children()] else None
        if again:
            sharding.recompute(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(2):
                model(inputs).square().mean().backward()
            optimizer.step()
        with torch.inference_mode():
            model(inputs)
        return model.state_dict(), passes

    (plain, once), (recomputed, twice) = trained(False), trained(True)
    assert plain.keys() == recomputed.keys()
    assert [name for name in plain if not torch.equal(plain[name], recomputed[name])] == []
    if hasattr(make(), "blocks"):  # the others' blocks have no parts, of which hooks could count the calls
        assert twice > once


@pytest.mark.parametrize(
    ("model", "compiled", "words"),
    [
        (
            nn.Linear(3, 3),
            False,
            "finds no blocks in the model.* give the model an attribute `blocks`, or set it to false",
        ),
        (Cnn((1, 8, 8), 3, width=4), True, "do not go together where blocks have buffers.* set one of them to false"),
    ],
)
def test_what_cannot_be_computed_again_is_refused(model: nn.Module, compiled: bool, words: str) -> None:
    with pytest.raises(JobError, match=words):
        sharding.recompute(model, compiled)


class Loud(nn.Module):
    """Looks at a value while it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.scale = float(self.layer.weight.norm())


class Plain(nn.Module):
    """Keeps a tensor that nobody knows of."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.inner.mask = torch.ones(3)


def made(kind: type[nn.Module]) -> nn.Module:
    """As `components.build` does it."""
    try:
        return kind()
    except Exception as error:
        raise JobError(f"model 'mine:{kind.__name__}' raised {error}") from error


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (Loud, ["model 'mine:Loud' raised", "torch's meta device, without values; use train.strategy=ddp"]),
        (Plain, ["model 'mine:Plain' keeps inner.mask as plain tensors", "register_buffer", "train.strategy=ddp"]),
    ],
)
def test_a_model_that_cannot_be_made_without_values_is_refused(kind: type[nn.Module], parts: list[str]) -> None:
    with pytest.raises(JobError) as refusal:
        sharding.build(lambda: made(kind), f"mine:{kind.__name__}", CPU, "fp32", "fp32")
    for part in parts:
        assert part in str(refusal.value)


def test_a_model_that_cannot_be_made_at_all_is_refused_as_ever() -> None:
    def make() -> Any:
        raise JobError("unknown argument")

    with pytest.raises(JobError, match=r"^unknown argument$"):
        sharding.build(make, "mine", CPU, "fp32", "fp32")


def test_batch_norm_is_made_synchronous_on_several_gpus_and_left_alone_on_one_rank() -> None:
    model = Cnn((1, 8, 8), 3, width=4)
    names = [*model.state_dict()]
    assert sharding.with_sync_batch_norm(model, CPU, 1) is model
    assert not [part for part in model.modules() if isinstance(part, nn.SyncBatchNorm)]
    changed = sharding.with_sync_batch_norm(model, torch.device("cuda", 0), 2)
    assert len([part for part in changed.modules() if isinstance(part, nn.SyncBatchNorm)]) == 4
    assert [*changed.state_dict()] == names
