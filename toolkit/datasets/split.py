"""A share of a dataset, by a bijection: what is held out depends on (seed, index) alone, and takes no memory."""

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from toolkit.datasets.stream import Int64s, order
from toolkit.errors import JobError

_SALT = 0x5EED  # so that what is held out has nothing to do with the order of training


class Split(Dataset[Any]):
    """Samples start..stop-1 of the dataset in one fixed random order; sample j is `dataset[original(j)]`."""

    def __init__(self, dataset: Any, seed: int, start: int, stop: int) -> None:
        self.dataset, self.seed, self.start, self.stop = dataset, seed, start, stop

    def original(self, indices: Int64s) -> Int64s:
        """The numbers these samples have in the whole dataset."""
        return order(len(self.dataset), self.seed ^ _SALT, np.zeros_like(indices), indices + self.start)

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.dataset[int(self.original(np.array([index]))[0])]


def held_out(dataset: Any, fraction: float, seed: int) -> tuple[Split, Split]:
    """(train, val): `fraction` of the samples, rounded, at least one and not all, are val."""
    size = len(dataset)
    if size < 2:
        raise JobError(f"data.val: {size} training samples cannot be split; give a dataset for val, or leave val out")
    count = min(max(round(size * fraction), 1), size - 1)
    return Split(dataset, seed, count, size), Split(dataset, seed, 0, count)
