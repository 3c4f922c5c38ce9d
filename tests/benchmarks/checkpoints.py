"""Seconds to save and to load a checkpoint, beside a raw write and read of the same bytes and what others offer.
`make bench`.

Every side has its bytes in warm memory and fsyncs every file it writes. Sides take turns, and of all rounds the median
counts. Ours checksums what it writes, and verifies what it reads; nobody else does.
"""

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

from toolkit.checkpoint import Archive, Checkpointer, Policy
from toolkit.checkpoint.state import to_plain
from toolkit.models.gpt import Gpt
from toolkit.trainer import State

sys.path.append(str(Path(__file__).parent.parent))

TMPFS, DISK = Path("/dev/shm"), Path("/var/tmp")
SAVE, LOAD, STALL = 0.8, 0.6, 1.5  # of a raw write's and read's throughput, of a copy's time
S3_SAVE, S3_CPU, S3_EXTRA_MIB = 0.8, 1.0, 256
S3_MIB, S3_THREADS = 512, 4
WIDTH, VOCABULARY = 512, 32000
KEEP_ALL = Policy(keep=1 << 30)


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


class Local:
    """All sides in one folder. Each method takes a turn, and returns the seconds that count."""

    def __init__(self, folder: Path, mib: int) -> None:
        self.folder = folder
        self.state = a_state(mib)
        self.tensors = to_plain(self.state)[0]
        self.flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in self.tensors.values()])
        self.warm = torch.zeros_like(self.flat)
        self.ours = Checkpointer(Archive(str(folder / "ours"), KEEP_ALL))
        self.stalls = [0.0]
        for turn in (self.save_ours, self.copy):
            turn()

    def save_ours(self) -> float:
        self.state.step += 1
        with self._written(self.folder / "ours") as start_s:
            self.ours.save(self.state)
            self.ours.wait()
            seconds = time.perf_counter() - start_s
        assert not self.ours.failure, self.ours.failure
        self.stalls.append(self.ours.stalled_s)
        return seconds

    def stall_ours(self) -> float:
        return self.stalls[-1]

    def copy(self) -> float:
        start_s = time.perf_counter()
        self.warm.copy_(self.flat)
        return time.perf_counter() - start_s

    def save_raw(self) -> float:
        with self._written(self.folder / "raw") as start_s:
            self._write_raw()
            return time.perf_counter() - start_s

    def save_torch(self) -> float:
        with self._written(self.folder / "state.pt") as start_s:
            torch.save(self.tensors, self.folder / "state.pt")
            _fsync(self.folder / "state.pt")
            return time.perf_counter() - start_s

    def save_dcp(self) -> float:
        with self._written(self.folder / "dcp") as start_s:
            writer = dcp.FileSystemWriter(self.folder / "dcp", sync_files=True)
            dcp.save(dict(self.tensors), storage_writer=writer, no_dist=True)
            return time.perf_counter() - start_s

    def save_safetensors(self) -> float:
        with self._written(self.folder / "state.safetensors") as start_s:
            save_file(self.tensors, self.folder / "state.safetensors")
            _fsync(self.folder / "state.safetensors")
            return time.perf_counter() - start_s

    @contextlib.contextmanager
    def to_read(self) -> Iterator[None]:
        """What both sides of loading read lies there."""
        self._write_raw()
        self.ours.save(self.state)
        self.ours.wait()
        try:
            yield
        finally:
            shutil.rmtree(self.folder)
            self.folder.mkdir()

    def load_ours(self) -> float:
        self._forget()
        start_s = time.perf_counter()
        assert self.ours.resume(self.state) == self.state.step
        return time.perf_counter() - start_s

    def load_raw(self) -> float:
        self._forget()
        view = memoryview(self.warm.numpy())
        start_s = time.perf_counter()
        with open(self.folder / "raw", "rb", buffering=0) as file:
            done = 0
            while done < len(view):
                done += file.readinto(view[done:])
        return time.perf_counter() - start_s

    def _write_raw(self) -> None:
        view = memoryview(self.flat.numpy())
        with open(self.folder / "raw", "wb", buffering=0) as file:
            done = 0
            while done < len(view):
                done += file.write(view[done:])
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def _written(self, path: Path) -> Iterator[float]:
        """When a turn starts. Its pages have been used just before, so that a virtual machine need not fetch them from
        its host; what it has written is removed.
        """
        before = TMPFS if TMPFS.is_dir() else self.folder
        with tempfile.TemporaryFile(dir=before) as file:
            for _ in range(9):
                file.write(self.flat[: self.flat.numel() // 8].numpy())
        yield time.perf_counter()
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _forget(self) -> None:
        """Nothing of the folder is in memory, if it lies on a disk."""
        for path in self.folder.rglob("*"):
            if path.is_file() and hasattr(os, "posix_fadvise"):
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


class Table:
    """Lines of figures with their bounds; `missed` counts those over them."""

    def __init__(self) -> None:
        self.missed = 0
        print(f"{'':34}{'ours':>9}{'other':>9}{'ratio':>8}{'bound':>10}")

    def ratio(
        self, what: str, ours: float, other: float, least: float | None = None, most: float | None = None
    ) -> None:
        ratio = other / ours if least is not None else ours / other
        if least is not None:
            self._line(what, ours, other, f"{ratio:.2f}", f">= {least:.2f}", ratio >= least)
        elif most is not None:
            self._line(what, ours, other, f"{ratio:.2f}", f"<= {most:.2f}", ratio <= most)

    def _line(self, what: str, ours: float, other: float, ratio: str, bound: str, kept: bool) -> None:
        self.missed += not kept
        print(f"{what:34}{ours:9.3f}{other:9.3f}{ratio:>8}{bound:>10}  {'ok' if kept else 'MISSED'}", flush=True)


def in_turns(turns: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of every side."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            seconds[name].append(turn())
    if os.environ.get("DEBUG"):
        for name, s in seconds.items():
            print("   ", name, [round(x, 3) for x in s])
    return {name: median(all_) for name, all_ in seconds.items()}


def local(table: Table, where: str, parent: Path, mib: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="toolkit-bench-", dir=parent) as name:
        sides = Local(Path(name, "all"), mib)
        others = {"torch.save": sides.save_torch, "DCP": sides.save_dcp, "safetensors": sides.save_safetensors}
        took = in_turns(
            {"ours": sides.save_ours, "stall": sides.stall_ours, "copy": sides.copy, "raw": sides.save_raw, **others},
            rounds,
        )
        table.ratio(f"{where}: save s, raw write", took["ours"], took["raw"], least=SAVE)
        for other in others:
            table.ratio(f"{where}: save s, {other}", took["ours"], took[other], least=1.0)
        table.ratio(f"{where}: stall s, copy_", took["stall"], took["copy"], most=STALL)
        with sides.to_read():
            took = in_turns({"ours": sides.load_ours, "raw": sides.load_raw}, rounds)
        table.ratio(f"{where}: load s, raw read", took["ours"], took["raw"], least=LOAD)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=["local", "s3"])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    table = Table()
    if arguments.only != "s3":
        if TMPFS.is_dir():
            local(table, "tmpfs", TMPFS, arguments.mib, arguments.rounds)
        local(table, "disk", DISK, arguments.mib, arguments.rounds)
    return int(table.missed > 0)


if __name__ == "__main__":
    sys.exit(main())
