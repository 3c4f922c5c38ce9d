"""One line of metrics every few steps, at every save, and whenever an evaluation has something to say."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Line = Mapping[str, Any]


class Metrics:
    """Gives each line to every sink: the run's metrics.jsonl, the console.

    Other ranks than 0 have no sinks but take part in the sums. There is a line at each save, so that none averages over
    a resume: the losses before it are no more. `amend` adds to the line of a step what an evaluation says that the
    start before had broken off.
    """

    def __init__(
        self,
        every_steps: int,
        epoch_of: Callable[[int], int],
        sinks: Sequence[Callable[[Line], None]],
        saved_every_steps: int | None = None,
        counts: Callable[[], Line] = dict,
        amend: Callable[[int, Line], None] = lambda step, values: None,
    ) -> None:
        self.every_steps, self.epoch_of, self.sinks = every_steps, epoch_of, sinks
        self.saved_every_steps, self.counts, self.amend = saved_every_steps or every_steps, counts, amend

    def start(self, trainer: Any) -> None:
        self.since_s = time.monotonic()
        if trainer.report:
            self.amend(trainer.state.step, trainer.report)

    def after_step(self, trainer: Any) -> None:
        step = trainer.state.step
        due = step % self.every_steps == 0 or step % self.saved_every_steps == 0
        if not (due or trainer.report or trainer.agreed or trainer.finished):
            return
        loss = trainer.mean_loss()
        interval, now_s = trainer.interval, time.monotonic()
        line = {
            "step": step,
            "epoch": self.epoch_of(step),
            "train/loss": loss,
            "train/learning_rate": trainer.state.optimizer.param_groups[0]["lr"],
            "train/samples_per_s": round(
                interval.steps * trainer.global_batch_size / max(now_s - self.since_s - interval.elsewhere_s, 1e-9), 1
            ),
            **({"train/grad_norm": interval.norms[-1].item()} if interval.norms else {}),
            **trainer.report,
            **self.counts(),
            **({"events": events} if (events := interval.told()) else {}),
        }
        for sink in self.sinks:
            sink(line)
        interval.restart()
        self.since_s = time.monotonic()

    def end(self, trainer: Any) -> None:
        pass
