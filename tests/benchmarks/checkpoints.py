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
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp

from tests.benchmarks.measure import Table, a_state, in_turns, prefaulted
from toolkit.checkpoint import Archive, Checkpointer, Policy, manifest
from toolkit.checkpoint.state import to_plain
from toolkit.session import settled

TMPFS, DISK = Path("/dev/shm"), Path("/var/tmp")
SAVE, LOAD, STALL = 0.8, 0.6, 1.5  # of a raw write's and read's throughput, of a copy's time
KEEP_ALL = Policy(keep=1 << 30)


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
        manifest.parse.cache_clear()  # a new process has read none
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
        """When a turn starts; what it has written is removed at its end."""
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


def compare(table: Table, where: str, parent: Path, mib: int) -> None:
    """All lines of one place."""
    with tempfile.TemporaryDirectory(prefix="toolkit-bench-", dir=parent) as name:
        sides = Local(Path(name, "all"), mib)
        others = {"torch.save": sides.save_torch, "DCP": sides.save_dcp, "safetensors": sides.save_safetensors}
        ours = {"ours": sides.save_ours, "stall": sides.stall_ours, "copy": sides.copy, "raw": sides.save_raw}
        with prefaulted(3 * mib), settled():  # as a run is
            took_s = in_turns({**ours, **others})
            table.at_least(f"{where}: save s, raw write", took_s["ours"], took_s["raw"], SAVE)
            for other in others:
                table.at_least(f"{where}: save s, {other}", took_s["ours"], took_s[other], 1.0)
            table.at_most(f"{where}: stall s, copy_", took_s["stall"], took_s["copy"], STALL)
            with sides.to_read():
                took_s = in_turns({"ours": sides.load_ours, "raw": sides.load_raw})
            table.at_least(f"{where}: load s, raw read", took_s["ours"], took_s["raw"], LOAD)


def main() -> int:
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # what DCP thinks of one process
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=1024)
    mib, table = parser.parse_args().mib, Table()
    if TMPFS.is_dir():
        compare(table, "tmpfs", TMPFS, mib)
    compare(table, "disk", DISK, mib)
    return int(table.missed > 0)


if __name__ == "__main__":
    sys.exit(main())
