"""status.json says that the run is alive and how far it is."""

import time
from typing import Any

from toolkit.run import Run


class Heartbeat:
    """Rewrites status.json every `PERIOD_S`, on rank 0."""

    PERIOD_S = 5.0

    def __init__(self, run: Run, steps_per_epoch: float) -> None:
        self.run, self.steps_per_epoch = run, steps_per_epoch

    def start(self, trainer: Any) -> None:
        self._beat(trainer, durable=True)

    def after_step(self, trainer: Any, agreed: frozenset[str]) -> None:
        if time.monotonic() >= self.next_s:
            self._beat(trainer, durable=False)

    def _beat(self, trainer: Any, durable: bool) -> None:
        step = trainer.state.step
        self.run.set_status(
            "running", durable, step=step, total=trainer.total_steps, epoch=int(step / self.steps_per_epoch)
        )
        self.next_s = time.monotonic() + self.PERIOD_S

    def end(self, trainer: Any) -> None:
        pass
