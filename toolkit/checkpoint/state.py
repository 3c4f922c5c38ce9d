"""The state of training <-> named tensors and plain values. Nothing here is ever pickled."""

from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import RunError


def to_plain(state: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, values that are JSON) of a state with model, optimizer, scaler, step and best."""
    tensors = {f"model/{name}": tensor for name, tensor in _model_tensors(state.model).items()}
    values: dict[str, Any] = {
        "step": state.step,
        "best": state.best,
        "scaler": state.scaler.state_dict(),
        "optimizer": {},
    }
    for name, parameter in state.model.named_parameters():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{name}/{key}"] = value
            elif value is None or isinstance(value, bool | int | float | str):
                values["optimizer"][f"{name}/{key}"] = value
            else:
                raise RunError(
                    f"optimizer state {key!r} of {name} is a {type(value).__name__}; "
                    "only tensors and plain values can be saved"
                )
    return tensors, values


def from_plain(state: Any, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Put saved tensors and values into a state of the same structure.

    Raises RunError that lists what is missing or left over.
    """
    own = _model_tensors(state.model)
    found = {name.removeprefix("model/"): tensor for name, tensor in tensors.items() if name.startswith("model/")}
    missing, extra = sorted(own.keys() - found), sorted(found.keys() - own)
    shapes = [
        f"{name}: saved {tuple(found[name].shape)}, model has {tuple(own[name].shape)}"
        for name in sorted(own.keys() & found)
        if own[name].shape != found[name].shape
    ]
    if missing or extra or shapes:
        raise RunError(
            f"the checkpoint does not fit the model: missing {missing or 'none'}, left "
            f"over {extra or 'none'}, other shapes {shapes or 'none'}; "
            "start the job that wrote it, or a new run with --fresh"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(found[name])
    _restore_optimizer(state, tensors, values["optimizer"])
    state.scaler.load_state_dict(values["scaler"])
    state.step, state.best = values["step"], values["best"]


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; tied ones once, under their first name."""
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or identity not in seen:
            tensors[name] = tensor.detach()
        seen.add(identity)
    return tensors


def _restore_optimizer(state: Any, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    parameters = dict(state.model.named_parameters())
    groups = {parameter: group for group in state.optimizer.param_groups for parameter in group["params"]}
    saved: dict[str, Any] = {
        name.removeprefix("optimizer/"): tensor for name, tensor in tensors.items() if name.startswith("optimizer/")
    }
    for path, value in (saved | values).items():
        name, _, key = path.rpartition("/")
        if name not in parameters:
            raise RunError(
                f"the checkpoint has optimizer state for {name!r}, which the model lacks; start the job that wrote it"
            )
        parameter = parameters[name]
        placed = _placed(value, parameter, groups[parameter]) if isinstance(value, Tensor) else value
        state.optimizer.state[parameter][key] = placed


def _placed(value: Tensor, parameter: Tensor, group: dict[str, Any]) -> Tensor:
    """A saved tensor where its optimizer wants it: moments laid out like their parameter, or a fused kernel would
    misread them.
    """
    if value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    on_device = value.ndim > 0 or group.get("fused") or group.get("capturable")
    return value.to(parameter.device) if on_device else value
