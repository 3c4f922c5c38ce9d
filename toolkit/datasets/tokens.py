"""Windows of files of tokens for next-token prediction: nanoGPT's format, 16 or 32 bits a token and nothing else."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from toolkit import storage
from toolkit.datasets.stream import Int64s
from toolkit.errors import JobError

READERS = 16  # ranges of a remote file that are read at a time


class TokensError(ValueError):
    """A token that the vocabulary does not have."""


class Tokens(Dataset[Any]):
    """Inputs (context,) int64 tokens, targets (context,): the same shifted by one.

    `path`: a file of unsigned integers, the lowest byte first, by path or URL, or a folder with files that end in .bin.
    A file here is mapped into memory, of one elsewhere the windows are read: neither has to fit. Window i of a file
    starts at token i * `stride` (default: `context`, so that windows do not overlap), and none goes over its end.

    The first and the last window are looked at when the dataset is made, the others as they are read: a token that is
    not below `vocab_size` is a TokensError with its file and place.
    """

    def __init__(
        self,
        path: str,
        vocab_size: int,
        context: int = 1024,
        stride: int | None = None,
        dtype: Literal["uint16", "uint32"] = "uint16",
    ) -> None:
        if min(context, vocab_size, context if stride is None else stride) < 1:
            raise JobError(
                f"context {context}, stride {stride} and vocab_size {vocab_size} must all be at least 1; raise them"
            )
        self.source, self.vocab_size, self.input_shape = storage.shown(path), vocab_size, (context,)
        self.context, self.stride = context, stride or context
        self.files = [_File(url, np.dtype(dtype).newbyteorder("<")) for url in _urls(path)]
        windows = [max(0, (file.size - context - 1) // self.stride + 1) for file in self.files]
        self.ends = np.cumsum(windows)
        if not any(windows):
            raise JobError(
                f"{self.source} has {sum(file.size for file in self.files)} {dtype} tokens in "
                f"{len(self.files)} file(s); a window needs {context + 1} in one: use longer files or a shorter context"
            )
        try:
            self.gather(np.array([0, len(self) - 1]))
        except TokensError as error:
            raise JobError(str(error)) from error

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.gather(np.array([range(len(self))[index]]))
        return inputs[0], targets[0]

    def gather(self, indices: Int64s) -> tuple[Tensor, Tensor]:
        """Windows of whatever files, as one batch. Raises TokensError."""
        numbers = np.searchsorted(self.ends, indices, side="right")
        starts = (indices - np.concatenate([[0], self.ends])[numbers]) * self.stride
        tokens = np.empty((len(indices), self.context + 1), np.int64)
        for number in np.unique(numbers):
            mine = np.flatnonzero(numbers == number)
            tokens[mine] = self.files[number].windows(starts[mine], self.context + 1)
        beyond = np.argwhere(tokens >= self.vocab_size)
        if len(beyond):
            row, column = beyond[0]
            raise TokensError(
                f"{storage.shown(self.files[numbers[row]].url)}: token {tokens[row, column]} at place "
                f"{starts[row] + column} is not below vocab_size {self.vocab_size}; give the vocab_size and dtype that "
                "the file was written with"
            )
        windows = torch.from_numpy(tokens)
        return windows[:, :-1], windows[:, 1:]


class _File:
    """`size` tokens that lie at a URL."""

    def __init__(self, url: str, dtype: np.dtype[Any]) -> None:
        self.url, self.dtype, self.path = url, dtype, storage.local_path(url)
        size_bytes = storage.size(url)
        if storage.read(url, 0, 6) == b"\x93NUMPY":
            raise JobError(f"{storage.shown(url)} is a .npy file; write the bare tokens, as array.tofile does")
        if size_bytes % dtype.itemsize:
            raise JobError(
                f"{storage.shown(url)} has {size_bytes} bytes, which is no whole number of tokens of "
                f"{dtype.itemsize} bytes; copy it again, or set dtype"
            )
        self.size = size_bytes // dtype.itemsize
        self._mapped = np.memmap(self.path, dtype, mode="r") if self.path and self.size else None

    def windows(self, starts: Int64s, length: int) -> NDArray[Any]:
        """The `length` tokens from each start on, (len(starts), length)."""
        if self._mapped is not None:
            return np.asarray(self._mapped[starts[:, None] + np.arange(length)])
        with ThreadPoolExecutor(min(READERS, len(starts))) as readers:
            return np.stack(list(readers.map(lambda start: self._range(start, length), starts.tolist())))

    def _range(self, start: int, length: int) -> NDArray[Any]:
        size = self.dtype.itemsize
        return np.frombuffer(storage.read(self.url, start * size, (start + length) * size), self.dtype)


def _urls(path: str) -> Sequence[str]:
    """The file at a path, or the files in a folder that end in .bin."""
    try:
        storage.size(path)
    except IsADirectoryError:
        found = [storage.join(path, name) for name in storage.names(path) if name.endswith(".bin")]
        if not found:
            raise JobError(f"folder {storage.shown(path)} has no files that end in .bin; put some there") from None
        return found
    except OSError as error:
        raise JobError(f"tokens {storage.shown(path)} cannot be read: {error}") from error
    return [path]
