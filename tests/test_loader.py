"""Steps -> batches: any kind of dataset, the same samples and the same augmentation however the work is divided."""

import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from math import inf, nan
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from toolkit.datasets import workers
from toolkit.datasets.digits import Digits
from toolkit.datasets.loader import EvaluationSteps, TrainingSteps, batches, check_workers
from toolkit.datasets.sampler import ElasticDistributedSampler
from toolkit.datasets.split import held_out
from toolkit.datasets.synthetic import Synthetic
from toolkit.datasets.transforms import Crop, Flip, Mixup, Normalise
from toolkit.datasets.workers import refuse_small_memory
from toolkit.errors import JobError, RunError
from toolkit.randomness import seed_everything

CPU = torch.device("cpu")
DIVISIONS = [(1, 7, 0), (2, None, 0), (3, 5, 0), (7, 1, 0), (1, None, 2), (2, 9, 2)]  # ranks, micro-batch, workers

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # two workers on a machine of one core


class Items:
    """A user's own dataset: sample i is (i as a vector of two, 10 i)."""

    source = "own/files"

    def __init__(self, size: int = 40) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return torch.full((2,), float(index)), 10 * index


class Dicts(Items):
    def __getitem__(self, index: int) -> Any:
        inputs, target = super().__getitem__(index)
        return {"target": target, "input": inputs, "name": str(index)}


class ListsOfSamples(Items):
    def __getitems__(self, indices: list[int]) -> Any:
        return [Items.__getitem__(self, index) for index in indices]

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("asked for one sample, though it gives many at once")


class WholeBatches(ListsOfSamples):
    def __getitems__(self, indices: list[int]) -> Any:
        numbers = torch.tensor(indices)
        return numbers[:, None].expand(-1, 2).float(), numbers * 10


class Collating(Items):
    """Samples of different lengths, which only its own `collate_fn` can put together."""

    def __getitem__(self, index: int) -> Any:
        return [float(index)] * (1 + index % 2), 10 * index

    def collate_fn(self, samples: list[Any]) -> Any:
        return torch.tensor([[values[0]] * 2 for values, _ in samples]), torch.tensor([target for _, target in samples])


class Drawing(Items):
    """Augments by itself, from all three global generators."""

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([random.random(), np.random.rand(), float(torch.rand(()))]), index


class DrawingTogether(Drawing):
    def __getitems__(self, indices: list[int]) -> Any:
        return [self[index] for index in indices]


class DrawingInGather(Drawing):
    def gather(self, indices: Any) -> Any:
        return torch.stack([self[index][0] for index in indices.tolist()]), torch.from_numpy(indices)


class Broken(Items):
    def __getitem__(self, index: int) -> Any:
        if index == 17:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


class Classes(Items):
    def __getitem__(self, index: int) -> Any:
        return torch.zeros(2), torch.tensor([index, index])


class Ragged(Items):
    def __getitem__(self, index: int) -> Any:
        return torch.zeros(1 + index % 2), index


def training(dataset: Any, world_size: int = 1, rank: int = 0, batch: int = 32, **options: Any) -> TrainingSteps:
    sampler = ElasticDistributedSampler(dataset, world_size, rank, seed=3, global_batch_size=batch)
    return TrainingSteps(dataset, sampler, **options)


def inputs_of(
    dataset: Any, world_size: int, micro_batch_size: int | None, workers: int, start: int = 0, **options: Any
) -> dict[tuple[int, int], list[float]]:
    """The input of each (epoch, sample) in steps `start` to 4, read by all ranks of a world."""
    found = {}
    for rank in range(world_size):
        steps = training(dataset, world_size, rank, micro_batch_size=micro_batch_size, **options)
        for step, micro_batches in enumerate(batches(steps, start, 4, workers, CPU), start):
            epochs, indices = steps.share(step)
            assert np.array_equal(np.concatenate([batch.indices for batch in micro_batches]), indices)
            inputs = torch.cat([batch.input for batch in micro_batches]).flatten(1).tolist()
            found |= dict(zip(zip(epochs.tolist(), indices.tolist(), strict=True), inputs, strict=True))
    return found


def refusal(steps: Any, workers: int) -> str:
    """What is said of steps that cannot be read."""
    try:  # pytest.raises would keep the traceback, and with it the workers
        list(batches(steps, 0, 4, workers, CPU))
    except RunError as error:
        return str(error)
    raise AssertionError("every step could be read")


@pytest.mark.parametrize(
    ("micro_batch_size", "sizes"), [(None, [32]), (10, [10, 10, 10, 2]), (16, [16, 16]), (99, [32])]
)
def test_a_share_is_cut_into_micro_batches_of_at_most_the_size_asked_for(
    micro_batch_size: int | None, sizes: list[int]
) -> None:
    step = training(Items(), micro_batch_size=micro_batch_size)[0]
    assert [len(batch.input) for batch in step] == [len(batch.indices) for batch in step] == sizes


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("micro_batch_size", [None, 2, 3, 5, 10, 16])
def test_ranks_in_step_have_as_many_micro_batches_each(world_size: int, micro_batch_size: int | None) -> None:
    for batch in (31, 32, 33, world_size):
        steps = [
            training(Items(), world_size, rank, batch, micro_batch_size=micro_batch_size, in_step=True)[0]
            for rank in range(world_size)
        ]
        sizes = [[len(part.indices) for part in step] for step in steps]
        assert len({len(of_rank) for of_rank in sizes}) == 1
        assert sum(map(sum, sizes)) == batch
        assert all(0 < size <= (micro_batch_size or batch) for of_rank in sizes for size in of_rank)


def test_ranks_evaluate_as_many_samples_at_once_whatever_their_shares() -> None:
    assert {training(Items(), 3, rank).micro_batch_size for rank in range(3)} == {11}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [Items, Dicts, ListsOfSamples, WholeBatches, Collating])
def test_any_kind_of_dataset_gives_its_samples_in_order(kind: type[Items], workers: int) -> None:
    steps = list(batches(training(kind(), micro_batch_size=20), 0, 3, workers, CPU))
    assert [len(step) for step in steps] == [2, 2, 2]
    for batch in (batch for step in steps for batch in step):
        numbers = torch.from_numpy(batch.indices)
        assert torch.equal(batch.input, numbers[:, None].expand(-1, 2).float())
        assert torch.equal(batch.target, numbers * 10)


def test_workers_leave_the_generator_of_their_rank_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(batches(training(Digits()), 0, 2, 2, CPU))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("world_size", "micro_batch_size", "workers"), DIVISIONS)
@pytest.mark.parametrize("split", [False, True])
def test_augmentation_of_a_sample_is_the_same_however_the_work_is_divided(
    world_size: int, micro_batch_size: int | None, workers: int, split: bool
) -> None:
    digits = Subset(Digits(), range(45))
    dataset = held_out(digits, 0.1, seed=3)[0] if split else digits
    transforms = [Crop(1), Flip(), Normalise(0.5, 2.0)]
    expected = inputs_of(dataset, 1, None, 0, transforms=transforms)
    assert inputs_of(dataset, world_size, micro_batch_size, workers, transforms=transforms) == expected


class Reals(Items):
    def __getitem__(self, index: int) -> Any:
        return torch.full((2,), float(index)), float(index)


def mixed(
    dataset: Any, transforms: Any, world_size: int, micro_batch_size: int | None, workers: int, start: int = 0
) -> list[Tensor]:
    """Inputs and each part of the targets of steps `start` to 4, read by all ranks, in the order of the stream."""
    shares = [
        training(dataset, world_size, rank, micro_batch_size=micro_batch_size, transforms=transforms)
        for rank in range(world_size)
    ]
    steps = zip(*(batches(share, start, 4, workers, CPU) for share in shares), strict=True)
    parts = [part for step in steps for of_rank in step for part in of_rank]
    targets = [part.target if isinstance(part.target, tuple) else (part.target,) for part in parts]
    rows = [(part.input, *target) for part, target in zip(parts, targets, strict=True)]
    return [torch.cat(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize(("world_size", "micro_batch_size", "workers"), DIVISIONS)
@pytest.mark.parametrize(
    ("dataset", "transforms"),
    [
        (Subset(Digits(), range(45)), [Crop(1), Mixup(0.4), Normalise(0.5, 2.0)]),
        (held_out(Subset(Digits(), range(45)), 0.1, seed=3)[0], [Mixup(), Flip()]),
        (Reals(), [Mixup(0.5), Mixup(2.0)]),
    ],
    ids=["whole", "split", "twice"],
)
def test_what_is_mixed_with_what_is_the_same_however_the_work_is_divided(
    dataset: Any, transforms: Any, world_size: int, micro_batch_size: int | None, workers: int
) -> None:
    expected = mixed(dataset, transforms, 1, None, 0)
    found = mixed(dataset, transforms, world_size, micro_batch_size, workers)
    resumed = mixed(dataset, transforms, world_size, micro_batch_size, workers, start=2)
    for whole, one, other in zip(expected, found, resumed, strict=True):
        assert torch.equal(one, whole)
        assert torch.equal(other, whole[64:])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_sample_is_mixed_with_the_next_of_its_global_batch_and_the_last_with_the_first(world_size: int) -> None:
    inputs, targets, others, shares = mixed(Items(), [Mixup(0.5)], world_size, 5, 0)
    for start in range(0, 4 * 32, 32):
        batch = slice(start, start + 32)
        assert torch.equal(others[batch], targets[batch].roll(-1))
    expected = shares * targets / 10 + (1 - shares) * others / 10
    torch.testing.assert_close(inputs, expected[:, None].expand(-1, 2))
    assert len(set(shares.tolist())) == 4 * 32, "each sample of each epoch draws its own share"
    reals, mixtures = mixed(Reals(), [Mixup(0.5)], world_size, 5, 0)
    torch.testing.assert_close(reals[:, 0], mixtures.float())


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 1.0, 8.0])
def test_shares_are_of_the_beta_distribution(alpha: float) -> None:
    size, generator = 20000, np.random.default_rng(0)
    _, (_, _, shares) = Mixup(alpha)(torch.zeros(size + 1, 1), torch.zeros(size + 1, dtype=torch.int64),
                                     lambda number: generator.random(size))  # fmt: skip
    reference = generator.beta(alpha, alpha, 20 * size)
    found, expected = (
        np.array([(values < place).mean() for place in np.linspace(0.01, 0.99, 50)])
        for values in (shares.numpy(), reference)
    )
    assert np.abs(found - expected).max() < 0.014, "Kolmogorov and Smirnov: above 0.0138 one time in a thousand"


def test_mixing_is_left_out_of_evaluation() -> None:
    class Mixing(Mixup):
        random = False

    (batch,) = EvaluationSteps(Digits(), 50, 0, 1, [Mixup(), Mixing(), Normalise(0.5, 2.0)])[0]
    assert torch.equal(batch.input, (Digits().inputs[:50] - 0.5) / 2)
    assert torch.equal(batch.target, Digits().targets[:50])


def test_a_mixing_transform_that_keeps_the_sample_too_many_is_refused() -> None:
    class Lazy(Mixup):
        def __call__(self, inputs: Tensor, targets: Tensor, draw: Any) -> Any:
            return inputs, targets

    message = refusal(training(Reals(), transforms=[Lazy()]), 0)
    assert message.startswith("transform Lazy fails on inputs of shape (33, 2): ")
    assert message.endswith("of 32 samples and one more it makes 33")


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (Synthetic("tokens"), "mixup needs inputs of real numbers, and these are torch.int64"),
        (Classes(), "mixup needs one class a sample or targets of real numbers"),
    ],
)
def test_what_cannot_be_mixed_is_refused_in_words(dataset: Any, words: str) -> None:
    message = refusal(training(dataset, transforms=[Mixup()]), 0)
    assert message.startswith("transform Mixup fails on inputs of shape (33, ")
    assert words in message


def test_augmentation_differs_between_epochs_and_between_transforms_of_one_kind() -> None:
    class Noise:
        random = True

        def __call__(self, inputs: Tensor, draw: Any) -> Tensor:
            return torch.cat([inputs, torch.from_numpy(draw(0))[:, None].float()], 1)

    found = inputs_of(Items(), 1, None, 0, transforms=[Noise(), Noise()])
    draws = [value for inputs in found.values() for value in inputs[2:]]
    assert {epoch for epoch, _ in found} >= {0, 1, 2}
    assert len(set(draws)) == len(draws) == 2 * 4 * 32


@pytest.mark.parametrize(("world_size", "micro_batch_size", "workers"), DIVISIONS)
def test_a_dataset_that_draws_by_itself_draws_the_same_however_the_work_is_divided(
    world_size: int, micro_batch_size: int | None, workers: int
) -> None:
    expected = inputs_of(Drawing(), 1, None, 0)
    assert len({tuple(inputs) for inputs in expected.values()}) == len(expected)
    assert inputs_of(Drawing(), world_size, micro_batch_size, workers) == expected


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "dataset",
    [DrawingTogether(), Subset(Drawing(), range(40)), DrawingInGather()],
    ids=["own", "subset", "gather"],
)
def test_a_dataset_that_draws_batch_by_batch_draws_the_same_after_a_resume(dataset: Any, workers: int) -> None:
    undisturbed = inputs_of(dataset, 1, None, 0)
    seed_everything(99)  # whatever a start has drawn before its first step
    resumed = inputs_of(dataset, 1, None, workers, start=2)
    assert resumed == {key: undisturbed[key] for key in resumed}


def test_random_transforms_are_left_out_of_evaluation_and_others_are_not() -> None:
    (batch,) = EvaluationSteps(Digits(), 50, 0, 1, [Crop(2), Flip(1.0), Normalise(0.5, 2.0)])[0]
    assert torch.equal(batch.input, (Digits().inputs[:50] - 0.5) / 2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1797, 3])
@pytest.mark.parametrize("batch_size", [1000, 64])
def test_evaluation_covers_every_sample_once_in_as_many_batches_on_each_rank(
    world_size: int, size: int, batch_size: int
) -> None:
    dataset = Subset(Digits("all"), range(size))
    ranks = [EvaluationSteps(dataset, batch_size, rank, world_size) for rank in range(world_size)]
    read = [[batch for (batch,) in batches(steps, 0, len(steps), 0, CPU)] for steps in ranks]
    assert len({len(rank) for rank in read}) == 1
    assert np.concatenate([batch.indices for rank in read for batch in rank]).tolist() == list(range(size))
    for batch in (batch for rank in read for batch in rank if len(batch.indices)):
        assert torch.equal(batch.input, Digits("all").inputs[torch.from_numpy(batch.indices)])


def test_a_rank_without_samples_still_has_inputs_for_its_model() -> None:
    (batch,) = EvaluationSteps(Items(3), 8, 0, 5)[0]
    assert (len(batch.indices), batch.input.shape) == (0, (1, 2))


def test_evaluation_of_a_split_names_samples_by_their_number_in_the_whole() -> None:
    _, val = held_out(Items(), 0.5, seed=1)
    (batch,) = EvaluationSteps(val, 99, 0, 1)[0]
    assert batch.indices.tolist() == val.original(np.arange(20)).tolist()
    assert batch.target.tolist() == [10 * index for index in batch.indices]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        (Broken(), "own/files"),
        (held_out(Broken(), 0.3, seed=4)[0], "own/files"),
        (Subset(Broken(), range(40)), "Subset"),
    ],
    ids=["items", "split", "getitems"],
)
@pytest.mark.parametrize("evaluation", [False, True])
def test_a_sample_that_cannot_be_read_is_named_with_its_source(
    dataset: Any, name: str, workers: int, evaluation: bool
) -> None:
    steps = EvaluationSteps(dataset, 8, 0, 1) if evaluation else training(dataset)
    assert f"sample 17 of {name} cannot be read: OSError: the disk is gone" in refusal(steps, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_that_do_not_fit_together_are_named(workers: int) -> None:
    message = refusal(training(Ragged()), workers)
    assert re.match(r"samples \[\d+, .*\] of own/files cannot be put into one batch: ", message)


def drawn(*columns: list[float]) -> Any:
    return lambda number: np.array(columns[number])


@pytest.mark.parametrize(("row", "column"), [(row, column) for row in (0, 1, 2) for column in (0, 1, 2)])
def test_crop_shifts_each_image_by_its_own_draw_and_zeros_come_in(row: int, column: int) -> None:
    images = torch.arange(1.0, 25).view(2, 1, 3, 4)
    changed = Crop(1)(images, drawn([row / 3 + 0.1, 0.5], [column / 3 + 0.1, 0.5]))
    padded = torch.zeros(5, 6)
    padded[1:4, 1:5] = images[0, 0]
    assert torch.equal(changed[0, 0], padded[row : row + 3, column : column + 4])
    assert torch.equal(changed[1], images[1])  # the middle draw is no shift


@pytest.mark.parametrize(("p", "flipped"), [(0.0, []), (0.5, [0, 1]), (1.0, [0, 1, 2])])
def test_flip_mirrors_left_to_right_with_its_probability(p: float, flipped: list[int]) -> None:
    images = torch.rand(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = images.clone()
    expected[flipped] = images[flipped].flip(3)
    assert torch.equal(Flip(p)(images, drawn([0.0, 0.49, 0.5 if p < 1 else 0.999])), expected)


@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (5, 3)])
def test_normalise_takes_one_value_a_channel_or_one_for_all(shape: tuple[int, ...]) -> None:
    inputs = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    by_channel = Normalise([0.1, 0.2, 0.3], [1.0, 2.0, 4.0])(inputs, drawn())
    for channel, (mean, std) in enumerate([(0.1, 1.0), (0.2, 2.0), (0.3, 4.0)]):
        torch.testing.assert_close(by_channel[:, channel], (inputs[:, channel] - mean) / std)
    torch.testing.assert_close(Normalise(0.5, 0.25)(inputs, drawn()), (inputs - 0.5) * 4)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: Crop(0), "padding is 0 pixels; use at least 1"),
        (lambda: Flip(5.0), "p is 5.0; a probability is at least 0 and at most 1"),
        (lambda: Flip(-1.0), "p is -1.0"),
        (lambda: Flip(nan), "p is nan"),
        (lambda: Mixup(0.0), "alpha is 0.0; it must be above 0"),
        (lambda: Mixup(nan), "alpha is nan"),
        (lambda: Mixup(inf), "alpha is inf"),
        (lambda: Normalise(0.0, 0.0), "std is 0.0; every value must be above 0"),
        (lambda: Normalise([0, 0], [1, -1]), r"std is \[1, -1\]"),
        (lambda: Normalise(0.0, nan), "std is nan"),
        (lambda: Normalise(nan, 1.0), "give finite numbers"),
        (lambda: Normalise(0.0, inf), "give finite numbers"),
        (lambda: Normalise([0.1, 0.2], [1.0] * 3), "one for all channels or one for each"),
        (lambda: Normalise([], 1.0), "one for all channels or one for each"),
    ],
)
def test_a_transform_that_could_not_work_is_refused(wrong: Any, words: str) -> None:
    with pytest.raises(JobError, match=words):
        wrong()


def test_a_worker_that_its_fork_has_left_with_a_held_lock_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if another thread had held a lock in the moment of the fork: the first worker waits for ever."""
    loaders: list[Any] = []

    def made(*arguments: Any, **options: Any) -> Any:
        loaders.append(DataLoader(*arguments, **options))
        return loaders[-1]

    def stuck_at_first(start: int, worker: int) -> None:
        if len(loaders) == 1:
            threading.Event().wait()
        os.write(start, b".")

    monkeypatch.setattr(workers, "_START_S", 2.0)
    monkeypatch.setattr(workers, "_worker_starts", stuck_at_first)
    monkeypatch.setattr(workers, "DataLoader", made)
    steps = TrainingSteps(Items(), ElasticDistributedSampler(range(40), 1, 0, global_batch_size=8))
    assert len(list(batches(steps, 0, 4, 2, CPU))) == 4
    assert len(loaders) == 2


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_workers_start_whatever_way_python_starts_processes_by_default(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_START_S", 3.0)
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        assert len(list(batches(training(Items(), batch=8), 0, 2, 1, CPU))) == 2
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_workers_that_never_start_are_said_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_START_S", 0.5)
    monkeypatch.setattr(workers, "_worker_starts", lambda start, worker: threading.Event().wait())
    steps = TrainingSteps(Items(), ElasticDistributedSampler(range(40), 1, 0, global_batch_size=8))
    with pytest.raises(RunError, match="3 times a loader worker has not started within"):
        list(batches(steps, 0, 4, 1, CPU))


class Unsendable(WholeBatches):
    """What it reads cannot go from one process to another."""

    collate_fn = staticmethod(lambda samples: samples)

    def __getitems__(self, indices: list[int]) -> Any:
        return torch.zeros(len(indices)), threading.Lock()


def test_a_worker_that_cannot_hand_on_a_step_ends_and_is_not_waited_for() -> None:
    reads = """
from tests.test_loader import CPU, ElasticDistributedSampler, TrainingSteps, Unsendable, batches

steps = TrainingSteps(Unsendable(), ElasticDistributedSampler(range(40), 1, 0, global_batch_size=8))
list(batches(steps, 0, 4, 1, CPU))
"""
    as_a_rank = [sys.executable, "-X", "faulthandler", "-c", reads]
    ended = subprocess.run(as_a_rank, capture_output=True, text=True, timeout=60, check=False)
    assert "is killed by signal: Aborted" in ended.stderr
    assert "Fatal Python error" not in ended.stderr  # stacks written beside a running thread end in SIGSEGV at times


def test_workers_whose_steps_have_no_room_in_shared_memory_are_refused() -> None:
    free = shutil.disk_usage("/dev/shm").free
    refuse_small_memory([free // 8] * 7, workers=2, ranks=1)
    with pytest.raises(JobError, match=r"data.workers=2 hand on up to .* MiB at a time through /dev/shm, where"):
        refuse_small_memory([free // 6] * 7, workers=2, ranks=1)
    with pytest.raises(JobError, match=r"or set a smaller eval.batch_size or fewer workers, data.workers=0 for none"):
        refuse_small_memory([free // 8] * 7, workers=2, ranks=2)


def test_what_evaluation_holds_in_shared_memory_is_added_to_what_training_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = SimpleNamespace(f_bavail=64 << 8, f_frsize=4096)  # 64 MiB, a container's default
    monkeypatch.setattr(workers.os, "statvfs", lambda path: free)
    steps = training(Synthetic(size=45_000, shape=(3, 32, 32)), batch=128)
    val, short = (EvaluationSteps(Synthetic(size=size, shape=(3, 32, 32)), 1000, 0, 1) for size in (5000, 1000))
    check_workers(steps, [short], workers=2, ranks=1)  # which is one step, whatever workers could hold
    with pytest.raises(JobError, match="data.workers=2 hand on up to 69.2 MiB at a time"):
        check_workers(steps, [short, val], workers=2, ranks=1)
    check_workers(steps, [val], workers=0, ranks=8)
