"""Optimizers and learning-rate schedules by name.

An own optimizer is called as `Optimizer(params, **args)`, an own schedule as `schedule(step, total_steps, **args)`: it
returns the factor of the learning rate for the step numbered `step`, 0 to total_steps - 1. A schedule is a function of
the step, so it has no state to save.
"""

import inspect
from collections.abc import Callable
from functools import partial
from math import cos, pi
from typing import Any

import torch
from torch import nn

from toolkit import components

OPTIMIZERS = {
    "adam": "torch.optim:Adam",
    "adamw": "torch.optim:AdamW",
    "sgd": "torch.optim:SGD",
}

SCHEDULES = {
    "constant": "toolkit.optim:constant",
    "cosine": "toolkit.optim:cosine",
    "linear": "toolkit.optim:linear",
}


def build_optimizer(model: nn.Module, component: Any, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of a model's trainable parameters.

    Weight decay spares norms and biases: all of fewer than two dimensions.
    """
    accepts = inspect.signature(components.find("optimizer", component.name, OPTIMIZERS)).parameters
    # One kernel for all parameters, instead of one for each operation on each of them.
    fused = "fused" in accepts and "foreach" not in component.args and device.type in ("cpu", "cuda", "mps")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trainable}]
    if "weight_decay" in accepts:
        groups = [
            {"params": [parameter for parameter in trainable if parameter.ndim >= 2]},
            {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
        ]
    groups = [group for group in groups if group["params"]]
    offers = {"fused": True} if fused else {}
    optimizer: torch.optim.Optimizer = components.build("optimizer", component, OPTIMIZERS, groups, offers=offers)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def build_schedule(component: Any, total_steps: int) -> Callable[[int], float]:
    """Step -> factor of the learning rate."""
    schedule = components.find("schedule", component.name, SCHEDULES)
    args = components.checked_args("schedule", component, schedule, positional=2)
    return partial(schedule, total_steps=total_steps, **args)


def constant(step: int, total_steps: int, warmup_steps: int = 0) -> float:
    """1, after a linear rise over `warmup_steps`."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


def linear(step: int, total_steps: int, warmup_steps: int = 0, final: float = 0.0) -> float:
    """A straight line from 1 down to `final`, after a linear rise over `warmup_steps`."""
    return _warmed(step, warmup_steps, final + (1 - final) * (1 - _progress(step, total_steps, warmup_steps)))


def cosine(step: int, total_steps: int, warmup_steps: int = 0, final: float = 0.0) -> float:
    """Half a cosine from 1 down to `final` (Loshchilov and Hutter, arXiv:1608.03983), after a linear rise over
    `warmup_steps`.
    """
    return _warmed(
        step, warmup_steps, final + (1 - final) * (1 + cos(pi * _progress(step, total_steps, warmup_steps))) / 2
    )


def _warmed(step: int, warmup_steps: int, factor: float) -> float:
    return (step + 1) / (warmup_steps + 1) if step < warmup_steps else factor


def _progress(step: int, total_steps: int, warmup_steps: int) -> float:
    """How far the steps after the warm-up are done, 0 to 1."""
    return min(1.0, max(0.0, (step - warmup_steps) / max(1, total_steps - warmup_steps)))
