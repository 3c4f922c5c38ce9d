"""Ranks that hang: found by their heartbeats, made to show where they are, and named."""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from toolkit.attempt import Attempt, Look, Where
from toolkit.pulse import Pulse
from toolkit.stacks import STOPPED, STUCK

# The innermost Python frame of a rank that waits for others: it is not the one that holds them up.
WAITING = ("torch/distributed/", "torch/autograd/graph.py", "toolkit/agreement.py")


class Hang(NamedTuple):
    """A rank that has given no sign of life for longer than its phase may take."""

    rank: int
    state: str  # in words: stopped, waiting for a disk, …
    pulse: Pulse
    silent_s: float
    limit_s: float
    where: str  # the innermost line of Python of its main thread
    pulses: Mapping[int, Pulse]  # of all ranks, before a stopped one went on to show its stacks


def overdue(look: Look, processes: int, limits: Mapping[str, float], since_s: float) -> list[int]:
    """The ranks whose last heartbeat is older than its phase's limit; one that never came counts from `since_s`, and so
    does one that came before. A rank that has come later than one within its own limit waits for that, and is not late.
    """
    beats, now_s = _beats(look, processes, since_s), time.monotonic()
    late = [rank for rank, beat in beats.items() if now_s - beat.at_s > limits[beat.phase]]
    oldest_in_time_s = min((beat.at_s for rank, beat in beats.items() if rank not in late), default=now_s)
    return [rank for rank in late if beats[rank].at_s <= oldest_in_time_s]


def _beats(look: Look, processes: int, since_s: float) -> dict[int, Pulse]:
    """The last heartbeats of all ranks that have not left their last word."""
    ranks = [rank for rank in range(processes) if "exit" not in look.notes.get(rank, {})]
    beats = {rank: look.pulses.get(rank, Pulse()) for rank in ranks}
    return {rank: beat._replace(at_s=max(beat.at_s, since_s)) for rank, beat in beats.items()}


def examine(attempt: Attempt, look: Look, limits: Mapping[str, float], since_s: float) -> Hang:
    """Have every rank show where it is, and say which holds up the others: it may have given its last sign of life just
    after them.
    """
    now_s, beats, places = time.monotonic(), _beats(look, attempt.processes, since_s), attempt.where()
    nowhere = Where("never started")

    def least_suspect(rank: int) -> tuple[Any, ...]:
        beat, place = beats[rank], places.get(rank, nowhere)
        waits = any(part in place.line for part in WAITING)
        return (place.state not in (STOPPED, STUCK), waits, beat.step, beat.at_s, rank)

    rank = min(beats, key=least_suspect)
    beat, place = beats[rank], places.get(rank, nowhere)
    return Hang(rank, place.state, beat, now_s - beat.at_s, limits[beat.phase], place.line, beats)
