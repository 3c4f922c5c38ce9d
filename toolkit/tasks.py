"""What is learnt: outputs and targets -> losses to descend and metrics to report.

An own task is a class with these two methods; `check` is optional:

    loss(output, target) -> losses (B,), or (losses, weights) of one shape where not every element counts
    metrics(output, target) -> {name: (numerator, denominator)}, summed over all ranks before they are divided
    check(output_shape, target) -> {place in the batch: what is wrong}, asked for words after a step has failed
"""

from math import log

import torch
from torch import Tensor
from torch.nn import functional as F

from toolkit.errors import JobError

TASKS = {
    "classification": "toolkit.tasks:Classification",
    "language_modeling": "toolkit.tasks:LanguageModeling",
    "regression": "toolkit.tasks:Regression",
}

# What cross_entropy skips where nothing is to be skipped: its own default, -100, is a wrong label that must be found.
_NOTHING = -(2**31)

Losses = Tensor | tuple[Tensor, Tensor]
Metrics = dict[str, tuple[Tensor, int | Tensor]]


class Classification:
    """Cross-entropy of (B, C) logits against (B,) classes.

    With `label_smoothing` (Szegedy et al., arXiv:1512.00567) that share of the target lies on all classes alike. A
    target (classes, other classes, shares), as mixup makes them, gives share * loss + (1 - share) * loss of the others.
    Metrics know of neither: they tell how good the model is.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        if not 0 <= label_smoothing < 1:
            raise JobError(f"label_smoothing is {label_smoothing}; it must be at least 0 and below 1")
        self.label_smoothing = label_smoothing

    def loss(self, output: Tensor, target: Tensor | tuple[Tensor, Tensor, Tensor]) -> Losses:
        if isinstance(target, Tensor):
            return self._losses(output, target)
        classes, others, shares = target
        return shares * self._losses(output, classes) + (1 - shares) * self._losses(output, others)

    def _losses(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            output, target, ignore_index=_NOTHING, reduction="none", label_smoothing=self.label_smoothing
        )

    def metrics(self, output: Tensor, target: Tensor) -> Metrics:
        losses = F.cross_entropy(output.float(), target, ignore_index=_NOTHING, reduction="none")
        return {
            "loss": (losses.sum(), len(target)),
            "accuracy": ((output.argmax(1) == target).sum(), len(target)),
        }

    def check(self, output_shape: torch.Size, target: Tensor) -> dict[int, str]:
        classes = output_shape[1]
        wrong = torch.nonzero((target < 0) | (target >= classes)).flatten().tolist()
        return {
            at: f"class index {int(target[at])} is outside 0..{classes - 1}, which is what the model can output"
            for at in wrong
        }


class Regression:
    """Mean squared error of (B, ...) outputs against targets of the same shape; (B, 1) may meet (B,)."""

    def loss(self, output: Tensor, target: Tensor) -> Losses:
        difference = _matched(output, target) - target
        return difference.square().flatten(1).mean(1) if target.ndim > 1 else difference.square()

    def metrics(self, output: Tensor, target: Tensor) -> Metrics:
        difference = (_matched(output, target) - target).float()
        return {
            "loss": (difference.square().sum(), difference.numel()),
            "mean_absolute_error": (difference.abs().sum(), difference.numel()),
        }


def _matched(output: Tensor, target: Tensor) -> Tensor:
    """The output in the target's shape.

    Broadcasting (B, 1) against (B,) would compare every sample with every other.
    """
    if output.shape == (*target.shape, 1):
        output = output.squeeze(-1)
    if output.shape != target.shape:
        raise ValueError(
            f"the model's output has shape {tuple(output.shape)}, the target {tuple(target.shape)}; "
            "they must be the same"
        )
    return output


class LanguageModeling:
    """Cross-entropy of (B, T, V) logits against (B, T) tokens: a sample's loss is the mean over its tokens.

    With `ignore_index`, tokens of that value do not count, and the loss is the mean over the tokens of the global batch
    that do.
    """

    def __init__(self, ignore_index: int | None = None) -> None:
        self.ignore_index = ignore_index

    def loss(self, output: Tensor, target: Tensor) -> Losses:
        losses = self._losses(output, target)
        return losses.mean(1) if self.ignore_index is None else (losses, (target != self.ignore_index).float())

    def metrics(self, output: Tensor, target: Tensor) -> Metrics:
        total = self._losses(output.float(), target).sum()
        counted = target != self.ignore_index if self.ignore_index is not None else torch.ones_like(target)
        count = counted.sum()
        hits = ((output.argmax(-1) == target) & counted.bool()).sum()
        return {"loss": (total, count), "bits_per_token": (total / log(2), count), "accuracy": (hits, count)}

    def _losses(self, output: Tensor, target: Tensor) -> Tensor:
        ignored = self.ignore_index if self.ignore_index is not None else _NOTHING
        return F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=ignored, reduction="none").view_as(
            target
        )

    def check(self, output_shape: torch.Size, target: Tensor) -> dict[int, str]:
        vocabulary = output_shape[-1]
        bad = ((target < 0) | (target >= vocabulary)) & (
            target != self.ignore_index if self.ignore_index is not None else True
        )
        rows = torch.nonzero(bad.any(1)).flatten().tolist()
        return {
            at: f"token {int(target[at][bad[at]][0])} is outside 0..{vocabulary - 1}, the model's vocabulary"
            for at in rows
        }
