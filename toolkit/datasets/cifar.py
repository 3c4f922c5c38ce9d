"""CIFAR-10: 60000 colour photographs of 32x32 in ten classes, from its binary files.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009),
https://www.cs.toronto.edu/~kriz/cifar.html. Format: records of 3073 bytes, the class, then 1024 values each of red,
green and blue, row by row. The other version of the archive is pickled, and is not read.
"""

import io
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from toolkit import storage
from toolkit.datasets.download import CACHE, Download, fetched
from toolkit.datasets.stream import Int64s
from toolkit.errors import JobError

ARCHIVE, FOLDER = "cifar-10-binary.tar.gz", "cifar-10-batches-bin"
RECORD_BYTES = 1 + 3 * 32 * 32
_FILES = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}


class Cifar10(Dataset[Any]):
    """Inputs (3, 32, 32) float32 in 0..1, targets int64. `train` is 50000 images, `test` 10000."""

    num_classes = 10
    input_shape = (3, 32, 32)
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    mirror = "https://www.cs.toronto.edu/~kriz/"
    sha256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    size_bytes = 170_052_171

    def __init__(self, split: Literal["train", "test"] = "train", root: str | None = None, cache: str = CACHE) -> None:
        """`root`: fsspec URL of a folder with the `.bin` files, or with the archive.

        Without it the archive is fetched once into `cache` and verified.
        """
        records = np.concatenate([_parsed(url, content) for url, content in self._contents(split, root, cache)])
        self.source = f"{ARCHIVE if root is None else storage.shown(root)} ({split})"
        self.images = torch.from_numpy(records[:, 1:].reshape(-1, *self.input_shape))
        self.targets = torch.from_numpy(records[:, 0].astype(np.int64))

    @classmethod
    def downloads(cls, split: str = "train", root: str | None = None, cache: str = CACHE) -> list[Download]:
        del split  # both are in the one archive
        return [] if root is not None else [Download(cls.mirror + ARCHIVE, cls.sha256, cache, cls.size_bytes)]

    def _contents(self, split: str, root: str | None, cache: str) -> Iterator[tuple[str, bytes]]:
        """(where it lies, its bytes) of each file of the split."""
        if root is None:
            return _unpacked(str(fetched(*self.downloads(cache=cache)[0])), split)
        try:
            return iter([(url, storage.read(url)) for url in (storage.join(root, name) for name in _FILES[split])])
        except FileNotFoundError as error:
            archive, missing = storage.join(root, ARCHIVE), str(error)
        except OSError as error:
            raise JobError(f"{storage.shown(root)} cannot be read: {error}") from error
        if storage.exists(archive):
            return _unpacked(archive, split)
        raise JobError(f"{missing}; give the folder of CIFAR-10's binary version, or of its archive {ARCHIVE}, as root")

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index].float().div_(255), self.targets[index]

    def gather(self, indices: Int64s) -> tuple[Tensor, Tensor]:
        at = torch.from_numpy(indices)
        return self.images.index_select(0, at).float().div_(255), self.targets.index_select(0, at)


def _unpacked(url: str, split: str) -> Iterator[tuple[str, bytes]]:
    """The files of a split out of the archive."""
    try:
        with tarfile.open(fileobj=io.BytesIO(storage.read(url)), mode="r:gz") as archive:
            for name in _FILES[split]:
                file = archive.extractfile(f"{FOLDER}/{name}")
                yield storage.join(url, name), file.read() if file else b""
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise JobError(f"{storage.shown(url)} is not whole: {error}; copy it again") from error
    except KeyError as error:
        raise JobError(f"{storage.shown(url)}: {error.args[0]}; take the binary version, {ARCHIVE}") from error


def _parsed(url: str, content: bytes) -> NDArray[np.uint8]:
    """The records of a file, (N, 3073). Raises JobError that names the file where it is something else."""
    if not content or len(content) % RECORD_BYTES:
        raise JobError(
            f"{storage.shown(url)} is truncated or no CIFAR-10 file: {len(content)} bytes are not a multiple of "
            f"{RECORD_BYTES}; copy it again"
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD_BYTES)
    wrong = np.flatnonzero(records[:, 0] > 9)
    if wrong.size:
        raise JobError(
            f"{storage.shown(url)}: record {wrong[0]} has class {records[wrong[0], 0]}, which is none of 0..9; copy "
            "the file again, and take that of CIFAR-10, not CIFAR-100"
        )
    return records
