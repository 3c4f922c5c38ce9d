"""When to save: every so many steps or minutes, at a new best, when asked, at a stop, at the end."""

import time
from collections.abc import Callable
from math import isfinite
from typing import Any

from toolkit import pulse
from toolkit.checkpoint import Checkpointer
from toolkit.errors import RunError


class Checkpoints:
    """Saves through a `Checkpointer` on every rank.

    `before_commit` is called before a checkpoint becomes one, for what must not be older than it: a remote copy of the
    metrics. `asked` says whether somebody wants a save now. `say` gets a line for each save that failed;
    `on_error="stop"` makes the first of them the end of the run.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        every_steps: int | None = None,
        every_min: float | None = None,
        metric: str | None = None,
        on_error: str = "continue",
        asked: Callable[[], bool] = lambda: False,
        before_commit: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda words: None,
    ) -> None:
        self.checkpointer, self.every_steps, self.metric = checkpointer, every_steps, metric
        self.every_s = every_min * 60 if every_min else float("inf")
        self.stops_on_error, self.before_commit, self.say = on_error == "stop", before_commit, say
        self.asked = asked
        self.failures = 0
        self.tried_step: int | None = None
        self.started_s = time.monotonic()

    def start(self, trainer: Any) -> None:
        score, improved = self._judged(trainer)
        if improved:  # an evaluation that the start before had broken off
            self._save(trainer, score)

    def wanted(self) -> bool:
        """This rank's wish to save now: the time is up, or somebody has asked; the ranks agree on it first."""
        asked = self.asked() and not self.checkpointer.saving
        return asked or time.monotonic() - self.started_s > self.every_s

    def broken(self) -> bool:
        """This rank's wish to stop, because a save has failed and the job says that this ends the run."""
        return self.stops_on_error and self.checkpointer.failures > 0

    def after_step(self, trainer: Any) -> None:
        state, saver = trainer.state, self.checkpointer
        if self.tried_step is None:
            self.tried_step = 0
            saver.prepare(state)  # now the optimizer has its moments, and no save has waited for memory yet
        self._report()
        score, improved = self._judged(trainer)
        due = self.every_steps and state.step % self.every_steps == 0
        if due or improved or trainer.agreed or trainer.finished:
            self._save(trainer, score)

    def save_first(self, trainer: Any) -> None:
        """Save before the first step, and wait: for a run that begins with weights from elsewhere."""
        self._save(trainer, None)
        self.end(trainer)

    def _judged(self, trainer: Any) -> tuple[float | None, bool]:
        """(the score of this step's evaluation if there was one, whether it is the best so far)."""
        score = trainer.report.get(self.metric) if self.metric else None
        if score is None or not isfinite(score):  # a nan would be the best for ever
            return None, False
        improved = self._better(score, trainer.state.best)
        if improved:
            trainer.state.best = score
        return score, improved

    def _save(self, trainer: Any, score: float | None) -> None:
        pulse.beat("save")
        trainer.mean_loss()  # raises if it is no number: a model that is lost is not worth a checkpoint
        trainer.check_weights()  # as well
        self.checkpointer.save(trainer.state, score, self.before_commit)
        self.tried_step, self.started_s = trainer.state.step, time.monotonic()

    def end(self, trainer: Any) -> None:
        """Wait for the last save. Raises RunError if the run's last step is not safe, or a failure was to end it."""
        pulse.beat("save")
        self.checkpointer.wait()
        self._report()
        if self.broken() and not self.checkpointer.failure:
            raise RunError(
                f"{self.checkpointer.reasons[-1]}; checkpoint.on_error is stop; the same command goes on from here"
            )
        if self.checkpointer.failure:
            kept = self.checkpointer.saved_step
            since = (
                f"the newest checkpoint is that of step {kept}" if kept is not None else "none was saved by this start"
            )
            raise RunError(f"{self.checkpointer.failure}; {since}; the same command goes on from the newest there is")

    def counts(self) -> dict[str, int]:
        """What lines of metrics say of saves: how many have failed, if any has."""
        return {"checkpoint/failures": self.checkpointer.failures} if self.checkpointer.failures else {}

    def _report(self) -> None:
        """Say of each save that has failed that it has, once."""
        while self.failures < self.checkpointer.failures:
            self.say(f"WARNING: {self.checkpointer.reasons[self.failures]}; older ones are as they were")
            self.failures += 1

    def _better(self, score: float, best: float | None) -> bool:
        mode = self.checkpointer.archive.policy.mode
        return best is None or (score > best if mode == "max" else score < best)
