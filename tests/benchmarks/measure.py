"""What the benchmarks share: sides that take turns, a table of ratios with their bounds, a large state, memory."""

import contextlib
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch

from toolkit.models.gpt import Gpt
from toolkit.trainer import State

ROUNDS = 5
WIDTH, VOCABULARY = 512, 32000


class Table:
    """Lines of figures with their bounds; `missed` counts those over them."""

    def __init__(self) -> None:
        self.missed = 0
        print(f"{'':34}{'ours':>9}{'other':>9}{'ratio':>8}{'bound':>10}")

    def at_least(self, what: str, ours_s: float, other_s: float, bound: float) -> None:
        """Our throughput as a share of the other's."""
        self._line(what, ours_s, other_s, other_s / ours_s, f">= {bound:.2f}", other_s / ours_s >= bound)

    def at_most(self, what: str, ours: float, other: float, bound: float) -> None:
        """Our cost as a share of the other's."""
        self._line(what, ours, other, ours / other, f"<= {bound:.2f}", ours / other <= bound)

    def _line(self, what: str, ours: float, other: float, ratio: float, bound: str, kept: bool) -> None:
        self.missed += not kept
        print(f"{what:34}{ours:9.3f}{other:9.3f}{ratio:8.2f}{bound:>10}  {'ok' if kept else 'MISSED'}", flush=True)


def in_turns(turns: dict[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, float]:
    """The median of every side."""
    figures: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            figures[name].append(turn())
    return {name: median(all_) for name, all_ in figures.items()}


def a_state(mib: int) -> State:
    """A transformer with AdamW's moments: some hundred tensors, together as large as asked, as near as layers allow."""
    torch.manual_seed(0)
    layers = max(1, round((mib * 2**20 / 12 - VOCABULARY * WIDTH) / (12 * WIDTH * WIDTH)))
    model = Gpt(VOCABULARY, (64,), layers=layers, width=WIDTH)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return State(model, optimizer, torch.amp.GradScaler("cpu", enabled=False))


@contextlib.contextmanager
def prefaulted(mib: int) -> Iterator[None]:
    """Inside, so much of the free memory has been used before, and stays with this machine.

    A virtual machine gives free memory back to its host in blocks of 2 MiB, and gets it again at a fifth of the speed
    of a write. So one page in 64 is held on to: what lies between is free, and in no such block.
    """
    size, step = mib << 20, 64 * mmap.PAGESIZE
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            pages.madvise(mmap.MADV_NOHUGEPAGE)
        for at in range(0, size, mmap.PAGESIZE):
            pages[at] = 1
        for at in range(0, size, step):
            pages.madvise(mmap.MADV_DONTNEED, at + mmap.PAGESIZE, step - mmap.PAGESIZE)
        yield


def memory_bytes(what: str) -> int:
    """Of this process: VmRSS now, VmHWM at most since `forget_peak`. Linux only."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[what].split()[0]) << 10


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
