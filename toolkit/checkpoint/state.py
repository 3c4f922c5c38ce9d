"""The state of training <-> named tensors and plain values. Nothing here is ever pickled.

model/NAME            parameters and persistent buffers
ema/NAME              averaged weights, if there are any
optimizer/NAME/KEY    what the optimizer remembers of a parameter
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.checkpoint.groups import from_groups, is_plain, refusal, to_groups
from toolkit.checkpoint.manifest import DTYPES, TensorEntry, Values
from toolkit.errors import RunError

REMEDY = "start the job that wrote it, take its weights with run.init_from, or start a new run with --fresh"


def to_plain(state: Any) -> tuple[dict[str, Tensor], Values]:
    """(tensors by name, plain values) of a state with model, optimizer, step and, perhaps, scaler, ema and best.

    A state may say with `derived` which values of its optimizer's groups follow from the job and the step, such as the
    learning rate that a schedule gives: these are not saved.
    """
    tensors = {f"model/{name}": tensor for name, tensor in model_tensors(state.model).items()}
    tensors |= {f"ema/{name}": tensor for name, tensor in _averages(state).items()}
    plain: dict[str, Any] = {}
    trained = _trained(state)
    for name, parameter in trained.items():
        for key, value in state.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{name}/{key}"] = value
            elif is_plain(value):
                plain[f"{name}/{key}"] = value
            else:
                raise refusal(f"optimizer state {key!r} of {name}", value, "tensors and plain, finite values")
    values = Values(
        step=state.step,
        best=getattr(state, "best", None),
        scaler=_scaling(state),
        trained=sorted(trained),
        optimizer=plain,
        groups=to_groups(state, trained),
        tied=tied(state.model),
        skipped=list(getattr(state, "skipped", ())),
    )
    return tensors, values


def varying(state: Any) -> set[str]:
    """The names of tensors that ranks may have in different versions: buffers, such as running statistics."""
    return {f"model/{name}" for name, _ in state.model.named_buffers(remove_duplicate=False)}


def targets(state: Any, saved: Mapping[str, TensorEntry], values: Values) -> dict[str, Tensor]:
    """The tensors that a checkpoint's are to be read into: the model's own, and those of the optimizer, or new ones
    where it has none yet.

    Raises RunError that lists on both sides what is missing, left over or of another shape or type.
    """
    own = {f"model/{name}": tensor for name, tensor in model_tensors(state.model).items()}
    own |= {f"ema/{name}": tensor for name, tensor in _averages(state).items()}
    trained = _trained(state)
    groups = {parameter: group for group in state.optimizer.param_groups for parameter in group["params"]}
    for name, entry in saved.items():
        parameter_name = name.removeprefix("optimizer/").rpartition("/")[0]
        if name.startswith("optimizer/") and parameter_name in trained:
            parameter = trained[parameter_name]
            there = state.optimizer.state.get(parameter, {}).get(name.rpartition("/")[2])
            own[name] = there if _fits(there, entry) else _empty(entry, parameter, groups[parameter])
    wrong = _differences(own, saved)
    if strange := sorted(name for name in values.optimizer if name.rpartition("/")[0] not in trained):
        wrong.append(f"optimizer values left over in it: {strange}")
    wrong += from_groups(state, trained, values.groups)[1]
    before, now = set(values.trained), set(trained)
    if before != now:
        wrong.append(f"trained then but not now: {sorted(before - now) or 'none'}")
        wrong.append(f"trained now but not then: {sorted(now - before) or 'none'}")
    if values.scaler.keys() != (scaler := _scaling(state)).keys():
        wrong.append(f"loss scaling then {sorted(values.scaler)}, now {sorted(scaler)}")
    if wrong:
        raise RunError("the checkpoint does not fit the job:\n  " + "\n  ".join(wrong) + f"\n{REMEDY}")
    return own


def restore(state: Any, tensors: Mapping[str, Tensor], values: Values) -> None:
    """Give the state all that `targets` had no place for yet."""
    trained = _trained(state)
    remembered: dict[str, Any] = {
        name.removeprefix("optimizer/"): tensor for name, tensor in tensors.items() if name.startswith("optimizer/")
    }
    state.optimizer.state.clear()
    for path, value in (remembered | values.optimizer).items():
        name, _, key = path.rpartition("/")
        state.optimizer.state[trained[name]][key] = value
    for group, update in from_groups(state, trained, values.groups)[0]:
        group.update(update)
    if values.scaler:
        state.scaler.load_state_dict(dict(values.scaler))
    state.step, state.best, state.skipped = values.step, values.best, list(values.skipped)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; tied ones once, under their first name."""
    found, ties = model.state_dict(keep_vars=True), tied(model)
    own = {id(tensor) for tensors in (model.parameters(), model.buffers()) for tensor in tensors}
    for name, tensor in found.items():
        if id(tensor) not in own:  # what is made for the state_dict alone could be saved, but not given back
            raise RunError(f"{name} in the model's state_dict is neither a parameter nor a buffer; it cannot be saved")
    return {name: tensor.detach() for name, tensor in found.items() if name not in ties}


def tied(model: nn.Module) -> dict[str, str]:
    """Of tensors that are one under several names: later name -> first name."""
    first: dict[int, str] = {}
    ties = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if first.setdefault(id(tensor), name) != name:
            ties[name] = first[id(tensor)]
    return ties


def _trained(state: Any) -> dict[str, nn.Parameter]:
    """The parameters that the optimizer changes, by name."""
    changed = {parameter for group in state.optimizer.param_groups for parameter in group["params"]}
    return {name: parameter for name, parameter in state.model.named_parameters() if parameter in changed}


def _scaling(state: Any) -> dict[str, Any]:
    """What the loss scaler remembers; nothing if there is none, or it is off."""
    scaler = getattr(state, "scaler", None)
    return scaler.state_dict() if scaler else {}


def _averages(state: Any) -> dict[str, Tensor]:
    return state.ema.tensors if getattr(state, "ema", None) else {}


def _differences(own: Mapping[str, Tensor], saved: Mapping[str, TensorEntry]) -> list[str]:
    wrong = []
    missing, left_over = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    if missing or left_over:
        wrong += [f"missing in the checkpoint: {missing or 'none'}", f"left over in it: {left_over or 'none'}"]
    for name in sorted(own.keys() & saved.keys()):
        entry, tensor = saved[name], own[name]
        if not _fits(tensor, entry):
            there = f"{entry.shape} {entry.dtype}"
            wrong.append(f"{name}: {there} in the checkpoint, {tuple(tensor.shape)} {_name(tensor.dtype)} in the job")
    return wrong


def _fits(there: Any, entry: TensorEntry) -> bool:
    """Whether a tensor can be filled in place: a run that goes back has no memory for its moments twice."""
    return isinstance(there, Tensor) and (tuple(there.shape), there.dtype) == (entry.shape, DTYPES[entry.dtype])


def _empty(entry: TensorEntry, parameter: nn.Parameter, group: Mapping[str, Any]) -> Tensor:
    """A place for a tensor of the optimizer, where it wants it: moments laid out like their parameter, or a fused
    kernel would misread them.
    """
    dtype = DTYPES[entry.dtype]
    if entry.shape == tuple(parameter.shape):
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    on_device = len(entry.shape) > 0 or group.get("fused") or group.get("capturable")
    return torch.empty(entry.shape, dtype=dtype, device=parameter.device if on_device else "cpu")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
