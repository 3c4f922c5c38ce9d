"""When to save: every so many steps or minutes, at a new best, at a stop, at the end."""

import time
from collections.abc import Callable
from math import isfinite
from typing import Any

from toolkit.checkpoint import Checkpointer


class Checkpoints:
    """Saves through a `Checkpointer` on rank 0; the other ranks keep the same books.

    `first` is called before each save, for what must not be older than the checkpoint: a remote copy of the metrics.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        every_steps: int | None,
        every_min: float | None,
        metric: str | None,
        leads: bool,
        first: Callable[[], None] | None = None,
    ) -> None:
        self.first = first
        self.checkpointer, self.every_steps, self.metric, self.leads = checkpointer, every_steps, metric, leads
        self.every_s = every_min * 60 if every_min else float("inf")

    def start(self, trainer: Any) -> None:
        self.saved_s = time.monotonic()

    def overdue(self) -> bool:
        """This rank's wish to save because of the time; the ranks agree on it before anyone does."""
        return time.monotonic() - self.saved_s > self.every_s

    def after_step(self, trainer: Any, agreed: frozenset[str]) -> None:
        state = trainer.state
        score = trainer.report.get(self.metric) if self.metric else None
        if score is not None and not isfinite(score):
            score = None  # a nan would be the best for ever
        improved = score is not None and self._better(score, state.best)
        if improved:
            state.best = score
        due = self.every_steps and state.step % self.every_steps == 0
        if due or improved or agreed or trainer.finished:
            trainer.mean_loss()  # raises if it is no number: a model that is lost is not worth a checkpoint
            if self.leads:
                if self.first:
                    self.first()
                self.checkpointer.save(state, score)
            self.saved_s = time.monotonic()

    def end(self, trainer: Any) -> None:
        pass

    def _better(self, score: float, best: float | None) -> bool:
        return best is None or (score > best if self.checkpointer.mode == "max" else score < best)
