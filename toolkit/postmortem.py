"""postmortem.md: one page after a failure, with who failed first, of what, where, and what to do about it."""

import re
import signal
import socket
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from toolkit import oom, pulse, storage
from toolkit.deaths import killed
from toolkit.pulse import Pulse
from toolkit.run import Run

TAIL_LINES = 40

AGAIN = "the same command goes on from the newest checkpoint"


@dataclass(frozen=True)
class Failure:
    """What ended an attempt. `cause` is one line; `kind` and `step` tell whether it is the same as the one before."""

    who: str  # such as "rank 1 (pid 4711)"
    kind: str
    cause: str
    remedy: str
    pulse: Pulse
    rank: int | None = None
    host: str = field(default_factory=socket.gethostname)
    exit: int = 1
    blames_host: bool = False  # whether another machine might have been spared it
    lost: tuple[str, ...] = ()  # all nodes that are out of sight, if that is what failed
    pulses: Mapping[int, Pulse] = field(default_factory=dict)  # the last heartbeats of all, if known

    @property
    def line(self) -> str:
        return f"{self.who} {self.cause}"

    def comes_back(self, earlier: "Failure | None") -> bool:
        """Whether it is the same failure at the same place as an earlier one."""
        return earlier is not None and (self.kind, self.pulse.step) == (earlier.kind, earlier.pulse.step)


def page(failure: Failure, attempt: int, log: str, saved_step: int | None, then: str) -> str:
    """The whole page, in Markdown."""
    now_s, last = time.monotonic(), failure.pulse
    facts = {
        "first to fail": failure.who if failure.rank is None else f"rank {failure.rank}",
        "host": failure.host,
        "phase": last.phase,
        "step": f"{last.step} steps done",
        "newest checkpoint": "none yet" if saved_step is None else f"step {saved_step}",
        "when": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }
    parts = [
        f"# Attempt {attempt} failed",
        f"**{_escaped(failure.line)}**",
        _table(("", ""), facts.items()),
        f"What to do: {_escaped(failure.remedy)}.",
        f"What was done: {then}.",
    ]
    if failure.pulses:
        beats = [(rank, *beat[:2], f"{now_s - beat.at_s:.1f}") for rank, beat in sorted(failure.pulses.items())]
        parts += ["Last heartbeats:", _table(("rank", "phase", "steps done", "seconds ago"), beats)]
    return "\n\n".join([*parts, "The end of its log:", f"```\n{tail(log)}\n```"]) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def tail(log: str) -> str:
    """The last lines of a log, without what would end the block it stands in."""
    lines = log.replace("\r", "\n").rstrip().splitlines()[-TAIL_LINES:]
    return "\n".join(lines).replace("```", "'''") or "(it said nothing)"


def write(run: Run, text: str) -> None:
    """Put the page into the run, over that of an earlier failure. Raises OSError."""
    storage.write(run.at("postmortem.md"), text.encode())


def of_silent_end(status: Mapping[str, Any], identity: Mapping[str, Any]) -> str | None:
    """The page on an attempt that is dead though its status says that it runs: only the next start can write it.

    None if the last attempt ended in words. `identity`: who looks, for what can be seen on the same machine only.
    """
    if status.get("state") != "running":
        return None
    pid, here = status.get("pid"), status.get("host") == identity.get("host")
    evidence = oom.said_by_kernel(pid) if here and pid and status.get("boot_id") == identity.get("boot_id") else None
    if evidence:
        kind, cause, remedy = killed(signal.SIGKILL, f"the kernel's log says: {evidence}")
    else:
        kind, remedy = "silence", f"nothing, if somebody killed it; {AGAIN}"
        cause = (
            "ended without a word: it was killed (SIGKILL: by somebody, by a scheduler, or for want of memory), it was "
            "left by a second Ctrl-C, or the machine went down"
        )
    beat = Pulse(str(status.get("phase", "step")), int(status.get("step", 0)))
    who = f"attempt {status.get('attempt')} (pid {pid})"
    failure = Failure(who, kind, cause, remedy, beat, 0, str(status["host"]))
    saved = (status.get("checkpoint") or {}).get("step")
    said = f"its last heartbeat was at {status.get('heartbeat')}; it had no time to log more"
    return page(failure, int(status.get("attempt") or 0), said, saved, "this start goes on")


def of_exception(error: Exception, attempt: int, rank: int, saved_step: int | None) -> str:
    """The page on an exception in this process, for a run that has no supervisor."""
    failure = Failure(f"rank {rank}:", type(error).__name__, str(error), f"mend it; {AGAIN}", pulse.last(), rank)
    told = "".join(traceback.format_exception(error))
    return page(failure, attempt, told, saved_step, "the run has ended")


def first_line(message: str) -> str:
    return message.strip().split("\n")[0]


def _escaped(words: str) -> str:
    return re.sub(r"([*|<])", r"\\\1", words.replace("\n", "; "))
