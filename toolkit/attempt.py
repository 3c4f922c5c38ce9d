"""One start of all ranks of a run, as its supervisor sees it: on this machine (`Node`) or many (`cluster.Step`)."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals
from typing import Any, NamedTuple, Protocol

from toolkit.pulse import Pulse

Note = Mapping[str, Any]


class Death(NamedTuple):
    """What a rank has died of: a signal, if that is known, and evidence that it was for want of memory; or its own exit
    status, of which it has said nothing.

    `torchrun` is the pid of the torchrun that had started it, if that was killed instead, and the rank with it.
    """

    signal: int | None
    evidence: str | None = None
    torchrun: int | None = None
    exit: int | None = None


class Where(NamedTuple):
    """The state of a rank's process, in words, and the innermost line of Python of its main thread."""

    state: str
    line: str = ""


@dataclass(frozen=True)
class Look:
    """What can be seen of the ranks at one moment."""

    notes: Mapping[int, Note] = field(default_factory=dict)  # pid; at its end exit, message, time_s, blamed; host
    pulses: Mapping[int, Pulse] = field(default_factory=dict)  # last heartbeats, on this machine's monotonic clock
    gone: Sequence[int] = ()  # ranks that have died without a word
    torchruns: Sequence[int | None] = ()  # the exit status of each node's torchrun; None while it runs
    lost: Mapping[str, str] = field(default_factory=dict)  # nodes that cannot be seen any more, and why
    places: Mapping[int, str] = field(default_factory=dict)  # the node of each rank, where there are several

    @property
    def ended(self) -> bool:
        """Whether torchrun has ended: everywhere, or somewhere with a failure, for which the others may wait long."""
        return bool(self.torchruns) and (None not in self.torchruns or any(self.torchruns))

    def host(self, rank: int) -> str:
        """The node that a rank is on, by the scheduler's name for it; nothing if it has never come."""
        return self.places.get(rank) or str(self.notes.get(rank, {}).get("host", ""))

    def encoded(self) -> dict[str, Any]:
        """As plain data that another machine can read, whose clock is another."""
        now_s, wall_s = time.monotonic(), time.time()
        return {
            "notes": [(rank, _later(note, -wall_s)) for rank, note in self.notes.items()],
            "pulses": [(rank, beat.phase, beat.step, now_s - beat.at_s) for rank, beat in self.pulses.items()],
            "gone": list(self.gone),
            "torchruns": list(self.torchruns),
        }

    @classmethod
    def decoded(cls, data: Mapping[str, Any]) -> "Look":
        """What another machine has seen just now."""
        now_s, wall_s = time.monotonic(), time.time()
        notes = {rank: _later(note, wall_s) for rank, note in data["notes"]}
        pulses = {rank: Pulse(phase, step, now_s - age_s) for rank, phase, step, age_s in data["pulses"]}
        return cls(notes, pulses, data["gone"], data["torchruns"])


def _later(note: Note, by_s: float) -> Note:
    """A note whose end, if it tells of one, is that much later."""
    return {**note, "time_s": note["time_s"] + by_s} if "time_s" in note else note


class Attempt(Protocol):
    """Ranks that are started together, looked at, and ended together."""

    folder: Path  # what the ranks and torchrun say is in *.log here
    processes: int  # on all nodes

    def start(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        """`toolkit WORDS` on every rank."""

    def look(self) -> Look:
        """What can be seen now."""

    def stop(self, number: Signals) -> None:
        """Send every rank a signal once, also one that has yet to start."""

    def death(self, rank: int) -> Death:
        """Of what a rank died that has left no word."""

    def where(self) -> dict[int, Where]:
        """Have every rank write its stacks to its log, stopped ones too, and say where each of them is."""

    def said_by_torchrun(self) -> str:
        """The log of the torchrun that failed first, or of any."""

    def end(self) -> list[str]:
        """Kill whatever is left. Returns, in words, what even so does not end: it is in the kernel's hands."""
