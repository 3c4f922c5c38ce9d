"""The one restart engine: starts the ranks of a run, watches them, ends all when one dies or hangs, says why, and
starts them again from the newest checkpoint. Never imports torch.
"""

import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from toolkit import node, postmortem, storage, watchdog
from toolkit.attempt import Attempt, Look
from toolkit.config import Job
from toolkit.console import say
from toolkit.lock import holder_of, newest_claim
from toolkit.logs import KeptLogs
from toolkit.postmortem import AGAIN, Failure
from toolkit.process import be_subreaper
from toolkit.run import Run
from toolkit.signals import StopSignals
from toolkit.standing import ENDS, asked_to_end, complained
from toolkit.verdict import WELL, Outcome, in_words, of_death, of_hang, of_lost

_POLL_S = 0.1
_SUSPENDED_S = 5.0  # between two looks, if all of this has stood still: nobody is late for that


def supervise(job: Job, words: Sequence[str], processes: int, environment: Mapping[str, str]) -> int:
    """Run `toolkit WORDS` on that many ranks of this machine and return the run's exit status. No process of it is left
    behind.
    """
    job.check_ranks(processes)
    signals = StopSignals(at_second_interrupt=_interrupt).listen()
    be_subreaper()
    try:
        return Supervisor(job, words, environment, signals, Here(processes)).run().status
    except KeyboardInterrupt:
        say(f"left at once; what came after the newest checkpoint is lost; {AGAIN}", error=True)
        return 1


def _interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a third one must not break off the end of the ranks
    raise KeyboardInterrupt


class Stopping(Protocol):
    """Whether this start of the run is to stop, and the signal that tells the ranks so."""

    @property
    def received(self) -> signal.Signals | None: ...


class Place(Protocol):
    """Where ranks can be started: this machine, or what a scheduler has given."""

    def attempt(self, folder: Path) -> Attempt:
        """A start of all ranks, to be made."""

    def after(self, failure: Failure, saved_step: int | None) -> "Consequence":
        """Draw the consequences of a failure; the newest checkpoint is that of `saved_step`."""


class Consequence(NamedTuple):
    """What a failure means for the next start: why there can be none, in words; or whether it will be spared what the
    failure came of, such as a bad node.
    """

    ends: str = ""
    mended: bool = False


class Here:
    """This machine, which is as good as before after each failure."""

    def __init__(self, processes: int) -> None:
        self.processes = processes

    def attempt(self, folder: Path) -> Attempt:
        return node.Node(folder, self.processes)

    def after(self, failure: Failure, saved_step: int | None) -> Consequence:
        return Consequence()


class _LastWords:
    """What the ranks have said of their end, and since when: torchrun may take half a minute to end the others."""

    GRACE_S, LEAVING_S, DYING_S = 5.0, 30.0, 10.0

    def __init__(self) -> None:
        self.failed_s = self.complete_s = self.ended_s = float("inf")

    def are_final(self, look: Look, processes: int) -> bool:
        """Whether nothing better is to be waited for."""
        now_s = time.monotonic()
        exits = [note["exit"] for note in look.notes.values() if "exit" in note]
        if any(status not in WELL for status in exits):
            self.failed_s = min(self.failed_s, now_s)
        if len(exits) == processes:
            self.complete_s = min(self.complete_s, now_s)
        if look.ended:
            self.ended_s = min(self.ended_s, now_s)
        return (
            (look.ended and len(exits) == len(look.notes))
            or now_s - self.failed_s > self.GRACE_S
            or now_s - self.complete_s > self.LEAVING_S
            or now_s - self.ended_s > self.DYING_S
        )

    def explain(self, death: Outcome) -> bool:
        """Whether a death came of what another rank had said before: it was killed for that, or gave up."""
        gave_up = death.failure is not None and death.failure.kind == signal.SIGABRT.name
        return time.monotonic() - self.failed_s > (0 if gave_up else self.GRACE_S / 2)


class Supervisor:
    """Attempt after attempt, until one ends well, or fails in a way that another start would not mend.

    What ranks are refused for at the first start is wrong, and nothing is written. If it `was_started` before, by the
    same command, it was right then: something around it has failed.
    """

    def __init__(
        self,
        job: Job,
        words: Sequence[str],
        environment: Mapping[str, str],
        stopping: Stopping,
        place: Place,
        was_started: bool = False,
    ) -> None:
        self.words, self.environment, self.stopping, self.place = words, environment, stopping, place
        self.was_started = was_started
        self.directory = Run(job.run.dir)
        self.limits = {name.removesuffix("_s"): limit for name, limit in job.launch.limits.model_dump().items()}
        self.max_restarts = job.launch.max_restarts
        self.restarts = 0  # since the newest checkpoint
        self.undead: list[str] = []  # what of the last attempt cannot be killed
        self.saved_step: int | None = None
        self.earlier: Failure | None = None
        self.failed_s: float | None = None  # when the last attempt failed, until the next has taken a step
        self.resumed_step: int | None = None

    def run(self) -> Outcome:
        """How the last attempt ended, whose exit status is that of the whole."""
        while True:
            with node.new_folder() as folder:
                outcome, goes_on = self._attempted(self.place.attempt(folder))
            if outcome.message:  # of the command, an error only if it ends with it
                say(outcome.message, error=not goes_on)
            if not goes_on:
                return outcome

    def _attempted(self, attempt: Attempt) -> tuple[Outcome, bool]:
        """(how one attempt ended, whether to start another)."""
        before: dict[str, Any] | None = None
        with complained():
            before = newest_claim(self.directory.at("lock"))
        logs = KeptLogs(self.directory, attempt.folder)
        try:
            attempt.start(self.words, self.environment)
            outcome = self._watched(attempt, logs, before)
        finally:
            self.undead = attempt.end()
        look = attempt.look()
        outcome = outcome or in_words(attempt, look)
        if outcome.status == 2 and not self.was_started:
            return outcome, False
        self.was_started = True
        number: int | None = (int(before["attempt"]) if before else 0) + 1  # unless the store says otherwise
        with complained():
            number = self._number(look, before)
        if number is not None:
            logs.finish(number)
        if outcome.failure is None or number is None:  # or the run is another's by now
            return outcome, False
        return self._recorded(attempt, look, number, outcome.failure)

    def _watched(self, attempt: Attempt, logs: KeptLogs, before: Mapping[str, Any] | None) -> Outcome | None:
        """Until the ranks have said how they ended, or one has died without a word or hangs; then how.

        A stop request is passed on once to every rank.
        """
        words, told = _LastWords(), False
        looked_s = since_s = time.monotonic()
        while True:
            since_s = since_s if time.monotonic() - looked_s < _SUSPENDED_S else time.monotonic()
            looked_s = time.monotonic()
            look = attempt.look()
            if self.stopping.received and not told:
                attempt.stop(self.stopping.received)
                told = True
            final = words.are_final(look, attempt.processes)
            if look.lost and not final:
                return of_lost(look)
            if look.gone:
                death = of_death(attempt, look)
                return None if words.explain(death) else death
            if final:
                return None
            if watchdog.overdue(look, attempt.processes, self.limits, since_s):
                return of_hang(watchdog.examine(attempt, look, self.limits, since_s), look)
            self._report_first_step(look)
            logs.keep(partial(self._claimed, look))
            time.sleep(_POLL_S)

    def _report_first_step(self, look: Look) -> None:
        """After a restart: say for how long the failure has kept the run from going on."""
        beat = look.pulses.get(0)
        if self.failed_s is None or beat is None or beat.phase == "start":
            return
        if self.resumed_step is None:
            self.resumed_step = beat.step
        elif beat.step > self.resumed_step:
            say(f"the first new step came {time.monotonic() - self.failed_s:.1f} s after the failure")
            self.failed_s = None

    def _number(self, look: Look, before: Mapping[str, Any] | None) -> int | None:
        """The number of this attempt among the run's; None if the run is somebody else's now, or was meanwhile."""
        claim = newest_claim(self.directory.at("lock"))
        latest = int(claim["attempt"]) if claim else 0
        if latest == (before or {"attempt": 0})["attempt"]:  # it came to nothing before it could claim the run
            return None if holder_of(self.directory.at("lock")) else latest + 1
        return self._claimed(look)

    def _claimed(self, look: Look) -> int | None:
        """The number under which this attempt holds the run, or None."""
        claim, leader = newest_claim(self.directory.at("lock")), look.notes.get(0)
        ours = claim and leader and (claim["pid"], claim["host"]) == (leader["pid"], leader["host"])
        return int(claim["attempt"]) if claim and ours else None

    def _recorded(self, attempt: Attempt, look: Look, number: int, failure: Failure) -> tuple[Outcome, bool]:
        """Write the page and the status of a failure, and decide whether to go on."""
        saved_step: int | None = None
        with complained():
            status = self.directory.status() or {}
            # This attempt may have ended in words, and then something of it has died.
            if status.get("attempt") != number or status.get("state") not in ENDS:
                self.directory.mark("failed", reason=failure.line, exit=failure.exit)
        with complained():
            saved_step = self.directory.newest_checkpoint()
        goes_on, then = self._decided(failure, saved_step)
        log = attempt.folder / f"rank-{failure.rank}.log"
        text = log.read_text(errors="replace") if log.exists() else ""
        text = attempt.said_by_torchrun() if failure.rank is None else text
        with complained():
            known = replace(failure, pulses=failure.pulses or look.pulses)
            postmortem.write(self.directory, postmortem.page(known, number, text, saved_step, then))
        self.earlier, self.saved_step, self.failed_s, self.resumed_step = failure, saved_step, time.monotonic(), None
        where = storage.shown(self.directory.at("postmortem.md"))
        return Outcome(failure.exit, f"{failure.line}\n{then}; more in {where}", failure), goes_on

    def _decided(self, failure: Failure, saved_step: int | None) -> tuple[bool, str]:
        """(whether to start again, words on what is done)."""
        progress = self.earlier is None or saved_step != self.saved_step
        self.restarts = 0 if progress else self.restarts
        ends, mended = self.place.after(failure, saved_step)
        if self.undead:
            left = ", ".join(self.undead)
            return False, f"not started again: {left} cannot be killed, and waits for a disk or device there"
        if self.stopping.received or asked_to_end(self.directory):
            return False, "not started again, for a stop was asked for"
        if ends:
            return False, f"not started again: {ends}"
        if not progress and failure.comes_back(self.earlier) and not mended:
            return False, "not started again: the same failure has come back with no new checkpoint in between"
        if self.restarts == self.max_restarts:
            return False, f"not started again: launch.max_restarts is {self.max_restarts}; {AGAIN}"
        self.restarts += 1
        begin = "from the beginning" if saved_step is None else f"from the checkpoint of step {saved_step}"
        return True, f"starting again {begin} (restart {self.restarts} of {self.max_restarts})"
