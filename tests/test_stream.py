"""The endless stream (law 2): a bijection each epoch, shuffled as by chance, and a function that never changes.

The seeds are fixed and a statistic may lie anywhere a fair shuffle puts it but once in 5000 times.
"""

import tracemalloc
from collections.abc import Callable
from math import sqrt
from typing import Any

import numpy as np
import pytest

from toolkit.datasets.sampler import ElasticDistributedSampler
from toolkit.datasets.stream import mix_all, order, sample_keys, uniform
from toolkit.randomness import GOLDEN, derive, mix

UNREMARKABLE = 3.719  # a standard normal number lies beyond with p = 1e-4 on each side
SEEDS = (0, 1, 2**63 + 11)


def epoch_of(size: int, seed: int, epoch: int) -> Any:
    return order(size, seed, np.full(size, epoch), np.arange(size))


def epochs_of(size: int, seed: int, count: int) -> Any:
    """(count, size): one epoch a row, all asked for in one call."""
    flat = order(size, seed, np.repeat(np.arange(count), size), np.tile(np.arange(size), count))
    return flat.reshape(count, size)


def z_of_chi_square(statistic: float, freedom: int) -> float:
    """A chi-square value as a standard normal one (Wilson and Hilferty, 1931)."""
    return ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / sqrt(2 / (9 * freedom))


def z_of_counts(counts: Any) -> float:
    """How far counts are from all equal."""
    expected = counts.sum() / counts.size
    return z_of_chi_square(float(((counts - expected) ** 2 / expected).sum()), counts.size - 1)


def z_of_positions(shuffles: Any) -> float:
    """How far the samples of many shuffles (count, size) are from equally frequent at each position."""
    count, size = shuffles.shape
    cells = np.bincount((np.arange(size) * size + shuffles).ravel(), minlength=size**2)
    statistic = ((cells - count / size) ** 2).sum() * size / count
    return z_of_chi_square(float(statistic) * (size - 1) / size, (size - 1) ** 2)  # rows and columns have fixed sums


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1797, 10**6])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("epoch", [0, 1, 10**6])
def test_an_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(epoch_of(size, seed, epoch)), np.arange(size))


def test_one_call_may_straddle_epochs() -> None:
    epochs, within = np.divmod(np.arange(25, 85), 30)
    whole = np.concatenate([epoch_of(30, 4, epoch) for epoch in range(3)])
    assert np.array_equal(order(30, 4, epochs, within), whole[25:85])


def test_a_position_alone_gives_what_it_gives_in_a_crowd() -> None:
    whole = epoch_of(1797, 3, 5)
    alone = [order(1797, 3, np.array([5]), np.array([at]))[0] for at in range(1797)]
    assert np.array_equal(alone, whole)


@pytest.mark.parametrize(
    ("size", "seed", "epoch", "positions", "samples"),
    [
        (10, 0, 0, range(10), [6, 2, 7, 0, 8, 5, 3, 1, 9, 4]),
        (10, 0, 1, range(10), [8, 3, 2, 9, 6, 4, 1, 0, 5, 7]),
        (1797, 7, 3, range(6), [711, 803, 1473, 456, 646, 1150]),
        (
            10**12, 2**63 + 11, 123456, [0, 1, 10**12 - 1, 5 * 10**11],
            [803521074696, 358776107794, 163436508886, 980539265890],
        ),
    ],
)  # fmt: skip
def test_the_order_is_the_one_that_old_runs_resume_with(
    size: int, seed: int, epoch: int, positions: Any, samples: list[int]
) -> None:
    asked = np.array(positions)
    assert order(size, seed, np.full_like(asked, epoch), asked).tolist() == samples


def test_augmentation_draws_are_the_ones_that_old_runs_resume_with() -> None:
    keys = sample_keys(3, np.array([0, 1]), np.array([5, 5]))
    assert keys.tolist() == [4433665154786406750, 15705953338590284256]
    assert uniform(keys, 0).tolist() == pytest.approx([0.66816868, 0.45611181], abs=1e-8)


def test_mix_gives_the_published_numbers_of_splitmix64() -> None:
    states = [0, GOLDEN, 2 * GOLDEN % 2**64]
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [mix(state) for state in states] == published
    assert mix_all(np.array(states, np.uint64)).tolist() == published


def test_a_derived_seed_depends_on_each_value_and_their_order() -> None:
    seeds = {derive(*values) for values in [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**64 for seed in seeds)


@pytest.mark.parametrize("size", [3, 7, 10, 16])
def test_over_epochs_every_sample_comes_at_every_position_equally_often(size: int) -> None:
    assert abs(z_of_positions(epochs_of(size, 1, 20_000))) < UNREMARKABLE


@pytest.mark.parametrize("size", [3, 10])
def test_over_seeds_every_sample_comes_at_every_position_equally_often(size: int) -> None:
    assert abs(z_of_positions(np.array([epoch_of(size, seed, 0) for seed in range(3000)]))) < UNREMARKABLE


@pytest.mark.parametrize("seed", SEEDS)
def test_all_120_orders_of_five_samples_are_equally_frequent(seed: int) -> None:
    shuffles = epochs_of(5, seed, 60_000)
    _, counts = np.unique(shuffles @ 5 ** np.arange(5), return_counts=True)
    assert len(counts) == 120
    assert abs(z_of_counts(counts)) < UNREMARKABLE


@pytest.mark.parametrize(
    "shuffle",
    [
        pytest.param(lambda number: epoch_of(1797, 2, number), id="epochs"),
        pytest.param(lambda number: epoch_of(1797, number, 2), id="seeds"),
    ],
)
def test_successive_shuffles_are_uncorrelated(shuffle: Callable[[int], Any]) -> None:
    shuffles = [shuffle(number) for number in range(201)]
    pairs = zip(shuffles, [*shuffles[1:], np.arange(1797)], strict=True)  # the last one against no shuffle at all
    z = np.array([np.corrcoef(*pair)[0, 1] * sqrt(1796) for pair in pairs])
    assert np.abs(z).max() < 4.5  # the largest of 201
    assert abs(z_of_chi_square(float((z**2).sum()), len(z))) < UNREMARKABLE


def test_of_a_trillion_samples_indices_are_in_range_distinct_and_spread() -> None:
    within = np.arange(10**5) + 10**11
    samples = order(10**12, 5, np.full(10**5, 3), within)
    assert samples.min() >= 0
    assert samples.max() < 10**12
    assert len(np.unique(samples)) == 10**5
    assert abs(z_of_counts(np.bincount(samples // 10**10, minlength=100))) < UNREMARKABLE


def test_memory_of_a_block_is_the_same_for_a_thousand_and_for_a_trillion_samples() -> None:
    def peak(size: int) -> int:
        sampler = ElasticDistributedSampler(range(size), global_batch_size=256)
        sampler.block(0)
        tracemalloc.start()
        try:
            sampler.block(10**6)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(10**12) == pytest.approx(peak(10**3), rel=0.1)


def test_each_seed_epoch_and_sample_has_a_key_of_its_own() -> None:
    epochs, samples = (axis.ravel() for axis in np.meshgrid(np.arange(50), np.arange(200)))
    keys = np.concatenate([sample_keys(seed, epochs, samples) for seed in range(10)])
    assert len(np.unique(keys)) == len(keys)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("draw", [0, 1, 1 << 16])
def test_draws_are_uniform_over_samples_and_over_epochs(seed: int, draw: int) -> None:
    many, fixed = np.arange(100_000), np.full(100_000, 7)
    for keys in (sample_keys(seed, fixed, many), sample_keys(seed, many, fixed)):
        values = uniform(keys, draw)
        assert values.min() >= 0
        assert values.max() < 1
        assert abs(z_of_counts(np.bincount((values * 100).astype(int), minlength=100))) < UNREMARKABLE


def test_the_largest_draw_is_below_one() -> None:
    def unmixed(bits: int) -> int:
        """The input for which `mix` gives `bits`."""
        bits ^= bits >> 31 ^ bits >> 62
        bits = bits * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
        bits ^= bits >> 27 ^ bits >> 54
        bits = bits * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
        bits ^= bits >> 30 ^ bits >> 60
        return (bits - GOLDEN) % 2**64

    key = (unmixed(2**64 - 1) - mix(0)) % 2**64
    assert uniform(np.array([key], np.uint64), 0).tolist() == [1 - 2.0**-53]


@pytest.mark.parametrize(("draw", "other"), [(0, 1), (1, 2), (0, 1 << 16)])
def test_two_draws_of_one_sample_are_independent(draw: int, other: int) -> None:
    keys = sample_keys(0, np.zeros(100_000, np.int64), np.arange(100_000))
    cells = (uniform(keys, draw) * 10).astype(int) * 10 + (uniform(keys, other) * 10).astype(int)
    assert abs(z_of_counts(np.bincount(cells, minlength=100))) < UNREMARKABLE
