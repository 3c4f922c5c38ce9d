"""What the tests of checkpoints share: states to save, worlds of ranks in one process, and stores that fail or die."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from toolkit import storage
from toolkit.checkpoint import Archive, Checkpointer, plan
from toolkit.checkpoint.state import to_plain
from toolkit.config.schema import Component
from toolkit.distributed import Ranks
from toolkit.models.cnn import Cnn
from toolkit.models.gpt import Gpt
from toolkit.optim import Ema, build_optimizer
from toolkit.trainer import State

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd-momentum": ("sgd", {"lr": 0.1, "momentum": 0.9}),
    "sgd": ("sgd", {"lr": 0.1}),
    "adam": ("adam", {"lr": 0.01, "fused": False}),
    "adam-amsgrad-foreach": ("adam", {"lr": 0.01, "amsgrad": True, "foreach": True}),
    "adamw-fused": ("adamw", {"lr": 0.01}),
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "cnn": lambda: Cnn((3, 8, 8), 4, width=4),
    "gpt": lambda: Gpt(11, (6,), layers=1, heads=2, width=8),
}


def new_state(
    model: Callable[[], nn.Module] = MODELS["cnn"], optimizer: str = "adamw-fused", seed: int = 0, ema: bool = False
) -> State:
    torch.manual_seed(seed)
    built, (name, args) = model(), OPTIMIZERS[optimizer]
    component = Component(name=name, args=args)
    return State(
        built,
        build_optimizer(built, component, torch.device("cpu")),
        torch.amp.GradScaler("cpu", enabled=False),
        ema=Ema(built, 0.9) if ema else None,
    )


def trained(state: State, steps: int) -> State:
    """The state after some more steps, each on data that follow from its number."""
    for _ in range(steps):
        generator = torch.Generator().manual_seed(state.step)
        if isinstance(state.model, Gpt):
            inputs = torch.randint(11, (5, 6), generator=generator)
        else:
            inputs = torch.randn(5, 3, 8, 8, generator=generator)
        state.model(inputs).square().mean().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        if state.ema:
            state.ema.update(state.model)
        state.step += 1
    return state


def small_state(seed: int = 0, step: int = 0, width: int = 3) -> State:
    """A state of some hundred bytes at a step, every number of it drawn from the seed."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, width), nn.Linear(width, 1))
    state = State(
        model,
        torch.optim.Adam(model.parameters(), lr=0.1),
        torch.amp.GradScaler("cpu", enabled=False),
        ema=Ema(model, 0.9),
    )
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape)
    state.optimizer.step()
    state.ema.update(model)
    state.step, state.best = step, float(torch.rand(()))
    return state


def wide_state(seed: int = 0, step: int = 1, layers: int = 12) -> State:
    """A state of 6 MiB without an optimizer's, so that several ranks have a share of it; with buffers that vary."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 512, bias=False), nn.BatchNorm1d(512)) for _ in range(layers)))
    for buffer in model.buffers():
        buffer.copy_(torch.rand(buffer.shape))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return State(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), step=step)


def tensors_of(state: Any) -> dict[str, Tensor]:
    """A copy of every tensor of a state, by name; tied ones under each of theirs."""
    found = {f"model/{name}": tensor for name, tensor in state.model.state_dict().items()} | to_plain(state)[0]
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    """All there is to tensors: type, shape and every byte, so that one nan is not taken for another."""
    return {
        name: (
            tensor.dtype,
            tuple(tensor.shape),
            tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for name, tensor in tensors.items()
    }


def all_of(state: Any) -> tuple[Any, ...]:
    """Everything that must come back."""
    return bits(tensors_of(state)), to_plain(state)[1]


def save(url: str, state: Any, score: float | None = None, **settings: Any) -> Checkpointer:
    """Save and wait; asserts that it has worked."""
    checkpointer = Checkpointer(Archive(url), **settings)
    checkpointer.save(state, score)
    checkpointer.wait()
    assert checkpointer.failure is None
    return checkpointer


def shared(patch: pytest.MonkeyPatch) -> None:
    """Have even a small state dealt out over all ranks."""
    patch.setattr(plan, "MIN_SHARE_BYTES", 1)
    patch.setattr(plan, "CHUNK_BYTES", 16)


def silent(words: str) -> None:
    del words


def world(archive: Archive, world_size: int, attempt: int | None = 1, **settings: Any) -> list[Checkpointer]:
    """Checkpointers as so many ranks have them. They need no process group: ranks talk through the store."""
    return [Checkpointer(archive, Ranks(rank, world_size, rank), attempt, **settings) for rank in range(world_size)]


def save_together(ranks: list[Checkpointer], states: list[Any], score: float | None = None) -> None:
    """One save of every rank, rank 0 being the last to begin."""
    for checkpointer, state in reversed(list(zip(ranks, states, strict=True))):
        checkpointer.save(state, score)
    for checkpointer in ranks:
        checkpointer.wait()


def files_of(url: str) -> set[str]:
    """Every file under a folder of this machine, by its path in there."""
    return {str(path.relative_to(url)) for path in Path(url).rglob("*") if not path.is_dir()}


OPERATIONS = (
    "abort_uploads", "create", "exists", "free_bytes", "move", "names", "read", "read_into", "remove", "size", "sizes",
    "sync", "sync_folder", "write",
)  # fmt: skip


class Killed(BaseException):
    """What takes the place of SIGKILL: nothing in the package may catch it and go on."""


class Store:
    """Stands between the package and its storage: records every operation, and fails or dies at one of them."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []
        self.fails_at: int | None = None  # the number of an operation that raises OSError
        self.dies_at: int | None = None  # the number of the last one: all after it raise Killed
        self.acts = False  # whether the operation that dies is carried out before it does
        self._lock = threading.Lock()

    @contextmanager
    def between(self) -> Iterator["Store"]:
        with pytest.MonkeyPatch.context() as patch:
            for name in OPERATIONS:
                patch.setattr(storage, name, self._wrapped(name, getattr(storage, name)))
            yield self

    def _wrapped(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(url: str, *arguments: Any, **options: Any) -> Any:
            with self._lock:
                number = len(self.done)
                self.done.append((name, url))
            if self.dies_at is not None and number >= self.dies_at:
                if number == self.dies_at and self.acts:
                    operation(url, *arguments, **options)
                elif number == self.dies_at and name in ("write", "create") and "://" not in url:
                    with suppress(OSError):  # the folder may not be there yet
                        Path(url).with_name(".tmp-killed").write_bytes(b"half of it")
                raise Killed
            if number == self.fails_at:
                raise OSError(f"cannot {name} {url}: the store is away")
            return operation(url, *arguments, **options)

        return wrapped
