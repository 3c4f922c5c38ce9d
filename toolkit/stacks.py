"""Where ranks of this machine are: their Python stacks, those of their loader workers, NCCL's flight recorder."""

import contextlib
import signal
import time
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from toolkit.attempt import Where
from toolkit.process import is_gone
from toolkit.rank import SHOW_STACKS

STOPPED = "stopped"
STUCK = "in uninterruptible sleep (a disk or device that does not answer)"
PATIENCE_S = 3.0  # for all processes to show their stacks
_LEAST_S = 0.5  # for each, though others have used up all patience
NCCL_PATIENCE_S = 6.0  # for the flight recorders of all ranks


def where(folder: Path, notes: Mapping[int, Mapping[str, Any]]) -> dict[int, Where]:
    """Have the ranks that left these notes in a folder write down their stacks, stopped ones too."""
    states = {rank: _state(note["pid"]) for rank, note in notes.items()}
    asked = [rank for rank in states if _ask_nccl(folder, rank)]
    _show_stacks(folder, {rank: note["pid"] for rank, note in notes.items() if "exit" not in note})
    _wait_for_nccl(folder, asked)
    return {rank: Where(state, innermost(folder / f"rank-{rank}-stacks.log")) for rank, state in states.items()}


def _state(pid: int) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        state = psutil.Process(pid).status()
        return {psutil.STATUS_STOPPED: STOPPED, psutil.STATUS_DISK_SLEEP: STUCK}.get(state, state)
    return "gone"


def _show_stacks(folder: Path, pids: Mapping[int, int]) -> None:
    """The stacks of ranks, then of their loader workers, which may be what they wait for.

    A rank and its children write into one file: of all ranks at once, one process after another is asked.
    """
    families = {folder / f"rank-{rank}-stacks.log": _family(rank, pid) for rank, pid in pids.items()}
    deadline_s = time.monotonic() + PATIENCE_S
    for turn in range(max(map(len, families.values()), default=0)):
        asked = [(path, *family[turn]) for path, family in families.items() if turn < len(family)]
        _show_one_each(asked, max(deadline_s, time.monotonic() + _LEAST_S))


def _family(rank: int, pid: int) -> list[tuple[str, psutil.Process]]:
    """A rank's process and its children, and who they are."""
    with contextlib.suppress(psutil.NoSuchProcess):
        own = psutil.Process(pid)
        child = f"a child of rank {rank}, such as a loader worker"
        return [(f"rank {rank}", own), *((child, process) for process in own.children(recursive=True))]
    return []


def _show_one_each(asked: Iterable[tuple[Path, str, psutil.Process]], deadline_s: float) -> None:
    """The stacks of processes that write into a file each; of one that is silent, what the kernel says."""
    silent = {}
    for path, who, process in asked:
        _append(path, f"{who} (pid {process.pid}, {_state(process.pid)}):\n")
        if not _catches(process.pid, SHOW_STACKS):
            _append(path, "  it has no handler that would show its stacks\n")
            continue
        silent[path] = (process.pid, path.stat().st_size)
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(SHOW_STACKS)
            process.send_signal(signal.SIGCONT)  # a stopped one shows them before it does anything else
    began_s = time.monotonic()
    while any(not is_gone(pid) for pid, _ in silent.values()) and time.monotonic() < deadline_s:
        silent = {path: (pid, size) for path, (pid, size) in silent.items() if path.stat().st_size == size}
        time.sleep(0.02)
    for path, (pid, size) in silent.items():
        if path.stat().st_size == size:
            waited_s = time.monotonic() - began_s
            _append(path, f"  it did not answer within {waited_s:.1f} s; the kernel says: {_kernel_stack(pid)}\n")


def _ask_nccl(folder: Path, rank: int) -> bool:
    """Whether NCCL's flight recorder of a rank could be asked; it answers with a file nccl-trace-rank-N."""
    pipe = folder / f"nccl-pipe-rank-{rank}.pipe"
    if pipe.is_fifo():
        with contextlib.suppress(OSError), open(pipe, "r+b", buffering=0) as trigger:
            trigger.write(b"1\n")
            return True
    return False


def _wait_for_nccl(folder: Path, ranks: Iterable[int]) -> None:
    """It looks at its pipe once a second, and writes some megabytes."""
    deadline_s = time.monotonic() + NCCL_PATIENCE_S
    for path in (folder / f"nccl-trace-rank-{rank}" for rank in ranks):
        before, size = -1, 0
        while (size == 0 or size != before) and time.monotonic() < deadline_s:
            time.sleep(0.2)
            before, size = size, path.stat().st_size if path.exists() else 0


def innermost(stacks: Path) -> str:
    """`file, line N in function` where the main thread of a rank is: the last that faulthandler writes, whichever the
    signal has come to.
    """
    place = ""
    with contextlib.suppress(FileNotFoundError):
        own = stacks.read_text(errors="replace").partition("\na child of")[0]
        for line, after in pairwise(own.splitlines()):
            if line.endswith("(most recent call first):"):
                place = after.strip().removeprefix("File ")
    return place


def _append(path: Path, words: str) -> None:
    with open(path, "ab") as file:
        file.write(words.encode())


def _catches(pid: int, number: int) -> bool:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        mask = next(line for line in lines if line.startswith("SigCgt:"))
        return bool(int(mask.split()[1], 16) >> (number - 1) & 1)
    return False


def _kernel_stack(pid: int) -> str:
    for name in ("stack", "wchan"):
        with contextlib.suppress(OSError):
            if words := Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8").strip():
                return words
    return "nothing"
