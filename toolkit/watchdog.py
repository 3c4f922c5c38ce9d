"""Ranks that hang: found by their heartbeats, made to show where they are, and named."""

import contextlib
import signal
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from toolkit.attempt import SHOW_STACKS, Attempt, is_gone
from toolkit.pulse import Pulse

# The innermost Python frame of a rank that waits for others: it is not the one that holds them up.
WAITING = ("torch/distributed/", "torch/autograd/graph.py", "toolkit/agreement.py")
PATIENCE_S = 3.0  # for one process to show its stacks


class Hang(NamedTuple):
    """A rank that has given no sign of life for longer than its phase may take."""

    rank: int
    state: str  # in words: stopped, waiting for a disk, …
    pulse: Pulse
    silent_s: float
    limit_s: float
    where: str  # the innermost line of Python of its main thread
    pulses: Mapping[int, Pulse]  # of all ranks, before a stopped one went on to show its stacks


def overdue(attempt: Attempt, limits: Mapping[str, float], started_s: float) -> list[int]:
    """The ranks whose last heartbeat is older than its phase's limit; one that never came counts from the start."""
    pulses, notes, now_s = attempt.pulses(), attempt.notes(), time.monotonic()
    late = []
    for rank in range(attempt.processes):
        beat = pulses.get(rank, Pulse(at_s=started_s))
        if "exit" not in notes.get(rank, {}) and now_s - beat.at_s > limits[beat.phase]:
            late.append(rank)
    return late


def examine(attempt: Attempt, late: list[int], limits: Mapping[str, float], started_s: float) -> Hang:
    """Have every rank write down its stacks, stopped ones too, and say which of the late ones holds up the others."""
    now_s, pulses = time.monotonic(), attempt.pulses()
    states = {rank: _state(note["pid"]) for rank, note in attempt.notes().items()}
    for rank, note in attempt.notes().items():
        if "exit" not in note:
            _show_stacks(attempt, rank, note)
    where = {rank: innermost(attempt.folder / f"rank-{rank}-stacks.log") for rank in states}

    def least_suspect(rank: int) -> tuple[Any, ...]:
        beat = pulses.get(rank, Pulse())
        waits = any(place in where.get(rank, "") for place in WAITING)
        return (states.get(rank) not in _ODD, waits, beat.step, beat.at_s, rank)

    rank = min(late, key=least_suspect)
    beat = pulses.get(rank, Pulse(at_s=started_s))
    state = states.get(rank, "never started")
    return Hang(rank, state, beat, now_s - beat.at_s, limits[beat.phase], where.get(rank, ""), pulses)


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
    pipe = attempt.folder / f"nccl-pipe-rank-{rank}.pipe"
    if pipe.is_fifo():  # NCCL's flight recorder answers with a file nccl-trace-rank-N
        with contextlib.suppress(OSError), open(pipe, "r+b", buffering=0) as trigger:
            trigger.write(b"1\n")


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
