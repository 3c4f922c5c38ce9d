"""What an optimizer keeps in its groups of parameters, such as a step count of its own, <-> plain values.

A value is saved if it is not the optimizer's default, or could have been changed in place. On the way back each is as
it was; only where the optimizer is built with another default than then, the job has named another value, which stays.
A list has no default to compare with, as it may have been changed in place, too: it comes back in any case.
"""

import json
from collections.abc import Hashable, Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.checkpoint.manifest import Group
from toolkit.errors import RunError

# The parameters themselves, and how a step is computed on this process's hardware.
_OF_THE_PROCESS = {"params", "param_names", "fused", "foreach", "capturable", "differentiable"}

Update = tuple[dict[str, Any], dict[str, Any]]  # a group of the optimizer, and what it is to be updated with


def to_groups(state: Any, trained: Mapping[str, nn.Parameter]) -> list[Group]:
    """The groups of a state's optimizer, each known by the names of its parameters.

    Left out are the keys in the state's `derived`, if it has such. Raises RunError for what JSON cannot hold.
    """
    names, defaults = {parameter: name for name, parameter in trained.items()}, getattr(state.optimizer, "defaults", {})
    left_out = _OF_THE_PROCESS.union(getattr(state, "derived", ()))
    groups = []
    for group in state.optimizer.param_groups:
        own = [names[parameter] for parameter in group["params"] if parameter in names]
        values = {
            key: _number(value)
            for key, value in group.items()
            if own and key not in left_out and not _is_still(value, defaults.get(key, ...))
        }
        for key, value in values.items():
            if not _can_be_kept(value):
                raise refusal(f"optimizer value {key!r} of the group of {own[0]}", value, "plain, finite values")
        before = {key: _listed(defaults[key]) for key in values if _is_lasting(defaults.get(key, ...))}
        groups.append(Group(parameters=own, values={key: _listed(values[key]) for key in values}, defaults=before))
    return groups


def from_groups(
    state: Any, trained: Mapping[str, nn.Parameter], saved: Sequence[Group]
) -> tuple[list[Update], list[str]]:
    """(updates that make the optimizer's groups what they were, what is against it in words).

    The job may group its parameters otherwise than then: a value comes back if it was the same for all parameters that
    are one group now. What the checkpoint knows nothing of stays as it is.
    """
    names, defaults = {parameter: name for name, parameter in trained.items()}, getattr(state.optimizer, "defaults", {})
    left_out = _OF_THE_PROCESS.union(getattr(state, "derived", ()))
    of = {name: group for group in saved for name in group.parameters}
    updates, wrong = [], []
    for group in state.optimizer.param_groups:
        own = [name for parameter in group["params"] if (name := names.get(parameter, "")) in of]
        before = {id(of[name]): of[name] for name in own}.values()  # the groups that its parameters were in
        known = {key for one in before for key in one.values} | (defaults.keys() & group.keys() if own else set())
        update: dict[str, Any] = {}
        for key in sorted(known - left_out):
            found = [_value(one, key, defaults, group) for one in before]
            if len({_text(value) for value in found}) > 1:
                pairs = zip(found, before, strict=True)
                each = ", ".join(f"{value!r} for {one.parameters[0]}" for value, one in pairs)
                wrong.append(f"optimizer value {key!r} was {each}, which are one group now")
            update[key] = found[0]
        updates.append((group, update))
    return updates, wrong


def is_plain(value: Any) -> bool:
    """Whether JSON gives a value back as it was."""
    return value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and isfinite(value))


def refusal(what: str, value: Any, allowed: str) -> RunError:
    """The error that says why a value cannot be saved."""
    found = repr(value) if isinstance(value, float) else f"a {type(value).__name__}"
    return RunError(f"{what} is {found}; only {allowed} can be saved")


def _value(saved: Group, key: str, defaults: Mapping[str, Any], now: Mapping[str, Any]) -> Any:
    """What a group is to have for a key that was saved, or was the default then."""
    default = defaults.get(key, ...)
    if key not in saved.values:
        return defaults.get(key)
    if key in saved.defaults and _text(saved.defaults[key]) != _text(default):
        return now.get(key)
    value: Any = saved.values[key]
    if isinstance(now.get(key), Tensor):
        return torch.full_like(now[key], value)
    return tuple(value) if isinstance(value, list) and isinstance(now.get(key, default), tuple) else value


def _is_still(value: Any, default: Any) -> bool:
    """Whether a value is the default, and cannot have been changed in place."""
    if isinstance(value, Tensor) or not isinstance(value, Hashable):
        return False
    return value is default or (_is_lasting(value) and _text(value) == _text(default))


def _can_be_kept(value: Any) -> bool:
    return is_plain(value) or (isinstance(value, list | tuple) and all(map(is_plain, value)))


def _is_lasting(value: Any) -> bool:
    """Whether a value can be kept, and is not one to be changed in place: such a default is no more what it was."""
    return _can_be_kept(value) and isinstance(value, Hashable)


def _number(value: Any) -> Any:
    """A tensor of one number, such as a learning rate for CUDA graphs, as that."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _text(value: Any) -> str:
    """Equal for values that JSON does not tell apart."""
    return json.dumps(value, default=repr)
