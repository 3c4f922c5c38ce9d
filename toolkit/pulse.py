"""The heartbeat of this process: what it does, at which step, since when. Whoever watches reads it from a small file.

    pulse.keep_in("attempt/rank-1.pulse")   # from now on, also for others to see
    pulse.beat("step", 120)                 # some work is done; costs a microsecond
    pulse.read("attempt/rank-1.pulse")      # from another process of this machine

A process has one heartbeat, as it has one pid, so this is a module and not an object to be passed around.
"""

import mmap
import struct
import time
from typing import NamedTuple

PHASES = ("start", "step", "evaluation", "save")
_LAYOUT = struct.Struct("<qqd")  # phase, step, time of the beat


class Pulse(NamedTuple):
    """The last beat. `at_s` is on the machine's monotonic clock, which all its processes share."""

    phase: str = "start"
    step: int = 0
    at_s: float = 0.0


_last = Pulse(at_s=time.monotonic())
_file: mmap.mmap | None = None


def keep_in(path: str) -> None:
    """Write this and every later beat into a file, through memory: no disk is waited for, and a kill loses nothing."""
    global _file  # noqa: PLW0603 - see above
    with open(path, "w+b") as file:
        file.truncate(_LAYOUT.size)
        _file = mmap.mmap(file.fileno(), _LAYOUT.size)
    beat(_last.phase)


def beat(phase: str, step: int | None = None) -> None:
    """Say that something has been done, and what comes now: one of PHASES. Without a step, at the step that was."""
    global _last  # noqa: PLW0603
    _last = Pulse(phase, _last.step if step is None else step, time.monotonic())
    if _file is not None:
        _LAYOUT.pack_into(_file, 0, PHASES.index(phase), _last.step, _last.at_s)


def last() -> Pulse:
    """This process's own."""
    return _last


def read(path: str) -> Pulse | None:
    """That of another process, or None if it has not begun yet."""
    try:
        with open(path, "rb") as file:
            content = file.read(_LAYOUT.size)
    except FileNotFoundError:
        return None
    if len(content) < _LAYOUT.size:
        return None
    phase, step, at_s = _LAYOUT.unpack(content)
    return Pulse(PHASES[phase], step, at_s) if at_s else None
