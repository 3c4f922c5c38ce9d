"""Why a step failed, in words: its samples are read again on the host and looked at.

Costs nothing until something has failed.
"""

import re
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolkit import oom
from toolkit.datasets.loader import Batch, EvaluationSteps, Failure, TrainingSteps
from toolkit.datasets.sampler import ElasticDistributedSampler
from toolkit.datasets.transforms import mixes
from toolkit.deaths import OUT_OF_MEMORY, killed, of_the_machine
from toolkit.errors import JobError, RunError
from toolkit.lost import LostLossError
from toolkit.trainer import Trainer


def explained(
    error: Exception, trainer: Trainer, steps: TrainingSteps, evaluations: Iterable[EvaluationSteps] = ()
) -> Exception:
    """A RunError that says what is to blame: the sample with its file, if it is one. A JobError for a model that cannot
    be sharded as it is. Else the error itself.
    """
    if known := _known_by_its_words(error, trainer.state.step):
        return known
    if isinstance(error, RunError) and not isinstance(error, LostLossError):
        return error
    for dataset, batches in _suspects(error, trainer, steps, evaluations):
        if words := _bad_sample(dataset, batches, trainer):
            more = ", or leave its batch out: train.on_nan=rollback" if isinstance(error, LostLossError) else ""
            return _blaming(error, f"{_first_line(error)}: {words}{more}")
    if isinstance(error, LostLossError):
        remedy = "lower the learning rate, or set train.clip_grad_norm"
        return _blaming(error, f"{error}; every input is finite, so training itself went astray: {remedy}")
    return error


def refusal(error: Exception, trainer: Trainer, steps: TrainingSteps) -> Exception:
    """As `explained`, of a step that is only tried. What nothing but the job can be at fault for is a JobError."""
    cause = explained(error, trainer, steps)
    if cause is not error or isinstance(error, RunError) or _may_pass(error):
        return cause
    return JobError(f"model, data and task do not fit together: {type(error).__name__}: {error}")


_OF_A_PATH = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)  # which something named


def _may_pass(error: Exception) -> bool:
    """Whether a machine, a network or a store has failed, which may be well at the next start."""
    error = getattr(error, "inner_exception", error)  # torch.compile wraps what fails in its backend
    if "device-side assert" in str(error) or isinstance(error, _OF_A_PATH):
        return False
    outside = isinstance(error, OSError | torch.distributed.DistError | torch.AcceleratorError)
    return outside or "gloo/transport/" in str(error) or of_the_machine(str(error))


def _blaming(error: Exception, words: str) -> RunError:
    """An error of these words that blames the same rank."""
    explained = RunError(words)
    explained.rank = getattr(error, "rank", None)
    return explained


def _suspects(
    error: Exception, trainer: Trainer, steps: TrainingSteps, evaluations: Iterable[EvaluationSteps]
) -> Iterator[tuple[Any, list[Batch] | Failure]]:
    """(dataset, batches) of what was being worked on: the whole global batch of each step, or the evaluated sets."""
    if trainer.evaluating:
        for share in evaluations:
            for step in range(len(share)):
                yield share.dataset, share[step]
        return
    now, own = trainer.state.step, steps.sampler
    sampler = ElasticDistributedSampler(
        range(own.size), 1, 0, own.shuffle, own.seed, global_batch_size=own.global_batch_size
    )
    unmixed = [transform for transform in steps.transforms if not mixes(transform)]  # or two samples would look bad
    whole = TrainingSteps(steps.whole_dataset, sampler, transforms=unmixed)
    whole.skip(own.skipped)
    for step in error.steps if isinstance(error, LostLossError) else range(now, now + 1):
        yield steps.dataset, whole[step]


def _bad_sample(dataset: Any, batches: list[Batch] | Failure, trainer: Trainer) -> str:
    """Words for the first sample that is wrong, or nothing."""
    if isinstance(batches, Failure):
        return batches.message
    source = getattr(dataset, "source", type(dataset).__name__)
    for batch in batches:
        wrong = _not_finite(batch.input)
        if hasattr(trainer.task, "check") and trainer.output_shape:
            wrong |= trainer.task.check(trainer.output_shape, batch.target)
        if wrong and len(batch.indices):
            at = min(wrong)
            return f"sample {batch.indices[at]} of {source}: {wrong[at]}; mend or remove it"
    return ""


def _not_finite(inputs: Any) -> dict[int, str]:
    """Places in the batch whose input has a nan or inf."""
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return {}
    finite = inputs.flatten(1).isfinite().all(1).numpy()
    return {int(at): "its input has a nan or infinite value" for at in np.flatnonzero(~finite)}


def _known_by_its_words(error: Exception, step: int) -> Exception | None:
    """What torch says of memory, loader workers and shards, in our words; None if it speaks of none of these."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator: can't allocate" in str(error):
        return RunError(f"out of memory in step {step + 1}: {_first_line(error)}; {OUT_OF_MEMORY}")
    if worker := _KILLED_WORKER.match(str(error)) or _KILLED_WORKER.match(str(error.__cause__)):
        return RunError(_of_worker(int(worker[1]), worker[2]))
    if "DTensor" in str(error):
        return JobError(
            f"{_first_line(error)}: with train.strategy fsdp a block's weights are there only while it is called as a "
            "module, block(x), and this model uses them otherwise; name the blocks for which that holds in an "
            "attribute `blocks` of the model, an nn.ModuleList, or use train.strategy=ddp"
        )
    return None


# What torch says of a worker, or has as cause of its error if it was waiting; signals are named as by strsignal(3).
_KILLED_WORKER = re.compile(r"DataLoader worker \(pid (\d+)\) is killed by signal: ([^.]+)\.")


def _of_worker(pid: int, signal_name: str) -> str:
    """Words on the death of a loader worker."""
    number = next((each for each in signal.valid_signals() if signal.strsignal(each) == signal_name), None)
    _, cause, remedy = killed(number, oom.said_by_kernel(pid))
    return f"a loader worker (pid {pid}) {cause}; {remedy}"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
