"""The loop. `fit` is all of training: next batch, step, what the ranks agreed on, stop. Everything else is an observer.

trainer = Trainer(model, task, optimizer, schedule, device=device, total_steps=1000, global_batch_size=256)
trainer.fit(batches, observers)
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import inf
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from toolkit import distributed, pulse
from toolkit.agreement import Agreement
from toolkit.distributed import Ranks
from toolkit.lost import Guard, Interval, LostLossError
from toolkit.randomness import derive, seed_everything

Schedule = Callable[[int], float]


@dataclass
class State:
    """The whole truth about progress, and all that a checkpoint holds.

    Order, dropout and learning rate follow from `step`.
    """

    derived: ClassVar = frozenset({"lr", "initial_lr"})  # in the optimizer's groups: it is the job that names these
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    best: float | None = None
    ema: Any = None  # an optim.Ema, which this module need not know, or None
    skipped: list[int] = field(default_factory=list)  # batches of the stream that are left out, by number, sorted


class Observer(Protocol):
    """Something that happens beside the loop: a report, a save, an evaluation.

    Every rank has the same observers, in the same order.
    """

    def start(self, trainer: "Trainer") -> None: ...

    def after_step(self, trainer: "Trainer") -> None: ...

    def end(self, trainer: "Trainer") -> None: ...


class Trainer:
    """Trains `model`: the gradient is that of the mean loss over the global batch, at any number of ranks.

    `task` has the `loss` and `metrics` of toolkit/tasks.py. Learning rates are those that the optimizer comes with,
    times `schedule(step)`. A step is a list of micro-batches, each with `input`, `target` and `indices`: this rank's
    share of a global batch. Where there is a process group, the model is wrapped in DDP, unless it is sharded, and
    `ranks` default to the group's. With its `state` from a checkpoint it goes on as it would have: what is random
    follows from (seed, step, rank).
    """

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        *,
        device: torch.device,
        total_steps: int,
        global_batch_size: int,
        ranks: Ranks | None = None,
        seed: int = 0,
        precision: str = "fp32",
        clip_grad_norm: float | None = None,
        ema: Any = None,
        eval_precision: str | None = None,
        guard: Guard | None = None,
        grad_compression: str | None = None,
    ) -> None:
        scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.state = State(model, optimizer, scaler, ema=ema)
        self.model = distributed.wrap(model, device, grad_compression)
        self.task, self.schedule, self.guard = task, schedule, guard or Guard()
        self.device, self.ranks, self.seed = device, ranks or distributed.current(), seed
        self.total_steps, self.global_batch_size, self.clip_grad_norm = total_steps, global_batch_size, clip_grad_norm
        self.autocast, self.eval_autocast = (_autocast(device, p) for p in (precision, eval_precision or precision))
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.interval = Interval(device, global_batch_size, self.guard, self.ranks, scaler.is_enabled())
        self.evaluating, self.output_shape = False, torch.Size()
        self.agreement, self.agreed = Agreement(self.ranks, {}), frozenset[str]()
        self.report: dict[str, float] = {}  # what this step has to say beside its losses, such as val/accuracy

    @property
    def finished(self) -> bool:
        return self.state.step >= self.total_steps

    def fit(
        self, steps: Iterable[Sequence[Any]], observers: Sequence[Observer] = (), agreement: Agreement | None = None
    ) -> None:
        """Take every step, or those before the ranks agree to stop."""
        self.agreement = agreement or self.agreement
        _train_mode(self.model)
        for observer in observers:
            observer.start(self)
        self.agreed |= self.agreement.reached()  # a stop may have come while everything was made
        feed = iter(steps)
        while "stop" not in self.agreed and (micro_batches := next(feed, None)):
            self.step(micro_batches)
            self.agreed = self.agreement.reached()
            for observer in observers:
                observer.after_step(self)
        for observer in observers:
            observer.end(self)

    def step(self, micro_batches: Sequence[Any]) -> None:
        """One optimizer step on this rank's share of one global batch."""
        optimizer, scaler = self.state.optimizer, self.state.scaler
        self.report = {}
        factor = self.schedule(self.state.step)
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        self.guard.before(self.state.model)
        self.backward(micro_batches)
        if self.clip_grad_norm or self.guard.watches:
            scaler.unscale_(optimizer)
            self.interval.norms.append(self._clip(self.clip_grad_norm or inf))
        if self.guard.allows(self.interval.norms, optimizer):
            scaler.step(optimizer)
        scaler.update()
        for parameter in self.parameters:
            parameter.grad = None
        self.state.step += 1

    def backward(self, micro_batches: Sequence[Any]) -> None:
        """Leave in the parameters the gradient of the global batch's mean loss, the same on every rank."""
        seed_everything(derive(self.seed, self.state.step, self.ranks.rank), self.device)
        sums, weight_sums = [], []
        for place, batch in enumerate(micro_batches, 1):
            with distributed.without_sync(self.model, skip=place < len(micro_batches)):
                with self.autocast:
                    output = self.model(batch.input)
                    self.output_shape = output.shape  # before the loss: it is asked for when the loss fails
                    losses = self.task.loss(output, batch.target)
                if isinstance(losses, tuple):
                    losses, weights = losses
                    losses = losses * weights
                    weight_sums.append(weights.sum())
                # Each sample's part in the mean, times the ranks, by which DDP and FSDP will divide.
                part = torch.full_like(losses, self.ranks.world_size / self.global_batch_size)
                self.state.scaler.scale(losses).backward(part)
                sums.append(losses.detach().sum())
        total = sums[0] if len(sums) == 1 else torch.stack(sums).sum()
        if weight_sums:
            total = total * self._over_weights(torch.stack(weight_sums).sum())
        self.interval.add(total)

    def _over_weights(self, weight: Tensor) -> Tensor:
        """Make the gradient that of the mean over weights, whose sum takes all ranks. Returns the factor."""
        factor = self.global_batch_size / distributed.sum_over_ranks(weight)
        for gradient in self._gradients():
            gradient.mul_(factor)
        return factor

    def _gradients(self) -> list[Tensor]:
        """What this rank holds of the gradients."""
        return [distributed.local(parameter.grad) for parameter in self.parameters if parameter.grad is not None]

    def _clip(self, largest: float) -> Tensor:
        """`torch.nn.utils.clip_grad_norm_` in half its time; only measured if `largest` is infinite.

        Returns the norm before, on the device.
        """
        gradients = self._gradients()
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if distributed.is_sharded(self.model):
            norm = distributed.sum_over_ranks(norm.square()).sqrt()
        if largest < inf:
            torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def mean_loss(self) -> float:
        """The mean loss of the steps since the last report, the same on every rank; see `Interval.mean`.

        Raises LostLossError if a step is lost, unless it was skipped.
        """
        return self.interval.mean(self.state.step)

    def check_weights(self) -> None:
        """Raises LostLossError on every rank if a weight is no number: a gradient was none though the loss was."""
        weights = [distributed.local(weight.detach()) for weight in self.parameters]
        held = [weight for weight in weights if weight.numel()]  # a rank may have no share of a small one
        norms = torch._foreach_norm([*held, torch.zeros(1, device=self.device)], inf)
        lost = distributed.sum_over_ranks((~torch.stack(norms).isfinite()).any().float())
        if lost.item():
            step = self.state.step
            words = f"a weight is no finite number after step {step}, though every loss was: a gradient has been none"
            raise LostLossError(words, range(step - max(1, self.interval.steps), step))

    def rehearse(self, micro_batches: Sequence[Any]) -> None:
        """One forward and backward whose result is thrown away; the state is as it was.

        DDP orders its buckets by the first backward, so without this a resumed first step would sum in another order
        than an undisturbed one. It also compiles, and finds wrong shapes and too little memory before anything is
        written.
        """
        _train_mode(self.model)
        buffers = [(buffer, buffer.clone()) for buffer in self.state.model.buffers()]
        self.backward(micro_batches)
        for parameter in self.parameters:
            parameter.grad = None
        for buffer, before in buffers:
            buffer.copy_(before)
        self.interval.restart()

    def evaluate(self, steps: Iterable[Sequence[Any]]) -> dict[str, float]:
        """The task's metrics over a whole set: sums over all samples of all ranks, divided once at the end.

        Of the averaged weights, if the state has them. Nothing is returned if the ranks agree to stop meanwhile.
        """
        model, started_s, asking = self.state.model, time.monotonic(), self.agreement.afresh()
        distributed.same_buffers(model)
        model.eval()
        self.evaluating = True  # for words, if it fails
        sums: dict[str, Tensor] = {}
        averaged = self.state.ema.applied(model) if self.state.ema else nullcontext()
        with averaged, torch.inference_mode():
            for batch in (batch for step in steps for batch in step):
                pulse.beat("evaluation")
                if "stop" in asking.reached():
                    self.agreed |= {"stop"}
                    break
                with self.eval_autocast:
                    output = model(batch.input)
                for name, (numerator, denominator) in self.task.metrics(output, batch.target).items():
                    total = sums.setdefault(name, torch.zeros(2, dtype=self.interval.dtype, device=self.device))
                    if len(batch.indices):
                        total[0] += numerator
                        total[1] += denominator
        distributed.reshard(model)
        _train_mode(model)
        self.evaluating = False
        self.interval.elsewhere_s += time.monotonic() - started_s
        if "stop" in self.agreed:
            return {}
        return {
            name: ratio[0] / ratio[1]
            for name in sorted(sums)
            for ratio in [distributed.sum_over_ranks(sums[name]).tolist()]
        }


def _train_mode(model: nn.Module) -> None:
    """Train mode, but for modules with buffers in parts whose parameters are all frozen: frozen means nothing changes.

    So a frozen batch norm normalises as in evaluation. Modules without buffers, such as dropout, train on.
    """
    model.train()
    for part in model.modules():
        parameters = [*part.parameters()]
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            for module in part.modules():
                if any(True for _ in module.buffers(recurse=False)):
                    module.eval()


def _autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)
