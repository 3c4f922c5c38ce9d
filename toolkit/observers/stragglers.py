"""Which rank holds up the others: the one that takes longest for what no rank can do for it, its batch and its forward.

A step ends for all at once, so its time says nothing of one rank. Not seen: a rank that is slow in its backward only,
and under FSDP forwards, in which ranks wait for each other.
"""

import time
from collections.abc import Callable, Sequence
from math import inf
from statistics import median_low
from typing import Any

import torch

from toolkit import distributed


class Stragglers:
    """Puts `train/slowest_rank` and `train/slowest_over_median` into lines of metrics of several ranks.

    `say` is told of a rank, once, that costs every step more than `WORTH_SAYING` of its time. The last of the
    observers: a rank's own time begins when all others are done.
    """

    WORTH_SAYING = 0.1

    def __init__(self, hosts: Sequence[str], say: Callable[[str], None]) -> None:
        self.hosts, self.say, self.told = hosts, say, -1
        self.trainer: Any = None

    def start(self, trainer: Any) -> None:
        if self.trainer is None and trainer.ranks.world_size > 1:
            # DDP waits for rank 0's buffers before it calls the model; in one that is compiled no mark can be set.
            model = trainer.state.model
            inner = trainer.model if getattr(model, "_compiled_call_impl", None) else model
            trainer.model.register_forward_pre_hook(self._batch_has_come)
            inner.register_forward_pre_hook(self._forward_begins)
            trainer.model.register_forward_hook(self._forward_ends)
        self.trainer, self.ranks = trainer, trainer.ranks
        self._restart()
        self.idle_since_s = inf  # ranks agree before the first batch, and wait for each other: it does not count

    def after_step(self, trainer: Any) -> None:
        self.idle_since_s = time.monotonic()

    def end(self, trainer: Any) -> None:
        pass

    def counts(self) -> dict[str, float]:
        """What the line of metrics says. To be called by every rank after the same step."""
        if self.ranks.world_size == 1:
            return {}
        own_s = self.own_s + sum(_between_s(*forward) for forward in self.forwards)
        steps = self.trainer.state.step - self.since_step
        times = distributed.from_all_ranks(own_s / steps)
        slowest, usual_s = max(range(len(times)), key=times.__getitem__), median_low(times)
        lost = (times[slowest] - usual_s) * steps / max(time.monotonic() - self.since_s, 1e-9)
        if lost > self.WORTH_SAYING and slowest != self.told:
            self.told = slowest
            self.say(
                f"WARNING: rank {slowest} on host {self.hosts[slowest]} holds up the others: it takes "
                f"{times[slowest]:.3g} s a step for its batch and forward, the median rank {usual_s:.3g} s"
            )
        self._restart()
        return {
            "train/slowest_rank": slowest,
            "train/slowest_over_median": round(times[slowest] / max(usual_s, 1e-9), 2),
        }

    def _restart(self) -> None:
        self.since_s = self.idle_since_s = time.monotonic()
        self.since_step, self.own_s = self.trainer.state.step, 0.0
        self.forwards: list[list[Any]] = []

    def _batch_has_come(self, *_: Any) -> None:
        if not self.trainer.evaluating:
            self.own_s += max(0.0, time.monotonic() - self.idle_since_s)

    def _forward_begins(self, *_: Any) -> None:
        if not self.trainer.evaluating:
            self.forwards.append([self._mark()])

    def _forward_ends(self, *_: Any) -> None:
        if self.trainer.evaluating:
            return
        self.forwards[-1].append(self._mark())
        self.idle_since_s = time.monotonic()

    def _mark(self) -> Any:
        """A moment on the device, which need not be waited for until somebody asks how long it was."""
        if self.trainer.device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between_s(start: Any, end: Any) -> float:
    return float(end - start if isinstance(end, float) else start.elapsed_time(end) / 1e3)
