"""The endless stream of samples, as a function (law 2): nothing here has a state, so resuming is arithmetic.

Position p of the stream is sample `order(size, seed, e, i)` with `e, i = divmod(p, size)`. `order` is a bijection of
0..size-1 for each (seed, epoch), evaluated at any index in O(1) time and memory: a Feistel network over the mixed radix
a*b >= size with a, b near its root, and cycle walking for the few values beyond size (Black and Rogaway, "Ciphers with
Arbitrary Finite Domains", CT-RSA 2002). Its round function is the finaliser of SplitMix64 (Steele, Lea and Flood,
"Fast Splittable Pseudorandom Number Generators", OOPSLA 2014).
"""

from collections.abc import Sequence
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from toolkit.randomness import GOLDEN, mix

Int64s = NDArray[np.int64]
Uint64s = NDArray[np.uint64]

_HALF_ROUNDS = 16  # at 12 the 120 orders of five samples are not yet equally frequent; at 16 they are


def mix_all(values: Uint64s) -> Uint64s:
    """`mix` of each element of a uint64 array of one dimension or more."""
    mixed = values + np.uint64(GOLDEN)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def order(size: int, seed: int, epochs: Int64s, positions: Int64s) -> Int64s:
    """The sample at each position 0..size-1 of each epoch: for fixed (seed, epoch) a permutation of 0..size-1."""
    rows = isqrt(size - 1) + 1
    columns = -(-size // rows)
    keys = mix_all(epochs.astype(np.uint64) + np.uint64(mix(seed)))
    shuffled = _feistel(rows, columns, keys, positions.astype(np.uint64))
    outside = np.flatnonzero(shuffled >= size)
    while outside.size:  # walk the cycle: some value inside is reached, and no two walks meet
        shuffled[outside] = _feistel(rows, columns, keys[outside], shuffled[outside])
        outside = outside[shuffled[outside] >= size]
    return shuffled.astype(np.int64)


def batch_numbers(steps: Int64s, skipped: Sequence[int]) -> Int64s:
    """The batch that each step takes: of all whose numbers are not in `skipped`, which is sorted, the step-th."""
    earlier = np.asarray(skipped, np.int64) - np.arange(
        len(skipped)
    )  # the first step that each no longer stands before
    return steps + np.searchsorted(earlier, steps, side="right")


def _feistel(rows: int, columns: int, keys: Uint64s, values: Uint64s) -> Uint64s:
    left, right = np.divmod(values, np.uint64(columns))
    for half_round in range(_HALF_ROUNDS):
        constant = np.uint64(mix(half_round))
        if half_round % 2:
            right = _added(right, mix_all((left ^ keys) + constant), columns)
        else:
            left = _added(left, mix_all((right ^ keys) + constant), rows)
    return left * np.uint64(columns) + right


def _added(values: Uint64s, hashes: Uint64s, modulus: int) -> Uint64s:
    """(values + hashes scaled to 0..modulus-1) modulo modulus, without a division."""
    hashes >>= np.uint64(32)
    hashes *= np.uint64(modulus)
    hashes >>= np.uint64(32)
    hashes += values
    hashes -= (hashes >= modulus) * np.uint64(modulus)
    return hashes


def sample_keys(seed: int, epochs: Int64s, indices: Int64s) -> Uint64s:
    """A 64-bit key for each (seed, epoch, sample): what augmentation draws from, on whichever rank the sample lands."""
    per_epoch = mix_all(epochs.astype(np.uint64) + np.uint64(mix(seed ^ GOLDEN)))
    return mix_all(per_epoch ^ indices.astype(np.uint64))


def uniform(keys: Uint64s, draw: int) -> NDArray[np.float64]:
    """The `draw`-th number in [0, 1) of each key: 53 random bits, as in SplitMix64's nextDouble."""
    bits = mix_all(keys + np.uint64(mix(draw)))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
