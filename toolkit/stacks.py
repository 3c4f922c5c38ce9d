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
PATIENCE_S = 3.0  # for one process to show its stacks
NCCL_PATIENCE_S = 6.0  # for the flight recorders of all ranks


def where(folder: Path, notes: Mapping[int, Mapping[str, Any]]) -> dict[int, Where]:
    """Have the ranks that left these notes in a folder write down their stacks, stopped ones too."""
    states = {rank: _state(note["pid"]) for rank, note in notes.items()}
    asked = [rank for rank in states if _ask_nccl(folder, rank)]
    for rank, note in notes.items():
        if "exit" not in note:
            _show_stacks(folder, rank, note)
    _wait_for_nccl(folder, asked)
    return {rank: Where(state, innermost(folder / f"rank-{rank}-stacks.log")) for rank, state in states.items()}


def _state(pid: int) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        state = psutil.Process(pid).status()
        return {psutil.STATUS_STOPPED: STOPPED, psutil.STATUS_DISK_SLEEP: STUCK}.get(state, state)
    return "gone"


def _show_stacks(folder: Path, rank: int, note: Mapping[str, Any]) -> None:
    """The stacks of a rank, then of its loader workers, which may be what it waits for."""
    path = folder / f"rank-{rank}-stacks.log"
    processes = []
    with contextlib.suppress(psutil.NoSuchProcess):
        processes = [psutil.Process(note["pid"]), *psutil.Process(note["pid"]).children(recursive=True)]
    for at, process in enumerate(processes):
        who = f"rank {rank}" if at == 0 else f"a child of rank {rank}, such as a loader worker"
        _append(path, f"{who} (pid {process.pid}, {_state(process.pid)}):\n")
        size = path.stat().st_size
        if not _catches(process.pid, SHOW_STACKS):
            _append(path, "  it has no handler that would show its stacks\n")
            continue
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(SHOW_STACKS)
            process.send_signal(signal.SIGCONT)  # a stopped one shows them before it does anything else
        deadline_s = time.monotonic() + PATIENCE_S
        while path.stat().st_size == size and time.monotonic() < deadline_s and not is_gone(process.pid):
            time.sleep(0.02)
        if path.stat().st_size == size:
            _append(
                path, f"  it did not answer within {PATIENCE_S:.0f} s; the kernel says: {_kernel_stack(process.pid)}\n"
            )


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
