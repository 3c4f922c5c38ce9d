"""Why a step failed, in words: its samples are read again on the host and looked at.

Costs nothing until something has failed.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolkit.datasets.loader import Failure, TrainingSteps
from toolkit.datasets.sampler import ElasticDistributedSampler
from toolkit.errors import RunError
from toolkit.trainer import LostLossError, Trainer


def explained(error: Exception, trainer: Trainer, steps: TrainingSteps) -> Exception:
    """A RunError with sample, file and remedy where a sample is to blame; else one that says what can be said; else the
    error itself.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return RunError(
            f"out of memory in step {trainer.state.step + 1}: {_first_line(error)}; "
            "set train.micro_batch_size to a smaller number"
        )
    if isinstance(error, RunError) and not isinstance(error, LostLossError):
        return error
    step = trainer.state.step
    for at in error.steps if isinstance(error, LostLossError) else range(step, step + 1):
        if words := _bad_sample(at, trainer, steps):
            return RunError(f"{_first_line(error)}: {words}")
    if isinstance(error, LostLossError):
        return RunError(
            f"{error}; every input is finite, so training itself went astray: lower the learning rate, or set "
            "train.clip_grad_norm"
        )
    return error


def _bad_sample(step: int, trainer: Trainer, steps: TrainingSteps) -> str:
    """Words for the first sample of a step's whole global batch that is wrong, or nothing."""
    sampler = steps.sampler
    whole = ElasticDistributedSampler(
        range(sampler.size), 1, 0, sampler.shuffle, sampler.seed, global_batch_size=sampler.global_batch_size
    )
    batches = TrainingSteps(steps.whole_dataset, whole, transforms=steps.transforms)[step]
    if isinstance(batches, Failure):
        return batches.message
    source = getattr(steps.dataset, "source", type(steps.dataset).__name__)
    for batch in batches:
        wrong = _not_finite(batch.input)
        if hasattr(trainer.task, "check") and trainer.output_shape:
            wrong |= trainer.task.check(trainer.output_shape, batch.target)
        if wrong:
            at = min(wrong)
            return f"sample {batch.indices[at]} of {source}: {wrong[at]}; mend or remove it"
    return ""


def _not_finite(inputs: Any) -> dict[int, str]:
    """Places in the batch whose input has a nan or inf."""
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return {}
    finite = inputs.flatten(1).isfinite().all(1).numpy()
    return {int(at): "its input has a nan or infinite value" for at in np.flatnonzero(~finite)}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
