"""Data of any size that take no memory: sample i is a function of (seed, i). For tests, benchmarks and dry runs."""

from math import inf, prod
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from toolkit.datasets.stream import Int64s, mix_all, uniform
from toolkit.errors import JobError
from toolkit.randomness import mix


class Synthetic(Dataset[Any]):
    """`images`: inputs `shape` float32, a pattern for each of `num_classes` classes under uniform noise in
    -noise..noise, targets the class. `tokens`: inputs and targets (context,) int64, sequences that count up modulo
    `vocab_size` from a start by a step of 1 to 8.
    """

    source = "synthetic"

    def __init__(
        self,
        kind: Literal["images", "tokens"] = "images",
        size: int = 1024,
        shape: tuple[int, ...] = (1, 28, 28),
        num_classes: int = 10,
        noise: float = 1.0,
        vocab_size: int = 256,
        context: int = 128,
        seed: int = 0,
    ) -> None:
        if min(size, num_classes, vocab_size, context, *shape) < 1:
            raise JobError("size, shape, num_classes, vocab_size and context must all be at least 1")
        if not 0 <= noise < inf:
            raise JobError(f"noise is {noise}; it must be at least 0")
        self.kind, self.size, self.seed, self.noise = kind, size, seed, noise
        if kind == "images":
            self.num_classes, self.input_shape = num_classes, shape
            numbers = np.arange(num_classes * prod(shape), dtype=np.uint64) + np.uint64(mix(seed))
            self.patterns = (uniform(numbers, 0) * 2 - 1).reshape(num_classes, -1)
        else:
            self.vocab_size, self.input_shape = vocab_size, (context,)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.gather(np.array([range(self.size)[index]]))
        return inputs[0], targets[0]

    def gather(self, indices: Int64s) -> tuple[Tensor, Tensor]:
        keys = mix_all(indices.astype(np.uint64) + np.uint64(mix(self.seed + 1)))
        return self._images(keys) if self.kind == "images" else self._tokens(keys)

    def _images(self, keys: Any) -> tuple[Tensor, Tensor]:
        classes = (uniform(keys, 0) * self.num_classes).astype(np.int64)
        pixels = keys[:, None] + mix_all(np.arange(self.patterns.shape[1], dtype=np.uint64))
        values = self.patterns[classes] + (uniform(pixels, 1) * 2 - 1) * self.noise
        return torch.from_numpy(values.astype(np.float32)).view(-1, *self.input_shape), torch.from_numpy(classes)

    def _tokens(self, keys: Any) -> tuple[Tensor, Tensor]:
        starts = (uniform(keys, 0) * self.vocab_size).astype(np.int64)
        steps = 1 + (uniform(keys, 1) * 8).astype(np.int64)
        tokens = (starts[:, None] + steps[:, None] * np.arange(self.input_shape[0] + 1)) % self.vocab_size
        whole = torch.from_numpy(tokens)
        return whole[:, :-1], whole[:, 1:]
