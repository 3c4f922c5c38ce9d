"""Evaluate the validation set every so often, and the test set once, after the last step."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

Batches = Callable[[], Iterable[Any]]


class Evaluation:
    """Puts `val/…` and `test/…` into the step's report.

    `due` says whether the validation set's turn comes after a step. A stop breaks an evaluation off, and the next start
    makes up for it: `reported` gives the names in a step's line of metrics, none if there is no such line.
    """

    def __init__(
        self,
        due: Callable[[int], bool],
        val: Batches | None,
        test: Batches | None,
        reported: Callable[[int], Collection[str]] = lambda step: (),
    ) -> None:
        self.due, self.val, self.test, self.reported = due, val, test, reported

    def start(self, trainer: Any) -> None:
        sets = self._sets(trainer)
        names = self.reported(trainer.state.step) if sets else ()
        if names and not all(any(name.startswith(prefix) for name in names) for prefix in sets):
            self.after_step(trainer)

    def after_step(self, trainer: Any) -> None:
        sets = self._sets(trainer)
        if sets:
            trainer.mean_loss()  # raises if it is no number: a model that is lost is not worth an evaluation
        for prefix, batches in sets.items():
            if "stop" not in trainer.agreed:
                trainer.report |= {prefix + name: value for name, value in trainer.evaluate(batches()).items()}

    def end(self, trainer: Any) -> None:
        pass

    def _sets(self, trainer: Any) -> dict[str, Batches]:
        """What is to be evaluated after this step, by the prefix of its metrics."""
        val = self.val if trainer.finished or self.due(trainer.state.step) else None
        test = self.test if trainer.finished else None
        return {prefix: batches for prefix, batches in (("val/", val), ("test/", test)) if batches}
