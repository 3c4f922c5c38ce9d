"""Reading boxes of tensors out of a checkpoint: any box, whoever wrote it in whatever pieces; every byte checked."""

import errno
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import local
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from toolkit import storage
from toolkit.checkpoint.boxes import Box, Shard, extents, intersection, shard_of, volume, within
from toolkit.checkpoint.manifest import DTYPES, Chunk, DamagedError, Manifest, checksum
from toolkit.checkpoint.plan import Bytes, as_bytes

READERS = 4
STRETCH_BYTES = 8 << 20
STRAIGHT_BYTES = 1 << 18


class _Wanted(NamedTuple):
    """A chunk of which some part is wanted."""

    chunk: Chunk
    dtype: torch.dtype
    bytes: int
    target: Shard
    shared: Box

    def place(self) -> Bytes | None:
        """The memory it belongs into, if all of it does, as it lies."""
        if self.shared != self.chunk.box or self.target.local.dtype != self.dtype:
            return None
        return as_bytes(self.target.local[self.where()])

    def where(self) -> tuple[slice, ...]:
        """The part of the target's memory that it belongs into."""
        return within(self.shared, self.target.box)


def fill(folder: str, manifest: Manifest, targets: Mapping[str, Tensor]) -> None:
    """Read into each tensor what the checkpoint holds under its name; of a DTensor, what its local part is.

    Every chunk's bytes are verified. Raises DamagedError that names the first file that is not what the manifest says;
    the tensors must then not be used.
    """
    by_file: dict[str, list[_Wanted]] = {}
    for name, tensor in targets.items():
        entry, shard = manifest.tensors[name], shard_of(tensor)
        for chunk in entry.chunks:
            shared = intersection(chunk.box, shard.box)
            if shared is not None:
                size = volume(chunk.box) * entry.itemsize
                by_file.setdefault(chunk.file, []).append(_Wanted(chunk, DTYPES[entry.dtype], size, shard, shared))
    buffers = local()
    with ThreadPoolExecutor(READERS, "toolkit-read") as pool:
        done = [pool.submit(_read_file, storage.join(folder, name), by_file[name], buffers) for name in sorted(by_file)]
        try:
            for one in done:
                one.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def verify(folder: str, manifest: Manifest) -> None:
    """Read every byte of a checkpoint. Raises DamagedError that names the first file that is not as it was written."""
    for name, entry in sorted(manifest.files.items()):
        url = storage.join(folder, name)
        found = checksum(content(url, entry.bytes))
        if found != entry.xxh3_128:
            raise DamagedError(f"{storage.shown(url)} is damaged: its XXH3-128 is {found}, expected {entry.xxh3_128}")


def content(url: str, size: int) -> bytes:
    """A whole file of a checkpoint, at most `size` bytes."""
    try:
        return storage.read(url, 0, size)
    except OSError as error:
        raise _damage(url, error) from error


def _read_file(url: str, wanted: Iterable[_Wanted], buffers: local) -> None:
    """Read what is wanted of one file, and hand it out. From a disk little by little, so that it is still in the cache
    when it is verified, and a large chunk straight to its place; from elsewhere in one go.
    """
    is_local, stretch = storage.local_path(url) is not None, list[_Wanted]()
    for one in sorted(wanted, key=lambda one: one.chunk.offset):
        if is_local and one.bytes >= STRAIGHT_BYTES and (place := one.place()) is not None:
            _read(url, one.chunk.offset, place.data)
            _check(url, one.chunk, place.data)
            continue
        if is_local and stretch and one.chunk.offset + one.bytes - stretch[0].chunk.offset > STRETCH_BYTES:
            _read_stretch(url, stretch, buffers)
            stretch = []
        stretch.append(one)
    if stretch:
        _read_stretch(url, stretch, buffers)


def _read_stretch(url: str, wanted: Sequence[_Wanted], buffers: local) -> None:
    """Read from the first to the last of these chunks, which lie in order, and hand out what is asked for."""
    start = wanted[0].chunk.offset
    length = max(one.chunk.offset + one.bytes for one in wanted) - start
    if getattr(buffers, "buffer", torch.empty(0)).numel() < length:
        buffers.buffer = torch.empty(length, dtype=torch.uint8)
    stretch = buffers.buffer[:length]
    bytes_ = stretch.numpy()
    view = bytes_.data
    _read(url, start, view)
    for one in wanted:
        at, stop = one.chunk.offset - start, one.chunk.offset - start + one.bytes
        _check(url, one.chunk, view[at:stop])
        if (place := one.place()) is not None:
            np.copyto(place, bytes_[at:stop])
        else:
            there = _typed(stretch[at:stop], one.dtype).view(extents(one.chunk.box))
            one.target.local[one.where()].copy_(there[within(one.shared, one.chunk.box)])


def _read(url: str, start: int, view: memoryview) -> None:
    """Fill the view with the bytes of a file from `start`."""
    try:
        came = storage.read_into(url, start, view)
    except OSError as error:
        raise _damage(url, error) from error
    if came < len(view):
        raise DamagedError(f"{storage.shown(url)} ends after {start + came} bytes; {start + len(view)} are needed")


def _check(url: str, chunk: Chunk, view: memoryview) -> None:
    found = checksum(view)
    if found != chunk.xxh3_128:
        where = f"bytes {chunk.offset} to {chunk.offset + len(view)}"
        raise DamagedError(
            f"{storage.shown(url)} is damaged: XXH3-128 of {where} is {found}, expected {chunk.xxh3_128}"
        )


def _typed(flat: Tensor, dtype: torch.dtype) -> Tensor:
    aligned = flat.storage_offset() % dtype.itemsize == 0
    return (flat if aligned else flat.clone()).view(dtype)


def _damage(url: str, error: OSError) -> OSError | DamagedError:
    """A file that is gone, or a bad sector, is damage; a store that does not answer is not."""
    if isinstance(error, FileNotFoundError | IsADirectoryError) or error.errno == errno.EIO:
        return DamagedError(f"{storage.shown(url)} cannot be read: {error}")
    return error
