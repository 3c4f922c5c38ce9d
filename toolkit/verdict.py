"""How an attempt ended, whose fault that was, and why: from what was seen of it to words."""

import re
from typing import NamedTuple

from toolkit import postmortem, watchdog
from toolkit.attempt import Attempt, Look
from toolkit.deaths import killed, of_the_machine
from toolkit.postmortem import AGAIN, Failure
from toolkit.pulse import Pulse
from toolkit.stacks import STOPPED

WELL = (0, 75)  # how ranks end of which nothing is wrong


class Outcome(NamedTuple):
    """How an attempt ended: the exit status, words for the user, and what failed if something did."""

    status: int
    message: str = ""
    failure: Failure | None = None


def in_words(attempt: Attempt, look: Look) -> Outcome:
    """How an attempt ended whose ranks have all said so; of those that failed, the first. A refusal (2) has the user's
    words, and is a failure, too, should this very job have trained before.
    """
    notes = look.notes
    failed = sorted((note["time_s"], rank) for rank, note in notes.items() if note.get("exit", 0) not in WELL)
    if failed:
        rank = failed[0][1]
        status, message = notes[rank]["exit"], notes[rank]["message"]
        if notes[rank]["blamed"] is not None:  # all say the same, at the same moment
            rank = notes[rank]["blamed"]
        beat = look.pulses.get(rank, Pulse())
        kind = re.sub(r"\d+", "N", postmortem.first_line(message))  # a pid is another each time
        failure = Failure(f"rank {rank}:", kind, message, f"mend it; {AGAIN}", beat, rank, look.host(rank),
                          blames_host=of_the_machine(message))  # fmt: skip
        return Outcome(2, message, failure) if status == 2 else _failed(failure)
    if len(notes) < attempt.processes:
        said = attempt.said_by_torchrun()[-2000:]
        cause = f"only {len(notes)} of {attempt.processes} ranks started; torchrun said:\n{said}"
        return _failed(Failure("torchrun:", "start", cause, "see what it said", Pulse()))
    if mute := [rank for rank, note in notes.items() if "exit" not in note]:
        cause = f"has ended with status {look.torchruns}, and rank {mute[0]} has not, nor said why"
        return _failed(Failure("torchrun", "end", cause, AGAIN, Pulse()))
    return Outcome(max(note["exit"] for note in notes.values()))


def of_death(attempt: Attempt, look: Look) -> Outcome:
    """A rank is dead and has left no word; or torchrun is, and the ranks have followed it."""
    rank = look.gone[0]
    death, host = attempt.death(rank), look.host(rank)
    kind, cause, remedy = killed(death.signal, death.evidence)
    if death.exit is not None:
        kind = f"exit {death.exit}"
        cause = f"ended with exit status {death.exit} and without a word: something in it has called os._exit"
        remedy = f"find out what; see its log, below; then {AGAIN}"
    if death.torchrun:
        who, beat = f"torchrun (pid {death.torchrun})", Pulse()
    else:
        who, beat = f"rank {rank} (pid {look.notes[rank]['pid']})", look.pulses.get(rank, Pulse())
    blamed = None if death.torchrun else rank
    return _failed(
        Failure(who, kind, cause, remedy, beat, blamed, host, blames_host=not death.evidence and death.exit is None)
    )


def of_lost(look: Look) -> Outcome:
    """A node is out of sight, with all its ranks."""
    host, cause = next(iter(look.lost.items()))
    beat = max(look.pulses.values(), key=lambda beat: beat.step, default=Pulse())
    remedy = f"if that was not you: ask the cluster's staff about node {host}; {AGAIN}"
    return _failed(Failure(f"node {host}", f"node {host}", cause, remedy, beat, None, host, blames_host=True,
                           lost=tuple(look.lost)))  # fmt: skip


def of_hang(hang: watchdog.Hang, look: Look) -> Outcome:
    phase = hang.pulse.phase
    cause = f"gave no sign of life for {hang.silent_s:.1f} s in phase {phase}, whose limit is {hang.limit_s:g} s: "
    cause += f"it is {hang.state}" + (f", at {hang.where}" if hang.where else "")
    remedy = f"read logs/*-stacks.log; if all is well and it only takes longer, raise launch.limits.{phase}_s"
    if hang.state == STOPPED:
        remedy = "somebody has stopped it (SIGSTOP, a debugger, a suspended machine); " + AGAIN
    who, kind, host = f"rank {hang.rank}", f"hang in {phase}", look.host(hang.rank)
    return _failed(Failure(who, kind, cause, remedy, hang.pulse, hang.rank, host, pulses=hang.pulses, blames_host=True))


def _failed(failure: Failure) -> Outcome:
    return Outcome(failure.exit, failure.line, failure)
