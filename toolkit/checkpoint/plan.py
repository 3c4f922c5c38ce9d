"""Which bytes each rank saves, and where they lie: in its host buffer while saving, and in its files.

A file is a stretch of the buffer, so it is written without another copy. Replicated tensors are dealt out over the
ranks, a share each; of a sharded one every rank saves what it holds. Chunks lie in falling order of the size of their
elements, so each is aligned to it without a gap: a gap would be bytes under no chunk's checksum.
"""

from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from toolkit.checkpoint.boxes import Box, Shard, cut, shard_of, volume, within
from toolkit.checkpoint.manifest import DTYPE_NAMES
from toolkit.distributed import Ranks
from toolkit.errors import RunError

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]

CHUNK_BYTES = 8 << 20  # what is read and checked at once
FILE_BYTES = 32 << 20  # what a store is given at once: one put, never a multipart upload that a kill leaves pending
MIN_SHARE_BYTES = 1 << 20  # less is not worth a file of its own


@dataclass(frozen=True)
class Piece:
    """A box of a tensor, from `start` in the buffer."""

    name: str
    box: Box
    start: int
    bytes: int


@dataclass
class File:
    """A stretch of the buffer that becomes a file."""

    start: int
    stop: int
    pieces: list[Piece] = field(default_factory=list)


@dataclass
class Plan:
    """One rank's share. `writers`: the ranks that have one, known to all."""

    files: list[File]
    bytes: int
    writers: frozenset[int]
    replicated_bytes: int


def plan(shards: Mapping[str, Shard], ranks: Ranks) -> Plan:
    """What this rank saves of a state. Every rank makes the same decisions about tensors that all of them hold."""
    replicated = {name: shard for name, shard in shards.items() if shard.replicated}
    total = sum(shard.local.nbytes for shard in replicated.values())
    share = max(-(-total // ranks.world_size), MIN_SHARE_BYTES)
    writers, mine, dealt = {0}, list[tuple[str, Box, int]](), 0
    for name, box, size in _pieces(replicated):
        writer = 0 if shards[name].varies else min(dealt // share, ranks.world_size - 1)
        writers.add(writer)
        dealt += size
        if writer == ranks.rank:
            mine.append((name, box, size))
    sharded = {name: shard for name, shard in shards.items() if not shard.replicated}
    if sharded:
        writers = set(range(ranks.world_size))
        mine += _pieces({name: shard for name, shard in sharded.items() if shard.owned})
    mine.sort(key=lambda piece: -shards[piece[0]].local.itemsize)
    files = list(_files(mine))
    return Plan(files, files[-1].stop if files else 0, frozenset(writers), total)


def shards_of(tensors: Mapping[str, Tensor], varying: Collection[str] = ()) -> dict[str, Shard]:
    """What this rank holds of each tensor; for `varying` see Shard. Raises RunError for a kind that cannot be saved."""
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.dtype not in DTYPE_NAMES:
            kind = f"{tensor.layout}, {tensor.dtype}"
            raise RunError(f"{name} is a tensor of {kind}; dense ones of these types can be saved: {[*DTYPE_NAMES]}")
    return {name: shard_of(tensor)._replace(varies=name in varying) for name, tensor in tensors.items()}


def copy_into(buffer: Tensor, own: Plan, shards: Mapping[str, Shard]) -> None:
    """Copy this rank's share into the buffer. Only while this runs does training stand still.

    Threads take a file each: torch's own would meet after every tensor, and all wait for the one that is late.
    """
    with ThreadPoolExecutor(torch.get_num_threads(), "toolkit-copy") as pool:
        for left in pool.map(lambda file: _copy_file(buffer, file, shards), own.files):
            for place, source in left:
                place.copy_(source, non_blocking=True)
    if buffer.is_pinned():
        torch.cuda.synchronize()


def as_bytes(tensor: Tensor) -> Bytes | None:
    """The memory of a tensor that lies in the host's, row by row without gaps; None for any other."""
    if not (tensor.is_cpu and tensor.is_contiguous()) or tensor.is_conj() or tensor.is_neg():
        return None  # a conjugate is a view that is yet to be computed
    flat = tensor.as_strided((tensor.numel(),), (1,))  # the stride of a side of 1 may be anything
    return flat.view(torch.uint8).numpy()


def _copy_file(buffer: Tensor, file: File, shards: Mapping[str, Shard]) -> list[tuple[Tensor, Tensor]]:
    """Copy what is to become a file; returns what has not just to be copied as it lies, as (place, source)."""
    left, host = [], buffer.numpy()
    for piece in file.pieces:
        shard, stop = shards[piece.name], piece.start + piece.bytes
        source = shard.local if piece.box == shard.box else shard.local[within(piece.box, shard.box)]
        content = as_bytes(source)
        if content is not None:
            np.copyto(host[piece.start : stop], content)
        else:
            left.append((buffer[piece.start : stop].view(source.dtype).view(source.shape), source))
    return left


def _pieces(shards: Mapping[str, Shard]) -> list[tuple[str, Box, int]]:
    """(tensor, box, bytes) of every chunk."""
    return [
        (name, box, volume(box) * shard.local.itemsize)
        for name, shard in shards.items()
        if shard.local.numel()
        for box in cut(shard.box, max(1, CHUNK_BYTES // shard.local.itemsize))
    ]


def _files(pieces: list[tuple[str, Box, int]]) -> Iterator[File]:
    """Pieces one after another, in files of at most FILE_BYTES."""
    current = File(0, 0)
    for name, box, size in pieces:
        if current.pieces and current.stop - current.start + size > FILE_BYTES:
            yield current
            current = File(current.stop, current.stop)
        current.pieces.append(Piece(name, box, current.stop, size))
        current.stop += size
    if current.pieces:
        yield current
