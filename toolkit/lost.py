"""The losses between two reports, and the steps among them that are lost: the loss or the gradient is no number, or the
gradient is far too large. `train.on_nan` says what is done about them: stop, skip or rollback.

After the reduction all ranks have the same gradient, so each judges its norm alone, on the device, and all judge alike.
What was judged is looked at when a report or a save is due: no step waits for a number.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan
from typing import Any

import torch
from torch import Tensor, nn

from toolkit import distributed
from toolkit.distributed import ALONE, Ranks
from toolkit.errors import RunError


@dataclass(frozen=True)
class Lost:
    """A lost step, counted from 1, and the number of the batch it took. `ranks` had a loss that is not finite."""

    step: int
    batch: int
    positions: tuple[int, int]  # of the batch in the stream, first and last
    ranks: tuple[int, ...]
    why: str
    skipped: bool  # it has changed nothing

    @property
    def rank(self) -> int | None:
        """The first whose own loss was not finite, if that can be told."""
        return self.ranks[0] if self.ranks else None

    def event(self, name: str, **more: Any) -> dict[str, Any]:
        """What a line of metrics says of it."""
        where = {"step": self.step, "rank": self.rank, "positions": list(self.positions)}
        return {"event": name, **where, **more, "why": self.why}


class LostLossError(RunError):
    """The loss or the gradient is not a number any more, or too large, in one of `steps`; in that of `lost`, if that is
    known.
    """

    def __init__(self, words: str, steps: range, lost: Lost | None = None) -> None:
        super().__init__(words)
        self.steps, self.lost, self.rank = steps, lost, lost.rank if lost else None


class Guard:
    """The policy. A gradient is lost if its L2 norm is not finite, or more than `spike_grad_norm`.

    `batch_number` says which batch of the stream a step takes.
    """

    def __init__(
        self,
        on_nan: str = "stop",
        spike_grad_norm: float | None = None,
        batch_number: Callable[[int], int] = lambda step: step,
    ) -> None:
        self.skips = on_nan == "skip"
        self.watches = on_nan != "stop" or spike_grad_norm is not None  # then the norm is taken, clipped or not
        self.limit = spike_grad_norm or inf
        self.batch_number = batch_number
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def lost(self, norm: Tensor) -> Tensor:
        """Whether gradients of these norms are lost, on the device."""
        return ~((norm < inf) & (norm <= self.limit))

    def before(self, model: nn.Module) -> None:
        """Keep what the forward pass of a step changes that may have to be skipped, such as running statistics."""
        if self.skips:
            training = (module for module in model.modules() if module.training)
            buffers = [buffer for module in training for buffer in module.buffers(recurse=False)]
            self._buffers = [(buffer, buffer.clone()) for buffer in buffers]

    @torch.no_grad()
    def allows(self, norms: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> bool:
        """Whether the optimizer may take its step, by the last of the norms. One that is to be skipped changes nothing,
        decided on the device.
        """
        if not self.skips:
            return True
        lost = self.lost(norms[-1])
        for buffer, before in self._buffers:
            buffer.copy_(torch.where(lost, before, buffer))
        # Fused kernels look at a flag on the device, as GradScaler has them do. The others must be told by the host,
        # which waits for the device then; so is the first step, which would leave SGD's momentum unwritten.
        if optimizer.state and getattr(optimizer, "_step_supports_amp_scaling", False):
            vars(optimizer).update(grad_scale=None, found_inf=lost.float())
            return True
        return not lost.item()


class Interval:
    """The losses of the steps since the last report, kept on the device, so that no step waits for a number."""

    def __init__(
        self, device: torch.device, global_batch_size: int, guard: Guard, ranks: Ranks = ALONE, scaled: bool = False
    ) -> None:
        self.dtype = torch.float32 if device.type == "mps" else torch.float64
        self.device, self.global_batch_size, self.guard, self.ranks = device, global_batch_size, guard, ranks
        self.scaled = scaled  # in fp16 a step whose gradient overflows is left out by the scaler, and nothing is lost
        self.restart()

    def restart(self) -> None:
        self.losses: list[Tensor] = []  # of this rank
        self.norms: list[Tensor] = []  # of the gradients, where they are taken
        self.events: list[dict[str, Any]] = []  # what the next line of metrics is to tell
        self.elsewhere_s = 0.0  # time that went into evaluation
        self._skipped: list[Lost] = []
        self._mean: float | None = None

    def add(self, loss: Tensor) -> None:
        """The sum of the losses of this rank's share of one global batch."""
        self.losses.append(loss)
        self._mean = None

    @property
    def steps(self) -> int:
        return len(self.losses)

    def told(self) -> list[dict[str, Any]]:
        """All events, as of the last `mean`."""
        return self.events + [lost.event("skip") for lost in self._skipped]

    def mean(self, done: int) -> float:
        """Mean loss of the global batches so far, without those that were skipped; nan if all were.

        Waits for the device, and for the other ranks: all must ask after the same step, of which `done` are done.
        Raises LostLossError on all of them if a step is lost that was not skipped.
        """
        if self._mean is None:
            self._mean = self._measured(done)
        return self._mean

    def _measured(self, done: int) -> float:
        flags = self.guard.lost(torch.stack(self.norms)) if self.norms and not self.scaled else None
        total = torch.zeros((), device=self.device)
        for at, loss in enumerate(self.losses):
            total += loss if flags is None or not self.guard.skips else torch.where(flags[at], 0.0, loss)
        whole = float(distributed.sum_over_ranks(total).item())
        lost = flags.tolist() if flags is not None else [False] * self.steps
        found = [] if isfinite(whole) and not any(lost) else self._found(lost, done - self.steps)
        self._skipped = [each for each in found if each.skipped]
        if fatal := next((each for each in found if not each.skipped), None):
            first, last = fatal.positions
            words = f"{fatal.why} (positions {first} to {last} of the stream)"
            raise LostLossError(words, range(fatal.step - 1, fatal.step), fatal)
        if not isfinite(whole):
            steps = range(done - self.steps, done)
            raise LostLossError(f"the loss is {whole} in the steps {steps.start + 1} to {steps.stop} together", steps)
        taken = self.steps - len(self._skipped)
        return whole / (self.global_batch_size * max(1, taken)) if taken or not self.steps else nan

    def _found(self, lost: list[bool], first: int) -> list[Lost]:
        """Every lost step since step `first`: those whose gradients are, and those in which some rank's loss is."""
        losses = torch.zeros(self.ranks.world_size, self.steps)
        losses[self.ranks.rank] = torch.stack(self.losses)
        distributed.sum_over_ranks(losses)  # each rank's row is its own
        found, size = [], self.global_batch_size
        for at in range(self.steps):
            ranks = tuple((~losses[:, at].isfinite()).nonzero().flatten().tolist())
            if ranks or lost[at]:
                batch = self.guard.batch_number(first + at)
                why = self._why(first + at + 1, ranks, losses[:, at], self.norms[at] if self.norms else None)
                positions = batch * size, batch * size + size - 1
                found.append(Lost(first + at + 1, batch, positions, ranks, why, self.guard.skips and lost[at]))
        return found

    def _why(self, step: int, ranks: tuple[int, ...], losses: Tensor, norm: Tensor | None) -> str:
        if ranks:
            whose = f"rank {ranks[0]}'s" if self.ranks.world_size > 1 else "the"
            others = f", as is that of {len(ranks) - 1} more" if len(ranks) > 1 else ""
            return f"{whose} loss is {losses[ranks[0]].item()} in step {step}{others}"
        if norm is not None and isfinite(norm.item()):
            limit = f"train.spike_grad_norm is {self.guard.limit:g}"
            return f"the gradient of step {step} has an L2 norm of {norm.item():.4g}; {limit}"
        return f"the gradient of step {step} is not finite, though the loss of every rank is"
