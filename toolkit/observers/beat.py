"""This rank's heartbeat, for whoever watches it from outside."""

from typing import Any

from toolkit import pulse


class Beat:
    """Says after every step that it is done. Last of the observers: evaluations and saves beat for themselves."""

    def start(self, trainer: Any) -> None:
        pulse.beat("step", trainer.state.step)

    def after_step(self, trainer: Any) -> None:
        pulse.beat("step", trainer.state.step)

    def end(self, trainer: Any) -> None:
        pass
