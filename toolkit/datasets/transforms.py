"""Changes to whole batches of inputs. A random one draws from (seed, epoch, sample), so it is the same on any rank, in
any worker, after any resume; evaluation leaves the random ones out.

A transform is called with inputs of shape (B, ...) and `draw`, where `draw(k)` is the k-th number in [0, 1) of each
sample, shape (B,).

One with an attribute `mixes = True` is called with (inputs, targets, draw), where inputs and targets have B + 1 rows:
after each sample comes the one it may be mixed with, the next of the global batch. It returns (inputs, targets) of B
rows. So what is mixed is a function of the step, whoever of how many ranks does it.
"""

from collections.abc import Callable
from math import inf, pi
from typing import Any

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
    "mixup": "toolkit.datasets.transforms:Mixup",
    "normalise": "toolkit.datasets.transforms:Normalise",
}


def mixes(transform: Any) -> bool:
    """Whether a transform makes one sample of two."""
    return bool(getattr(transform, "mixes", False))


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
        if not 0 <= p <= 1:
            raise JobError(f"p is {p}; a probability is at least 0 and at most 1")
        self.p = p

    def __call__(self, inputs: Tensor, draw: Draw) -> Tensor:
        flipped = torch.from_numpy(draw(0) < self.p)
        return torch.where(flipped[:, None, None, None], inputs.flip(-1), inputs)


class Normalise:
    """(inputs - mean) / std, one value a channel of (B, C, ...) or one for all."""

    random = False

    def __init__(self, mean: float | list[float], std: float | list[float]) -> None:
        self.mean, self.std = torch.tensor(mean).reshape(-1), torch.tensor(std).reshape(-1)
        if not (self.std > 0).all():
            raise JobError(f"std is {std}; every value must be above 0")
        lengths = {1, len(self.mean), len(self.std)}
        if 0 in lengths or len(lengths) > 2 or not torch.cat([self.mean, self.std]).isfinite().all():
            raise JobError(f"mean is {mean} and std {std}; give finite numbers, one for all channels or one for each")

    def __call__(self, inputs: Tensor, draw: Draw) -> Tensor:
        shape = (-1, *(1,) * (inputs.ndim - 2)) if inputs.ndim > 1 else (-1,)
        return (inputs - self.mean.view(shape)) / self.std.view(shape)


class Mixup:
    """share * sample + (1 - share) * the next one, with a share of each sample's own from Beta(alpha, alpha) (Zhang et
    al., arXiv:1710.09412).

    Inputs are real numbers (B + 1, ...). Targets that are real numbers are mixed as well; class numbers (B + 1,) become
    (classes (B,), those of the next (B,), shares (B,)), and `classification` mixes the two losses.
    """

    random = mixes = True

    def __init__(self, alpha: float = 0.2) -> None:
        if not 0 < alpha < inf:
            raise JobError(f"alpha is {alpha}; it must be above 0, and leave mixup out for none")
        self.alpha = alpha

    def __call__(self, inputs: Tensor, targets: Tensor, draw: Draw) -> tuple[Tensor, Any]:
        shares = _symmetric_beta(self.alpha, draw)
        if not inputs.is_floating_point():
            raise ValueError(f"mixup needs inputs of real numbers, and these are {inputs.dtype}")
        if targets.is_floating_point():
            return _mixed(inputs, shares), _mixed(targets, shares)
        if targets.ndim != 1:
            raise ValueError(f"mixup needs one class a sample or targets of real numbers, not {tuple(targets.shape)}")
        return _mixed(inputs, shares), (targets[:-1], targets[1:], shares.float())


def _mixed(values: Tensor, shares: Tensor) -> Tensor:
    """Each row mixed with the next: (B + 1, ...) and shares (B,) -> (B, ...)."""
    weights = shares.to(values.dtype).view(-1, *(1,) * (values.ndim - 1))
    return torch.lerp(values[1:], values[:-1], weights)


def _symmetric_beta(alpha: float, draw: Draw) -> Tensor:
    """A number of Beta(alpha, alpha) for each sample, in float64, out of four uniform ones and without rejection.

    Ulrich's polar method for alpha + 1 (Applied Statistics 33, 1984), then down to alpha, as Gamma(alpha) is
    Gamma(alpha + 1) * U^(1 / alpha) (Devroye, "Non-Uniform Random Variate Generation", 1986).
    """
    radius, angle, one, other = (torch.from_numpy(draw(number)) for number in range(4))
    centred = (1 - radius ** (2 / (2 * alpha + 1))).sqrt() * (2 * pi * angle).cos()
    logit = centred.log1p() - (-centred).log1p() + ((-one).log1p() - (-other).log1p()) / alpha
    return logit.sigmoid()
