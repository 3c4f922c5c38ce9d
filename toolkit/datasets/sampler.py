"""`ElasticDistributedSampler`: law 2 as a sampler that drops into anyone's loop.

sampler = ElasticDistributedSampler(dataset, global_batch_size=256, seed=0)
loader = DataLoader(dataset, batch_size=sampler.batch_size, sampler=sampler)
sampler.set_step(steps_done)                     # after a restart, at any number of ranks
for epoch in range(sampler.epoch, epochs):
    sampler.set_epoch(epoch)
    for inputs, targets in loader: ...
"""

from collections.abc import Iterator, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from torch.utils.data import DistributedSampler

from toolkit.datasets.stream import Int64s, batch_numbers, order

_BLOCK = 8192  # positions computed at once: the cost of one NumPy call is shared, the memory stays small


class Block(NamedTuple):
    """One rank's samples of several steps on end."""

    steps: range
    batch_size: int
    epochs: Int64s
    indices: Int64s

    def share(self, step: int) -> tuple[Int64s, Int64s]:
        """The (epochs, sample indices) of one of its steps, each of shape (batch_size,)."""
        at = (step - self.steps.start) * self.batch_size
        return self.epochs[at : at + self.batch_size], self.indices[at : at + self.batch_size]


class ElasticDistributedSampler(DistributedSampler[int]):
    """Every rank's share of every global batch, the same samples a step at any number of ranks.

    Step s takes positions [s*B, (s+1)*B) of the endless stream, B = `global_batch_size`. Every batch is full; a batch
    may straddle two epochs; each sample comes once an epoch. Rank r of W gets the contiguous share from r*B//W to
    (r+1)*B//W of the batch. Nothing is padded and nothing dropped, so `drop_last` makes no difference.

    `num_replicas` and `rank` default to the process group's, or to a world of one.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        *,
        global_batch_size: int,
    ) -> None:
        grouped = dist.is_available() and dist.is_initialized()
        world_size = num_replicas if num_replicas is not None else dist.get_world_size() if grouped else 1
        rank = rank if rank is not None else dist.get_rank() if grouped else 0
        if len(dataset) == 0:
            raise ValueError("the dataset is empty; a stream needs at least one sample")
        if global_batch_size < world_size:
            raise ValueError(
                f"global_batch_size {global_batch_size} is less than the {world_size} ranks; use at least {world_size}"
            )
        super().__init__(dataset, world_size, rank, shuffle, seed, drop_last)  # type: ignore[arg-type]
        self.size = len(dataset)
        self.global_batch_size = global_batch_size
        self.first = rank * global_batch_size // world_size
        self.batch_size = (rank + 1) * global_batch_size // world_size - self.first
        self.step = 0
        self.skip(())

    def skip(self, skipped: Sequence[int]) -> None:
        """From now on the batches of these numbers are left out, whose steps take the next ones."""
        self.skipped = sorted(skipped)
        self._block = Block(range(0), self.batch_size, np.empty(0, np.int64), np.empty(0, np.int64))

    def share(self, step: int) -> tuple[Int64s, Int64s]:
        """This rank's (epochs, sample indices) of a step, each of shape (batch_size,)."""
        if step not in self._block.steps:
            self._block = self.block(step)
        return self._block.share(step)

    def batch_number(self, step: int) -> int:
        """Which batch of the stream a step takes: positions [n*B, (n+1)*B). It is the step's own if none is skipped."""
        return int(batch_numbers(np.array([step]), self.skipped)[0])

    def block(self, step: int, beyond: int = 0) -> Block:
        """This rank's shares of `step` and of some steps after it, computed together.

        Each ends with the `beyond` samples that follow it in its global batch, after whose last comes its first.
        """
        steps = range(step, step + max(1, _BLOCK // self.batch_size))
        numbers = batch_numbers(np.arange(steps.start, steps.stop, dtype=np.int64), self.skipped)
        places = (self.first + np.arange(self.batch_size + beyond)) % self.global_batch_size
        positions = (numbers[:, None] * self.global_batch_size + places).ravel()
        epochs, within = np.divmod(positions, self.size)
        indices = order(self.size, self.seed, epochs, within) if self.shuffle else within
        return Block(steps, len(places), epochs, indices)

    def first_step(self, epoch: int) -> int:
        """The first step whose batch starts in this epoch or later."""
        return -(-epoch * self.size // self.global_batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Iterate over the steps that start in `epoch`; those that `set_step` has already passed are left out."""
        if epoch != self.epoch:
            self.epoch, self.step = epoch, self.first_step(epoch)

    def set_step(self, step: int) -> None:
        """Go on at a step, counted from the start of training: pure arithmetic, whatever the world was before."""
        self.epoch, self.step = step * self.global_batch_size // self.size, step

    def __iter__(self) -> Iterator[int]:
        for step in range(self.step, self.first_step(self.epoch + 1)):
            yield from self.share(step)[1].tolist()

    def __len__(self) -> int:
        return (self.first_step(self.epoch + 1) - self.step) * self.batch_size

    def state_dict(self) -> dict[str, Any]:
        """Where iteration starts; the place within an epoch is known to the loop, which counts its steps."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.set_step(state["step"])
