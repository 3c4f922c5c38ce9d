"""Nanoseconds an index and memory of the stream, beside torch's own sampler. `make bench`."""

import sys
import time
import tracemalloc
from collections.abc import Callable
from statistics import median

import numpy as np
from torch.utils.data import DistributedSampler

from toolkit.datasets.sampler import ElasticDistributedSampler

ROUNDS, BOUND_NS, BULK = 5, 2000.0, 1_000_000


class Sized:
    """A dataset of which only the length is asked."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


def ours(size: int) -> int:
    """Draw a million indices, in the blocks that training draws."""
    sampler = ElasticDistributedSampler(Sized(size), 1, 0, global_batch_size=1024)
    drawn = 0
    while drawn < BULK:
        block = sampler.block(drawn // 1024)
        drawn += len(block.indices)
        assert int(block.indices.max()) < size
    return drawn


def torchs(size: int) -> int:
    """One epoch of torch's sampler, which shuffles all indices into a list."""
    indices = list(DistributedSampler(Sized(size), 1, 0))  # type: ignore[arg-type]
    return len(indices)


def measured(draw: Callable[[int], int], size: int) -> tuple[float, float]:
    """(nanoseconds an index, peak MiB of Python and NumPy memory)."""
    times = []
    for _ in range(ROUNDS):
        start_s = time.process_time()
        drawn = draw(size)
        times.append((time.process_time() - start_s) / drawn * 1e9)
    tracemalloc.start()
    draw(size)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return median(times), peak / 2**20


def main() -> int:
    np.seterr(all="raise", over="ignore")
    print(f"{'samples':>16}{'ours ns':>10}{'MiB':>8}{'torch ns':>10}{'MiB':>8}")
    peaks, over = [], False
    for exponent in (3, 6, 7, 12):
        nanoseconds, mebibytes = measured(ours, 10**exponent)
        beside = "".join(
            f"{value:{width}.{digits}f}"
            for value, width, digits in zip(measured(torchs, 10**exponent), (10, 8), (0, 1), strict=True)
        ) if exponent <= 7 else "   cannot: a list of all indices"  # fmt: skip
        print(f"{10**exponent:16,}{nanoseconds:10.0f}{mebibytes:8.1f}{beside}", flush=True)
        peaks.append(mebibytes)
        over |= nanoseconds > BOUND_NS
    print(f"bound {BOUND_NS:.0f} ns an index; memory at 10^12 is {peaks[-1] / peaks[0]:.2f} x that at 10^3")
    return int(over or peaks[-1] > 1.1 * peaks[0])


if __name__ == "__main__":
    sys.exit(main())
