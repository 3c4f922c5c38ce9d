"""Evaluate the validation set every so often, and the test set once, after the last step."""

from collections.abc import Callable, Iterable
from typing import Any

Batches = Callable[[], Iterable[Any]]


class Evaluation:
    """Puts `val/…` and `test/…` into the step's report.

    `due` says whether the validation set's turn comes after a step.
    """

    def __init__(self, due: Callable[[int], bool], val: Batches | None, test: Batches | None) -> None:
        self.due, self.val, self.test = due, val, test

    def start(self, trainer: Any) -> None:
        pass

    def after_step(self, trainer: Any, agreed: frozenset[str]) -> None:
        if self.val and (trainer.finished or self.due(trainer.state.step)):
            trainer.report |= {f"val/{name}": value for name, value in trainer.evaluate(self.val()).items()}
        if self.test and trainer.finished:
            trainer.report |= {f"test/{name}": value for name, value in trainer.evaluate(self.test()).items()}

    def end(self, trainer: Any) -> None:
        pass
