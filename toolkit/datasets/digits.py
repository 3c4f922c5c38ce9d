"""Optical Recognition of Handwritten Digits: 1797 real images of 8x8, shipped with the package.

Source: E. Alpaydin and C. Kaynak (1998), UCI Machine Learning Repository, https://doi.org/10.24432/C50P49, the file
optdigits.tes; licence CC BY 4.0. A row holds 64 counts 0..16 of set pixels in 4x4 blocks of a 32x32 scan, then the
digit.
"""

import gzip
from importlib.resources import files
from typing import Literal

import numpy as np
import torch

from toolkit.datasets.memory import InMemory
from toolkit.errors import JobError


class Digits(InMemory):
    """Inputs (1, 8, 8) float32 in 0..1, targets 0..9; or only the images of some digits, the first of which is class 0.

    `test` is every fifth image (359), `train` the rest (1438), `all` both.
    """

    num_classes = 10
    input_shape = (1, 8, 8)
    source = "digits"

    def __init__(
        self, split: Literal["train", "test", "all"] = "train", digits: tuple[int, ...] = tuple(range(10))
    ) -> None:
        if not digits or not set(digits) <= set(range(10)) or len(set(digits)) < len(digits):
            raise JobError(f"digits {list(digits)} must be some of 0 to 9, each once")
        packed = files("toolkit.datasets").joinpath("data/optdigits.csv.gz").read_bytes()
        rows = np.loadtxt(gzip.decompress(packed).decode().splitlines(), delimiter=",", dtype=np.int64)
        fifth = np.arange(len(rows)) % 5 == 4
        rows = {"train": rows[~fifth], "test": rows[fifth], "all": rows}[split]
        rows = rows[np.isin(rows[:, 64], digits)]
        self.inputs = torch.from_numpy(rows[:, :64].astype(np.float32) / 16).view(-1, 1, 8, 8)
        self.targets = torch.from_numpy(np.array([digits.index(digit) for digit in rows[:, 64]]))
        self.classes, self.num_classes = digits, len(digits)
