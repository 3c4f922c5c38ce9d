"""MNIST and Fashion-MNIST: images and labels in IDX files, plain or gzipped.

Sources: Y. LeCun, C. Cortes and C. Burges, "The MNIST database of handwritten digits" (CC BY-SA 3.0); H. Xiao, K. Rasul
and R. Vollgraf, "Fashion-MNIST" (arXiv:1708.07747, MIT). Format: a big-endian magic number 0x0000 08 dd (unsigned
bytes, dd dimensions), dd sizes of 32 bits, then the values.
"""

import gzip
import zlib
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from toolkit import storage
from toolkit.datasets.download import CACHE, Download, fetched
from toolkit.datasets.stream import Int64s
from toolkit.errors import JobError

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


class IdxImages(Dataset[Any]):
    """Inputs (1, H, W) float32 in 0..1, targets int64, from an images file and a labels file."""

    num_classes = 10
    mirror = ""
    sha256: ClassVar[dict[str, str]] = {}

    def __init__(self, split: Literal["train", "test"] = "train", root: str | None = None, cache: str = CACHE) -> None:
        """`root`: fsspec URL of the folder with the files.

        Without it they are fetched once into `cache` and verified.
        """
        images, labels = (self._content(name, root, cache) for name in _FILES[split])
        self.source = storage.shown(images[0])
        self.images = torch.from_numpy(_parsed(*images, dimensions=3))
        self.targets = torch.from_numpy(_parsed(*labels, dimensions=1).astype(np.int64))
        if len(self.images) != len(self.targets):
            raise JobError(
                f"{self.source} has {len(self.images)} images but {storage.shown(labels[0])} has {len(self.targets)} "
                "labels; take both from one source"
            )
        self.input_shape = (1, *self.images.shape[1:])

    @classmethod
    def downloads(cls, split: str = "train", root: str | None = None, cache: str = CACHE) -> list[Download]:
        return [] if root is not None else [cls._download(name, cache) for name in _FILES[split]]

    @classmethod
    def _download(cls, name: str, cache: str) -> Download:
        return Download(f"{cls.mirror}{name}.gz", cls.sha256[name], cache)

    def _content(self, name: str, root: str | None, cache: str) -> tuple[str, bytes]:
        """(where a file lies, its bytes)."""
        if root is None:
            path = str(fetched(*self._download(name, cache)))
            return path, storage.read(path)
        for url in (storage.join(root, name), storage.join(root, name + ".gz")):
            try:
                return url, storage.read(url)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise JobError(f"{storage.shown(url)} cannot be read: {error}") from error
        raise JobError(
            f"{storage.shown(root)} has neither {name} nor {name}.gz; give the folder with the four IDX files as root"
        )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index].unsqueeze(0).float().div_(255), self.targets[index]

    def gather(self, indices: Int64s) -> tuple[Tensor, Tensor]:
        at = torch.from_numpy(indices)
        return self.images.index_select(0, at).unsqueeze(1).float().div_(255), self.targets.index_select(0, at)


class Mnist(IdxImages):
    """70000 handwritten digits, 28x28."""

    classes = tuple(range(10))
    mirror = "https://storage.googleapis.com/cvdf-datasets/mnist/"
    sha256: ClassVar = {
        "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "train-labels-idx1-ubyte": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "t10k-labels-idx1-ubyte": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    }


class FashionMnist(IdxImages):
    """70000 pictures of clothing, 28x28, ten classes."""

    classes = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
    mirror = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
    sha256: ClassVar = {
        "train-images-idx3-ubyte": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "train-labels-idx1-ubyte": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "t10k-images-idx3-ubyte": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "t10k-labels-idx1-ubyte": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    }


def _parsed(url: str, content: bytes, dimensions: int) -> NDArray[np.uint8]:
    """The array of an IDX file. Raises JobError that names the file where it is truncated or something else."""
    shown = storage.shown(url)
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise JobError(f"{shown} is not whole: {error}; copy it again") from error
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes((0, 0, 8, dimensions)):
        raise JobError(
            f"{shown} is not an IDX file of {dimensions} dimension(s): it starts with {content[:4].hex() or 'nothing'}"
        )
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, header, 4))
    expected = header + int(np.prod(shape, dtype=np.float64))
    if len(content) != expected:
        raise JobError(
            f"{shown} is truncated or too long: {len(content)} bytes, but its header says {expected}; copy it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()
