"""Where a model lies: on which device, and in which order in memory."""

from typing import Any

import torch
from torch import Tensor, nn

from toolkit.errors import JobError

_DEVICES = ("cuda", "cpu")


def placed(model: nn.Module, device: torch.device, channels_last: bool = False) -> nn.Module:
    """The model on the device. With `channels_last` its weights of four dimensions lie as (N, H, W, C) in memory, which
    is what tensor cores want, and each input of four dimensions is brought into that order first.

    Shapes, names and state_dict stay; sums are rounded otherwise. Raises JobError on a device other than CUDA's or the
    CPU, or if no weight has four dimensions.
    """
    if channels_last and device.type not in _DEVICES:
        raise JobError(
            f"train.channels_last is for {' and '.join(_DEVICES)}, and the device is {device.type}; set it to false"
        )
    if channels_last and not any(parameter.ndim == 4 for parameter in model.parameters()):
        raise JobError(
            "train.channels_last is for convolutions, and no weight of the model has four dimensions; set it to false"
        )
    if not channels_last:
        return model.to(device)
    model.register_forward_pre_hook(_inputs_last)
    for tensor in (*model.to(device).parameters(), *model.buffers()):
        if tensor.ndim == 4:  # `Module.to` would try those of five, too, for which there is no such order
            tensor.data = tensor.data.to(memory_format=torch.channels_last)
    return model


def _inputs_last(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        value.contiguous(memory_format=torch.channels_last) if isinstance(value, Tensor) and value.ndim == 4 else value
        for value in inputs
    )
