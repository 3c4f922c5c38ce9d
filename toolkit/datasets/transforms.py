"""Changes to whole batches of inputs. A random one draws from (seed, epoch, sample), so it is the same on any rank, in
any worker, after any resume; evaluation leaves the random ones out.

A transform is called with inputs of shape (B, ...) and `draw`, where `draw(k)` is the k-th number in [0, 1) of each
sample, shape (B,).
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from toolkit.errors import JobError

Draw = Callable[[int], NDArray[np.float64]]

TRANSFORMS = {
    "crop": "toolkit.datasets.transforms:Crop",
    "flip": "toolkit.datasets.transforms:Flip",
    "normalise": "toolkit.datasets.transforms:Normalise",
}


class Crop:
    """Shift each image of (B, C, H, W) by up to `padding` pixels in each direction; zeros come in."""

    random = True

    def __init__(self, padding: int) -> None:
        if padding < 1:
            raise JobError(f"padding is {padding} pixels; use at least 1")
        self.padding = padding

    def __call__(self, inputs: Tensor, draw: Draw) -> Tensor:
        count, channels, height, width = inputs.shape
        padded = F.pad(inputs, (self.padding,) * 4)
        shifts = 2 * self.padding + 1
        rows = torch.from_numpy((draw(0) * shifts).astype(np.int64))[:, None] + torch.arange(height)
        columns = torch.from_numpy((draw(1) * shifts).astype(np.int64))[:, None] + torch.arange(width)
        samples = torch.arange(count)[:, None, None, None]
        return padded[samples, torch.arange(channels)[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


class Flip:
    """Mirror each image of (B, C, H, W) left to right with probability `p`."""

    random = True

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, inputs: Tensor, draw: Draw) -> Tensor:
        flipped = torch.from_numpy(draw(0) < self.p)
        return torch.where(flipped[:, None, None, None], inputs.flip(-1), inputs)


class Normalise:
    """(inputs - mean) / std, one value a channel of (B, C, ...) or one for all."""

    random = False

    def __init__(self, mean: float | list[float], std: float | list[float]) -> None:
        self.mean, self.std = torch.tensor(mean).reshape(-1), torch.tensor(std).reshape(-1)
        if bool((self.std <= 0).any()):
            raise JobError(f"std is {std}; every value must be above 0")

    def __call__(self, inputs: Tensor, draw: Draw) -> Tensor:
        shape = (-1, *(1,) * (inputs.ndim - 2)) if inputs.ndim > 1 else (-1,)
        return (inputs - self.mean.view(shape)) / self.std.view(shape)
