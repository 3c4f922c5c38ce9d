"""Steps of the stream -> batches on the device.

One item of work is one rank's share of one step, cut into micro-batches.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from itertools import pairwise
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from toolkit.datasets.sampler import ElasticDistributedSampler
from toolkit.datasets.split import Split
from toolkit.datasets.stream import Int64s, sample_keys, uniform
from toolkit.datasets.transforms import mixes
from toolkit.datasets.workers import by_workers, refuse_small_memory, steps_held
from toolkit.errors import RunError
from toolkit.randomness import derive, seed_everything


class Batch(NamedTuple):
    """Samples that go through the model together. `indices` are the samples' numbers in their dataset, on the host."""

    input: Any
    target: Any
    indices: Int64s


class Failure(NamedTuple):
    """A sample that could not be read: returned, not raised, so that a worker's words arrive whole."""

    message: str


class TrainingSteps(Dataset[Any]):
    """Item s is this rank's share of training step s, as micro-batches of at most `micro_batch_size` samples.

    `in_step`: every rank has the same number of them, for a model whose ranks must step together.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: ElasticDistributedSampler,
        micro_batch_size: int | None = None,
        transforms: Sequence[Any] = (),
        in_step: bool = False,
    ) -> None:
        self.whole_dataset = dataset
        self.split = dataset if isinstance(dataset, Split) else None
        self.dataset = self.split.dataset if self.split else dataset
        self.sampler, self.transforms = sampler, transforms
        self._beyond = sum(mixes(transform) for transform in transforms)  # samples that the last are mixed with
        largest = ceil(sampler.global_batch_size / sampler.num_replicas)  # share of any rank
        size = self.micro_batch_size = micro_batch_size or largest
        starts = [*range(0, sampler.batch_size, size)]
        if in_step and len(starts) < ceil(largest / size):
            starts.append(starts[-1] + size // 2)  # one sample less than others have, and so the last was full
        self._cuts = [slice(*ends) for ends in pairwise([*starts, sampler.batch_size])]
        self.skip(())

    def skip(self, skipped: Sequence[int]) -> None:
        """From now on the batches of these numbers are left out. Workers that have been started do not know of it."""
        self.sampler.skip(skipped)
        self._block = self.sampler.block(0)._replace(steps=range(0))

    def share(self, step: int) -> tuple[Int64s, Int64s]:
        """This rank's (epochs, sample indices) of a step; of a split, the indices in the whole dataset."""
        epochs, indices = self._share_and_beyond(step)
        return epochs[: self.sampler.batch_size], indices[: self.sampler.batch_size]

    def _share_and_beyond(self, step: int) -> tuple[Int64s, Int64s]:
        if step not in self._block.steps:
            block = self.sampler.block(step, self._beyond)
            self._block = block._replace(indices=self.split.original(block.indices)) if self.split else block
        return self._block.share(step)

    def __getitem__(self, step: int) -> list[Batch] | Failure:
        epochs, indices = self._share_and_beyond(step)
        wide = [slice(cut.start, cut.stop + self._beyond) for cut in self._cuts]
        try:
            return [_read(self.dataset, indices[cut], epochs[cut], self.sampler.seed, self.transforms) for cut in wide]
        except RunError as error:
            return Failure(str(error))


class EvaluationSteps(Dataset[Any]):
    """One rank's share of a whole set, in order: over all ranks every sample comes once.

    Every rank has the same number of batches, so that a model whose ranks must step together can. Where a rank's share
    is used up, its batch has no `indices` and is not counted.
    """

    def __init__(
        self, dataset: Any, batch_size: int, rank: int, world_size: int, transforms: Sequence[Any] = ()
    ) -> None:
        size = len(dataset)
        self.dataset, self.batch_size = dataset, batch_size
        self.first, self.end = rank * size // world_size, (rank + 1) * size // world_size
        self.steps = ceil(ceil(size / world_size) / batch_size)
        self.transforms = [one for one in transforms if not (getattr(one, "random", False) or mixes(one))]

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> list[Batch] | Failure:
        start = self.first + step * self.batch_size
        mine = np.arange(start, min(start + self.batch_size, self.end))
        dataset, indices = self.dataset, mine if mine.size else np.zeros(1, np.int64)
        if isinstance(dataset, Split):
            dataset, indices = dataset.dataset, dataset.original(indices)
        try:
            batch = _read(dataset, indices, np.zeros_like(indices), 0, self.transforms)
        except RunError as error:
            return Failure(str(error))
        return [batch if mine.size else batch._replace(indices=mine)]


def batches(
    steps: TrainingSteps | EvaluationSteps, start: int, stop: int, workers: int, device: torch.device
) -> Generator[list[Batch]]:
    """The micro-batches of steps start..stop-1 on the device.

    Raises RunError that names the sample that cannot be read.
    """
    source: Any
    if workers:
        source = by_workers(steps, range(start, stop), workers, device.type == "cuda")
    else:
        source = (steps[step] for step in range(start, stop))
    host = (_checked(step) for step in source)
    if device.type == "cpu":
        return host
    return _prefetched(host, device) if device.type == "cuda" else (_moved(step, device) for step in host)


def check_workers(training: TrainingSteps, evaluations: Iterable[EvaluationSteps], workers: int, ranks: int) -> None:
    """Raises JobError if workers of so many ranks on this machine could not hand on what they read.

    While a set is evaluated, those that read for training still hold their steps.
    """
    if workers:
        held = steps_held(workers)
        evaluated = [_sizes(steps) * min(held, len(steps)) for steps in evaluations]
        refuse_small_memory(_sizes(training) * held + max(evaluated, key=sum, default=[]), workers, ranks)


def _sizes(steps: TrainingSteps | EvaluationSteps) -> list[int]:
    """Bytes of each tensor of a step."""
    sizes: list[int] = []

    def weigh(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    _mapped(_checked(steps[0]), weigh)
    return sizes


def _read(dataset: Any, indices: Int64s, epochs: Int64s, seed: int, transforms: Sequence[Any]) -> Batch:
    try:
        inputs, targets = _gathered(dataset, indices, epochs, seed)
    except Exception as error:
        raise RunError(_unreadable(dataset, indices, epochs, seed, error)) from error
    keys = sample_keys(seed, epochs, indices) if transforms else indices
    for salt, transform in enumerate(transforms):
        keys = keys[:-1] if mixes(transform) else keys
        try:
            inputs, targets = _transformed(transform, inputs, targets, _draw(keys, salt), len(keys))
        except Exception as error:
            raise RunError(_untransformed(transform, inputs, error)) from error
    return Batch(inputs, targets, indices[: len(keys)])


def _transformed(transform: Any, inputs: Any, targets: Any, draw: Callable[[int], Any], count: int) -> tuple[Any, Any]:
    if not mixes(transform):
        return transform(inputs, draw), targets
    inputs, targets = transform(inputs, targets, draw)
    if isinstance(inputs, Tensor) and len(inputs) != count:  # else the loss would be that of other samples, unseen
        raise ValueError(f"of {count} samples and one more it makes {len(inputs)}")
    return inputs, targets


def _draw(keys: Any, salt: int) -> Callable[[int], Any]:
    return lambda number: uniform(keys, salt << 16 | number)


def _gathered(dataset: Any, indices: Int64s, epochs: Int64s, seed: int) -> tuple[Any, Any]:
    """A whole batch: by the dataset's own `gather`, by `__getitems__`, else sample by sample."""
    # One seed for the batch: what it draws survives a resume, though not another number of ranks. It takes 7 us.
    seed_everything(derive(seed, int(epochs[0]), int(indices[0])))
    if hasattr(dataset, "gather"):
        whole = dataset.gather(indices)
    else:
        if hasattr(dataset, "__getitems__"):
            whole = dataset.__getitems__(indices.tolist())
        else:
            whole = [_item(dataset, i, e, seed) for i, e in zip(indices.tolist(), epochs.tolist(), strict=True)]
        if isinstance(whole, list):  # samples, as torch's own protocol has it; anything else is a batch already
            whole = getattr(dataset, "collate_fn", default_collate)(whole)
    return (whole["input"], whole["target"]) if isinstance(whole, dict) else (whole[0], whole[1])


def _item(dataset: Any, index: int, epoch: int, seed: int) -> Any:
    """One sample, with the global generators set from (seed, epoch, sample), for augmentation inside the dataset."""
    seed_everything(derive(seed, epoch, index))
    return dataset[index]


def _unreadable(dataset: Any, indices: Int64s, epochs: Int64s, seed: int, error: Exception) -> str:
    """Words for a batch that could not be read: the first of its samples that fails alone, and where it lies."""
    source = getattr(dataset, "source", type(dataset).__name__)
    for at in range(len(indices)):
        try:
            _gathered(dataset, indices[at : at + 1], epochs[at : at + 1], seed)
        except Exception as alone:
            return (
                f"sample {indices[at]} of {source} cannot be read: {type(alone).__name__}: {alone}; mend or remove it"
            )
    return (
        f"samples {indices.tolist()[:8]} of {source} cannot be put into one batch: {error}; "
        f"give them one shape or a collate_fn"
    )


def _untransformed(transform: Any, inputs: Any, error: Exception) -> str:
    shape = tuple(getattr(inputs, "shape", ()))
    return f"transform {type(transform).__name__} fails on inputs of shape {shape}: {type(error).__name__}: {error}"


def _checked(step: list[Batch] | Failure) -> list[Batch]:
    if isinstance(step, Failure):
        raise RunError(step.message)
    return step


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with every tensor changed; other values stay."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(item, change) for item in value))
    return type(value)(_mapped(item, change) for item in value) if isinstance(value, list | tuple) else value


def _moved(step: list[Batch], device: torch.device) -> list[Batch]:
    moved: list[Batch] = _mapped(step, lambda tensor: tensor.to(device, non_blocking=True))
    return moved


def _prefetched(steps: Generator[list[Batch]], device: torch.device) -> Generator[list[Batch]]:
    """Copy the next step from pinned memory on a side stream while the current one computes."""
    side = torch.cuda.Stream(device)
    arriving: list[Batch] | None = None
    for step in steps:
        arrived, pinned = arriving, _mapped(step, lambda tensor: tensor.pin_memory())
        if arrived is not None:
            yield _received(arrived, side)
        with torch.cuda.stream(side):
            arriving = _moved(pinned, device)
    if arriving is not None:
        yield _received(arriving, side)


def _received(step: list[Batch], side: torch.cuda.Stream) -> list[Batch]:
    """Let the compute stream wait for the copy, and tell the allocator that it uses this memory from now on."""
    compute = torch.cuda.current_stream(side.device)
    compute.wait_stream(side)

    def use(tensor: Tensor) -> Tensor:
        tensor.record_stream(compute)
        return tensor

    received: list[Batch] = _mapped(step, use)
    return received
