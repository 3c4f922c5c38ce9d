"""When a job must stop to be saved in time: its end as Slurm has it, less what a save takes as measured."""

import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from toolkit.console import say
from toolkit.signals import StopSignals

LOOK_S = 10.0  # between two looks at how long saves and steps take
ASK_S = 600.0  # between two questions to Slurm: somebody may have given the job more time
SAFETY, SLACK_S, REACTION_S = 3.0, 5.0, 1.0  # the ranks agree on a stop within a second, or a step


class Deadline:
    """Whether it is time to stop, for a supervisor (see `supervisor.Stopping`).

    A time limit is a deadline; Slurm's warning of it only says that it is worth a look. A preemption shows as an end
    that has come near. TERM and INT are meant as they are.
    """

    def __init__(
        self,
        signals: StopSignals,
        ends_at_s: Callable[[], float | None],
        status: Callable[[], Mapping[str, Any]],
        lead_s: float,
    ) -> None:
        self.signals, self.ends_at_s, self.status, self.lead_s = signals, ends_at_s, status, lead_s
        self.started_s = time.time()
        self.end_s: float | None = None
        self.preempted = False  # whether the end has come nearer than it was
        self.save_s: float | None = None  # how long the last save took
        self.step_s = 0.0
        self._warned: signal.Signals | None = None
        self._found: signal.Signals | None = None
        self._wake = threading.Event()
        self._progress: tuple[float, int] | None = None

    def listen(self) -> "Deadline":
        """Begin to look."""
        threading.Thread(target=self._look, name="toolkit-deadline", daemon=True).start()
        return self

    @property
    def received(self) -> signal.Signals | None:
        """The signal that tells the ranks to stop, once it is time."""
        if self._found:
            return self._found
        number = self.signals.received
        if number in (signal.SIGUSR1, signal.SIGUSR2):
            self.signals.received = None
            self.warn(number)
        elif number:
            self._found = number
        if not self._found and self.end_s is not None and time.time() > self.end_s - self.margin_s():
            self._found = self._warned or signal.SIGUSR2
        if self._found:
            left = "" if self.end_s is None else f", {self.end_s - time.time():.0f} s before the job's end"
            say(f"told to stop ({self._found.name}{left}): saving")
        return self._found

    def warn(self, number: signal.Signals) -> None:
        """The scheduler has sent a signal, here or to a node."""
        self._warned = number
        self._wake.set()

    def margin_s(self) -> float:
        """How long before the end to stop: what stopping and saving take, thrice; until that is known, the lead."""
        if self.save_s is None:
            margin_s = self.lead_s
        else:
            margin_s = SAFETY * (self.save_s + max(self.step_s, REACTION_S)) + SLACK_S
        whole_s = (self.end_s or 0) - self.started_s
        return min(margin_s, max(whole_s, 0) / 2)  # or a short job would do nothing but stop

    def _look(self) -> None:
        asked_s = float("-inf")
        while True:
            warned = self._wake.is_set()
            self._wake.clear()
            if warned or time.monotonic() - asked_s > ASK_S:
                end_s = self.ends_at_s()
                asked_s = time.monotonic()
                self.preempted |= bool(end_s and self.end_s and end_s < self.end_s - 1)
                self.end_s = end_s if end_s is not None else self.end_s
                if warned and end_s is None:
                    self._found = self._warned  # nobody can say how much time is left
            self._measure()
            self._wake.wait(LOOK_S)

    def _measure(self) -> None:
        status = self.status()
        if (status.get("checkpoint") or {}).get("step") is not None:
            self.save_s = float(status["checkpoint"]["took_s"]) + float(status["checkpoint"]["stalled_s"])
        now_s, step = time.monotonic(), int(status.get("step") or 0)
        if self._progress and step == self._progress[1]:
            return  # it takes longer than from one look to the next
        if self._progress and step > self._progress[1]:
            self.step_s = (now_s - self._progress[0]) / (step - self._progress[1])
        self._progress = (now_s, step)
