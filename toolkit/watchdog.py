"""Ranks that hang: found by their heartbeats, made to show where they are, and named."""

import contextlib
import signal
import time
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from toolkit.attempt import SHOW_STACKS, Attempt, is_gone
from toolkit.pulse import Pulse

# The innermost Python frame of a rank that waits for others: it is not the one that holds them up.
WAITING = ("torch/distributed/", "torch/autograd/graph.py", "toolkit/agreement.py")
PATIENCE_S = 3.0  # for one process to show its stacks
NCCL_PATIENCE_S = 6.0  # for the flight recorders of all ranks


class Hang(NamedTuple):
    """A rank that has given no sign of life for longer than its phase may take."""

    rank: int
    state: str  # in words: stopped, waiting for a disk, …
    pulse: Pulse
    silent_s: float
    limit_s: float
    where: str  # the innermost line of Python of its main thread
    pulses: Mapping[int, Pulse]  # of all ranks, before a stopped one went on to show its stacks


def overdue(attempt: Attempt, limits: Mapping[str, float], since_s: float) -> list[int]:
    """The ranks whose last heartbeat is older than its phase's limit; one that never came counts from `since_s`, and so
    does one that came before. A rank that has come later than one within its own limit waits for that, and is not late.
    """
    beats, now_s = _beats(attempt, since_s), time.monotonic()
    late = [rank for rank, beat in beats.items() if now_s - beat.at_s > limits[beat.phase]]
    oldest_in_time_s = min((beat.at_s for rank, beat in beats.items() if rank not in late), default=now_s)
    return [rank for rank in late if beats[rank].at_s <= oldest_in_time_s]


def _beats(attempt: Attempt, since_s: float) -> dict[int, Pulse]:
    """The last heartbeats of all ranks that have not left their last word."""
    pulses, notes = attempt.pulses(), attempt.notes()
    ranks = [rank for rank in range(attempt.processes) if "exit" not in notes.get(rank, {})]
    beats = {rank: pulses.get(rank, Pulse()) for rank in ranks}
    return {rank: beat._replace(at_s=max(beat.at_s, since_s)) for rank, beat in beats.items()}


def examine(attempt: Attempt, limits: Mapping[str, float], since_s: float) -> Hang:
    """Have every rank write down its stacks, stopped ones too, and say which holds up the others: it may have given its
    last sign of life just after them.
    """
    now_s, beats = time.monotonic(), _beats(attempt, since_s)
    states = {rank: _state(note["pid"]) for rank, note in attempt.notes().items()}
    asked = [rank for rank in states if _ask_nccl(attempt, rank)]
    for rank, note in attempt.notes().items():
        if "exit" not in note:
            _show_stacks(attempt, rank, note)
    _wait_for_nccl(attempt, asked)
    where = {rank: innermost(attempt.folder / f"rank-{rank}-stacks.log") for rank in states}

    def least_suspect(rank: int) -> tuple[Any, ...]:
        beat = beats[rank]
        waits = any(place in where.get(rank, "") for place in WAITING)
        return (states.get(rank) not in _ODD, waits, beat.step, beat.at_s, rank)

    rank = min(beats, key=least_suspect)
    beat, state = beats[rank], states.get(rank, "never started")
    return Hang(rank, state, beat, now_s - beat.at_s, limits[beat.phase], where.get(rank, ""), beats)


_ODD = ("stopped", "in uninterruptible sleep (a disk or device that does not answer)")


def _state(pid: int) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        state = psutil.Process(pid).status()
        return {psutil.STATUS_STOPPED: _ODD[0], psutil.STATUS_DISK_SLEEP: _ODD[1]}.get(state, state)
    return "gone"


def _show_stacks(attempt: Attempt, rank: int, note: Mapping[str, Any]) -> None:
    """The stacks of a rank, then of its loader workers, which may be what it waits for."""
    path = attempt.folder / f"rank-{rank}-stacks.log"
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


def _ask_nccl(attempt: Attempt, rank: int) -> bool:
    """Whether NCCL's flight recorder of a rank could be asked; it answers with a file nccl-trace-rank-N."""
    pipe = attempt.folder / f"nccl-pipe-rank-{rank}.pipe"
    if pipe.is_fifo():
        with contextlib.suppress(OSError), open(pipe, "r+b", buffering=0) as trigger:
            trigger.write(b"1\n")
            return True
    return False


def _wait_for_nccl(attempt: Attempt, ranks: Iterable[int]) -> None:
    """It looks at its pipe once a second, and writes some megabytes."""
    deadline_s = time.monotonic() + NCCL_PATIENCE_S
    for path in (attempt.folder / f"nccl-trace-rank-{rank}" for rank in ranks):
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
