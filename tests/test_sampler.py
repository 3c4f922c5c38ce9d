"""`ElasticDistributedSampler`: the same samples a step at any number of ranks, in anyone's loop."""

from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from toolkit.datasets import sampler as sampler_module
from toolkit.datasets.sampler import ElasticDistributedSampler

SIZE, BATCH, EPOCHS = 53, 10, 3
STEPS = 16  # ceil(3 * 53 / 10): the last batch straddles into a fourth epoch
DATA = TensorDataset(torch.arange(SIZE))

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # two workers on a machine of one core


def world_of(world_size: int, size: int = SIZE, batch: int = BATCH, **options: Any) -> list[ElasticDistributedSampler]:
    """The samplers of all ranks."""
    return [
        ElasticDistributedSampler(range(size), world_size, rank, global_batch_size=batch, **options)
        for rank in range(world_size)
    ]


def global_batch(samplers: list[ElasticDistributedSampler], step: int) -> list[int]:
    """What all ranks read in one step, in the order of ranks."""
    return list(chain.from_iterable(sampler.share(step)[1].tolist() for sampler in samplers))


def stream(steps: int, size: int = SIZE, batch: int = BATCH, **options: Any) -> tuple[Any, Any]:
    """(epochs, samples) of the first steps of a world of one."""
    (alone,) = world_of(1, size, batch, **options)
    epochs, samples = zip(*(alone.share(step) for step in range(steps)), strict=True)
    return np.concatenate(epochs), np.concatenate(samples)


def looped(world_size: int, workers: int, start: int = 0) -> list[list[int]]:
    """The global batches that ranks read in a plain PyTorch loop that starts at a step, each in the order of ranks."""
    ranks = []
    for rank in range(world_size):
        sampler = ElasticDistributedSampler(DATA, world_size, rank, global_batch_size=BATCH)
        loader = DataLoader(
            DATA, batch_size=sampler.batch_size, sampler=sampler, num_workers=workers, generator=torch.Generator()
        )
        sampler.set_step(start)
        seen = []
        for epoch in range(sampler.epoch, EPOCHS):
            sampler.set_epoch(epoch)
            seen += [batch.tolist() for (batch,) in loader]
        ranks.append(seen)
    return [list(chain(*shares)) for shares in zip(*ranks, strict=True)]


def test_it_is_a_distributed_sampler_as_frameworks_look_for_one() -> None:
    assert isinstance(world_of(1)[0], DistributedSampler)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("batch", [7, 10, 13, 128])
def test_shares_are_contiguous_parts_of_one_global_batch_whatever_the_world(world_size: int, batch: int) -> None:
    alone, samplers = world_of(1, batch=batch), world_of(world_size, batch=batch)
    for step in (0, 1, 5, 40, 10**6):
        assert global_batch(samplers, step) == global_batch(alone, step)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("batch", [7, 10, 13, 128])
def test_shares_differ_by_at_most_one_sample(world_size: int, batch: int) -> None:
    sizes = [sampler.batch_size for sampler in world_of(world_size, batch=batch)]
    assert sizes == [len(sampler.share(3)[1]) for sampler in world_of(world_size, batch=batch)]
    assert sum(sizes) == batch
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("size", "batch"), [(53, 10), (50, 10), (4, 10), (1, 3)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_each_sample_comes_once_an_epoch(size: int, batch: int, shuffle: bool) -> None:
    epochs, samples = stream(-(-5 * size // batch), size, batch, shuffle=shuffle)
    assert np.array_equal(epochs[: 5 * size], np.repeat(np.arange(5), size))
    assert (np.sort(samples[: 5 * size].reshape(5, size)) == np.arange(size)).all()


@pytest.mark.parametrize(
    ("size", "step", "expected"), [(53, 5, [0] * 3 + [1] * 7), (4, 0, [0] * 4 + [1] * 4 + [2] * 2)]
)
def test_a_batch_straddles_epochs_and_is_full(size: int, step: int, expected: list[int]) -> None:
    assert world_of(1, size)[0].share(step)[0].tolist() == expected


def test_the_order_depends_on_epoch_and_seed() -> None:
    epochs, samples = stream(STEPS)
    _, others = stream(STEPS, seed=1)
    assert samples[epochs == 0].tolist() != samples[epochs == 1].tolist()
    assert samples.tolist() != others.tolist()


def test_without_shuffle_the_samples_come_in_their_own_order() -> None:
    _, samples = stream(STEPS, shuffle=False)
    assert np.array_equal(samples, np.arange(STEPS * BATCH) % SIZE)


@pytest.mark.parametrize("world_size", [1, 3])
def test_drop_last_makes_no_difference(world_size: int) -> None:
    keeping, dropping = (world_of(world_size, drop_last=drop_last) for drop_last in (False, True))
    assert [list(sampler) for sampler in keeping] == [list(sampler) for sampler in dropping]
    assert [len(sampler) for sampler in keeping] == [len(sampler) for sampler in dropping]


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_plain_loop_reads_the_stream(world_size: int, workers: int) -> None:
    _, samples = stream(STEPS)
    assert looped(world_size, workers) == samples.reshape(STEPS, BATCH).tolist()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world_size", "start"), [(1, 8), (2, 5), (4, 6)])
def test_a_loop_resumed_at_any_world_size_goes_on_where_the_undisturbed_one_was(
    world_size: int, start: int, workers: int
) -> None:
    assert looped(world_size, workers, start) == looped(2, 0)[start:]


@pytest.mark.parametrize("start", range(STEPS))
def test_a_loop_may_resume_at_every_step(start: int) -> None:
    assert looped(1, 0, start) == looped(1, 0)[start:]


@pytest.mark.parametrize("world_size", [1, 3, 7])
@pytest.mark.parametrize("start", [0, 5, 6, 8])
def test_len_is_the_number_of_samples_still_to_come_in_the_epoch(world_size: int, start: int) -> None:
    for sampler in world_of(world_size):
        sampler.set_step(start)
        assert len(sampler) == len(list(sampler))
        assert len(sampler) % sampler.batch_size == 0
        sampler.set_epoch(2)
        assert len(sampler) == len(list(sampler)) == 5 * sampler.batch_size  # steps 11 to 15


def test_the_epochs_of_a_loader_have_as_many_batches_as_steps() -> None:
    sampler = ElasticDistributedSampler(DATA, global_batch_size=BATCH)
    loader = DataLoader(DATA, batch_size=sampler.batch_size, sampler=sampler)
    lengths = []
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        lengths.append(len(loader))
    assert lengths == [6, 5, 5]
    assert sum(lengths) == sampler.first_step(EPOCHS) == STEPS


def test_an_epoch_in_which_no_batch_starts_is_empty() -> None:
    (sampler,) = world_of(1, size=4, batch=10)  # the batch of step 0 covers epochs 0, 1 and half of 2
    sampler.set_epoch(1)
    assert len(sampler) == len(list(sampler)) == 0


def test_an_empty_dataset_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="the dataset is empty"):
        world_of(1, size=0)


@pytest.mark.parametrize(("batch", "world_size"), [(3, 4), (0, 1)])
def test_a_batch_smaller_than_the_world_is_refused_in_words(batch: int, world_size: int) -> None:
    with pytest.raises(ValueError, match=rf"global_batch_size {batch} is less than .*use at least {world_size}"):
        world_of(world_size, batch=batch)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_state_taken_in_one_world_goes_on_in_another(world_size: int) -> None:
    before, after = ElasticDistributedSampler(range(SIZE), global_batch_size=BATCH), world_of(world_size)
    before.set_step(8)
    for sampler in after:
        sampler.load_state_dict(before.state_dict())
        assert (sampler.epoch, sampler.step) == (before.epoch, before.step) == (1, 8)
    steps = [list(sampler) for sampler in after]
    assert sorted(chain(*steps)) == sorted(before)


def test_the_world_defaults_to_that_of_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"is_initialized": True, "get_world_size": 4, "get_rank": 2}.items():
        monkeypatch.setattr(sampler_module.dist, name, lambda value=value: value)
    own, expected = ElasticDistributedSampler(range(SIZE), global_batch_size=BATCH), world_of(4)[2]
    assert own.share(7)[1].tolist() == expected.share(7)[1].tolist()
