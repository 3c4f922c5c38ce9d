"""status.json says that the run is alive, how far it is, and how its saves went."""

import time
from collections.abc import Callable
from typing import Any

from toolkit.checkpoint import Checkpointer
from toolkit.run import Run


class Heartbeat:
    """Tells the run where training is; the run writes it down every few seconds. Raises RunError once another attempt
    has taken over. On rank 0. `say` gets a line when status or metrics cannot be written, and when they can again.
    """

    PERIOD_S = 0.5

    def __init__(
        self,
        run: Run,
        epoch_of: Callable[[int], int],
        checkpointer: Checkpointer,
        say: Callable[[str], None] = print,
    ) -> None:
        self.run, self.epoch_of, self.checkpointer, self.say = run, epoch_of, checkpointer, say
        self.problem: str | None = None
        self.next_s = 0.0

    def start(self, trainer: Any) -> None:
        self.run.set_status("running", reason=None, exit=None, **self._progress(trainer))

    def after_step(self, trainer: Any) -> None:
        now_s = time.monotonic()
        if now_s < self.next_s:
            return
        self.next_s = now_s + self.PERIOD_S
        if self.run.lock:
            self.run.lock.raise_if_lost()
        if self.problem != self.run.problem:
            self.problem = self.run.problem
            self.say(
                f"WARNING: {self.problem}; training goes on" if self.problem else "status and metrics are written again"
            )
        self.run.progress(**self._progress(trainer))

    def _progress(self, trainer: Any) -> dict[str, Any]:
        step, saver = trainer.state.step, self.checkpointer
        return {
            "step": step,
            "total": trainer.total_steps,
            "epoch": self.epoch_of(step),
            "checkpoint": {
                "step": saver.saved_step,
                "took_s": round(saver.took_s, 3),
                "stalled_s": round(saver.stalled_s, 4),
                "failures": saver.failures,
                "failure": saver.failure,
            },
            "problem": self.run.problem,
        }

    def end(self, trainer: Any) -> None:
        self.run.progress(**self._progress(trainer))
