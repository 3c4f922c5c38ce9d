"""Datasets that are two tensors in memory."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from toolkit.datasets.stream import Int64s


class InMemory(Dataset[Any]):
    """Sample i is row i of `inputs` and of `targets`, which a subclass makes."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]

    def gather(self, indices: Int64s) -> tuple[Tensor, Tensor]:
        at = torch.from_numpy(indices)
        return self.inputs.index_select(0, at), self.targets.index_select(0, at)
