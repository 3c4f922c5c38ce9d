"""Optimizers and learning-rate schedules by name; which weights are trained, and their moving average.

An own optimizer is called as `Optimizer(params, **args)`, an own schedule as `schedule(step, total_steps, **args)`: it
returns the factor of the learning rate for the step numbered `step`, 0 to total_steps - 1. A schedule is a function of
the step, so it has no state to save.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import cos, isfinite, pi, sqrt
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from toolkit import components
from toolkit.errors import JobError
from toolkit.patterns import matched

OPTIMIZERS = {
    "adam": "torch.optim:Adam",
    "adamw": "torch.optim:AdamW",
    "sgd": "torch.optim:SGD",
}

SCHEDULES = {
    "constant": "toolkit.optim:constant",
    "cosine": "toolkit.optim:cosine",
    "cosine_restarts": "toolkit.optim:cosine_restarts",
    "linear": "toolkit.optim:linear",
    "one_cycle": "toolkit.optim:one_cycle",
    "wsd": "toolkit.optim:wsd",
}


def build_optimizer(
    model: nn.Module, component: Any, device: torch.device, lr_scale: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """The optimizer of a model's trainable parameters.

    Weight decay spares norms and biases: all of fewer than two dimensions. `lr_scale` has a factor of the learning rate
    for the parameters whose names match a pattern, such as `head.*`; all others have 1. Raises JobError for a pattern
    that matches no trainable parameter, and for a parameter that two match.
    """
    constructor = components.find("optimizer", component.name, OPTIMIZERS)
    accepts = inspect.signature(constructor).parameters
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # One kernel for all parameters, instead of one for each operation on each of them. torch has few for shards.
    fused = "fused" in accepts and "foreach" not in component.args and device.type in ("cpu", "cuda", "mps")
    if any(isinstance(parameter, DTensor) for parameter in trainable):
        fused = fused and constructor in (torch.optim.Adam, torch.optim.AdamW)
    scales = _scales(model, lr_scale or {})
    groups = _groups(trainable, scales, "weight_decay" in accepts)
    offers = {"fused": True} if fused else {}
    optimizer: torch.optim.Optimizer = components.build("optimizer", component, OPTIMIZERS, groups, offers=offers)
    for values in (optimizer.defaults, *optimizer.param_groups):  # as they are written in Python; YAML has no tuples
        values.update({key: tuple(values[key]) for key in component.args if isinstance(values.get(key), list)})
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"] * scales.get(id(group["params"][0]), 1.0)
    return optimizer


def _groups(trainable: Sequence[nn.Parameter], scales: Mapping[int, float], decays: bool) -> list[dict[str, Any]]:
    """Parameters of one learning rate and one weight decay each, those of the plain learning rate first."""
    groups: list[dict[str, Any]] = []
    for scale in sorted({1.0, *scales.values()}, key=lambda scale: (scale != 1, scale)):
        own = [parameter for parameter in trainable if scales.get(id(parameter), 1.0) == scale]
        groups += [
            {"params": [parameter for parameter in own if not decays or parameter.ndim >= 2]},
            {"params": [parameter for parameter in own if decays and parameter.ndim < 2], "weight_decay": 0.0},
        ]
    return [group for group in groups if group["params"]]


def _scales(model: nn.Module, lr_scale: Mapping[str, float]) -> dict[int, float]:
    """Trainable parameter, by id -> factor of its learning rate, where a pattern gives one."""
    every = model.named_parameters(remove_duplicate=False)
    named = {name: parameter for name, parameter in every if parameter.requires_grad}
    patterns: dict[int, str] = {}
    for pattern in lr_scale:
        for name in matched("optimizer.lr_scale", pattern, named, f"the model's {len(named)} trainable parameters"):
            if (other := patterns.setdefault(id(named[name]), pattern)) != pattern:
                raise JobError(f"optimizer.lr_scale: {name} matches {other!r} and {pattern!r}; change one, or drop it")
    return {parameter: lr_scale[pattern] for parameter, pattern in patterns.items()}


class Ema:
    """An exponential moving average of the trained weights: average = decay * average + (1 - decay) * weight.

    It begins with the weights as they are. `tensors` holds it by parameter name, a tied one once, in fp32 at least: in
    bf16 a step of (1 - decay) is rounded away from 0.99 on. Frozen weights are their own average, and buffers, such as
    running statistics, are not averaged.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors: dict[str, Tensor] = {
            name: weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            for name, weight in model.named_parameters()
            if weight.requires_grad
        }

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take one step towards the model's weights."""
        averages = [*self.tensors.values()]
        weights = [weight.to(average.dtype) for weight, average in zip(self._weights(model), averages, strict=True)]
        torch._foreach_lerp_(averages, weights, 1 - self.decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model has the averages for weights in here, and afterwards its own again, bit for bit.

        Its own are kept in a copy meanwhile, which takes the room that gradients have left.
        """
        weights = self._weights(model)
        own = [weight.detach().clone() for weight in weights]
        try:
            _put(self.tensors.values(), weights)
            yield
        finally:
            _put(own, weights)

    def _weights(self, model: nn.Module) -> list[Tensor]:
        named = dict(model.named_parameters())
        return [named[name] for name in self.tensors]


@torch.no_grad()
def _put(sources: Iterable[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)  # one by one: torch._foreach_copy_ refuses DTensors


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Take the parameters whose names match any of the patterns, such as `layers.0.*`, out of training.

    Call it before the optimizer and DDP are built. Where all parameters of a part are frozen, the trainer keeps its
    buffers, such as running statistics, as they are. Raises JobError if a pattern matches nothing, or nothing is left.
    """
    named = dict(model.named_parameters(remove_duplicate=False))  # a tied one has several names, and any will do
    for pattern in patterns:
        for name in matched("train.freeze", pattern, named, f"the model's {len(named)} parameters"):
            named[name].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in named.values()):
        given = ", ".join(patterns)
        raise JobError(f"train.freeze: {given} leaves no parameter of the model to train; freeze less")


def build_schedule(component: Any, total_steps: int) -> Callable[[int], float]:
    """Step -> factor of the learning rate. Raises JobError for one that has none for the first step, the last, or the
    one in the middle.
    """
    schedule = components.find("schedule", component.name, SCHEDULES)
    args = components.checked_args("schedule", component, schedule, positional=2)
    for step in sorted({0, total_steps // 2, total_steps - 1}):
        where = f"schedule {component.name!r} at step {step}"
        try:
            factor = schedule(step, total_steps, **args)
        except Exception as error:
            raise JobError(f"{where} raised {type(error).__name__}: {error}") from error
        if not _multiplies(factor):
            raise JobError(f"{where} is {factor!r}; the factor of a learning rate must be a finite number, 0 or more")
    return partial(schedule, total_steps=total_steps, **args)


def _multiplies(factor: Any) -> bool:
    """Whether a learning rate can be multiplied by it."""
    try:
        return isfinite(factor) and bool(factor > -1e-9)  # a curve down to 0 may end just below it
    except (TypeError, ValueError, OverflowError):
        return False


Count = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=0)]
Factor = Annotated[float, Field(ge=0)]  # of the learning rate


def constant(step: int, total_steps: int, warmup_steps: Steps = 0) -> float:
    """1, after a linear rise over `warmup_steps`."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


def linear(step: int, total_steps: int, warmup_steps: Steps = 0, final: Factor = 0.0) -> float:
    """A straight line from 1 down to `final`, after a linear rise over `warmup_steps`."""
    return _warmed(step, warmup_steps, final + (1 - final) * (1 - _progress(step, total_steps, warmup_steps)))


def cosine(step: int, total_steps: int, warmup_steps: Steps = 0, final: Factor = 0.0) -> float:
    """Half a cosine from 1 down to `final` (Loshchilov and Hutter, arXiv:1608.03983), after a linear rise over
    `warmup_steps`.
    """
    return _warmed(step, warmup_steps, _half_cosine(1, final, _progress(step, total_steps, warmup_steps)))


def cosine_restarts(
    step: int, total_steps: int, period_steps: Count, growth: Count = 1, warmup_steps: Steps = 0, final: Factor = 0.0
) -> float:
    """SGDR: half a cosine from 1 down to `final`, again and again, after a linear rise over `warmup_steps`.

    The first takes `period_steps`, each other `growth` times as many as the one before (Loshchilov and Hutter,
    arXiv:1608.03983, T_0 and T_mult). A run of period_steps * (growth^n - 1) / (growth - 1) steps, or of n periods if
    growth is 1, ends at the end of one.
    """
    since, period = max(0, step - warmup_steps), period_steps
    while growth > 1 and since >= period:
        since, period = since - period, period * growth
    return _warmed(step, warmup_steps, _half_cosine(1, final, since % period / period))


def one_cycle(
    step: int,
    total_steps: int,
    rise: Annotated[float, Field(gt=0, lt=1)] = 0.3,
    initial: Factor = 0.04,
    final: Factor = 4e-6,
) -> float:
    """Half a cosine up from `initial` to 1 over the share `rise` of the run, then one down to `final` at its last step.

    One cycle as in Smith and Topin (arXiv:1708.07120) and Smith (arXiv:1803.09820), with the numbers of
    torch.optim.lr_scheduler.OneCycleLR; the momentum stays as it is.
    """
    top, last = rise * total_steps - 1, total_steps - 1
    if step <= top:
        return _half_cosine(initial, 1, step / top if top > 0 else 1)
    return _half_cosine(1, final, (step - top) / (last - top))


def wsd(
    step: int,
    total_steps: int,
    warmup_steps: Steps = 0,
    decay: Annotated[float, Field(gt=0, le=1)] = 0.2,
    shape: Literal["sqrt", "linear"] = "sqrt",
    final: Factor = 0.0,
) -> float:
    """Warm-up, stable, decay: a linear rise over `warmup_steps`, then 1, then down to `final` over the last share
    `decay` of the run.

    The descent is 1 - sqrt(x), the better one in Hägele et al. (arXiv:2405.18392), or a line. As the factor is 1 until
    then, a checkpoint from before it can go on to any length of run (MiniCPM, arXiv:2404.06395).
    """
    decayed = max(0.0, 1 - (total_steps - step) / (decay * total_steps))
    return _warmed(step, warmup_steps, final + (1 - final) * (1 - (sqrt(decayed) if shape == "sqrt" else decayed)))


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + cos(pi * progress)) / 2


def _warmed(step: int, warmup_steps: int, factor: float) -> float:
    return (step + 1) / (warmup_steps + 1) if step < warmup_steps else factor


def _progress(step: int, total_steps: int, warmup_steps: int) -> float:
    """How far the steps after the warm-up are done, 0 to 1."""
    return min(1.0, max(0.0, (step - warmup_steps) / max(1, total_steps - warmup_steps)))
