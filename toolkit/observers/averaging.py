"""The average of the weights follows them, step by step."""

from typing import Any


class Averaging:
    """Updates the state's Ema after every step, on every rank. First of the observers, for the others use it."""

    def start(self, trainer: Any) -> None:
        pass

    def after_step(self, trainer: Any) -> None:
        trainer.state.ema.update(trainer.state.model)

    def end(self, trainer: Any) -> None:
        pass
