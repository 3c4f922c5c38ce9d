"""One save: a snapshot is taken while the loop waits, then written beside it.

Ranks write their files without talking: each leaves a part file that lists them, and rank 0, when it has every part,
writes the manifest. So nothing here needs a process group, and a rank that fails or dies leaves no checkpoint.
"""

import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from errno import ENOSPC

import torch
import xxhash
from torch import Tensor

from toolkit import storage
from toolkit.checkpoint.boxes import Shard
from toolkit.checkpoint.manifest import DTYPE_NAMES, Chunk, FileEntry, Manifest, Part, TensorEntry, decoded
from toolkit.checkpoint.plan import File, Plan, copy_into, plan
from toolkit.distributed import Ranks

WRITERS = 4
PART_TIMEOUT_S = 120.0  # without a new byte from a rank that is still writing
HASH_BYTES = 256 << 10  # small enough for a core's own cache
CLEAN_UP_S = 5.0  # a store that just failed may hang: what cannot be removed now is removed at the next start
SPARE_BYTES = 1 << 20  # manifest, state and parts


@dataclass
class Snapshot:
    """A state at one step, copied: what happens to the state afterwards does not change it."""

    plan: Plan
    buffer: Tensor
    shards: Mapping[str, Shard]  # for types and shapes; their memory belongs to training again


class Snapshots:
    """Takes snapshots into one host buffer, kept warm from save to save: a fresh page costs more than copying into it.

    Pinned where the tensors are on a GPU, or the copy would go through a buffer of the driver's.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def prepare(self, shards: Mapping[str, Shard]) -> Plan:
        """Make the buffer large enough, and touch it."""
        own = plan(shards, self.ranks)
        if self.buffer.numel() < own.bytes:
            pinned = any(shard.local.is_cuda for shard in shards.values())
            self.buffer = torch.empty(own.bytes, dtype=torch.uint8, pin_memory=pinned)
            self.buffer.zero_()
        return own

    def take(self, shards: Mapping[str, Shard]) -> Snapshot:
        own = self.prepare(shards)
        copy_into(self.buffer, own, shards)
        return Snapshot(own, self.buffer, shards)


def write_share(folder: str, serial: str, rank: int, snapshot: Snapshot) -> Part:
    """Write this rank's files. Raises OSError; then none of them is left."""
    names = [f"data-{serial}.{rank}.{number}.bin" for number in range(len(snapshot.plan.files))]
    with ThreadPoolExecutor(WRITERS, "toolkit-write") as pool:
        done = [
            pool.submit(_write_file, storage.join(folder, name), file, snapshot)
            for name, file in zip(names, snapshot.plan.files, strict=True)
        ]
        try:
            written = [one.result() for one in done]
            storage.sync(folder, names)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            clean_up(folder, names)
            raise
    files, chunks = dict[str, FileEntry](), defaultdict[str, list[Chunk]](list)
    for name, file, (entry, sums) in zip(names, snapshot.plan.files, written, strict=True):
        files[name] = entry
        for piece, sum_ in zip(file.pieces, sums, strict=True):
            chunk = Chunk(file=name, offset=piece.start - file.start, box=piece.box, xxh3_128=sum_)
            chunks[piece.name].append(chunk)
    if rank == 0:
        for name, shard in snapshot.shards.items():
            if not shard.local.numel() and 0 in shard.shape:  # has no bytes, but a shape
                chunks[name] = []
    return Part(files=files, tensors={name: _entry(snapshot.shards[name], found) for name, found in chunks.items()})


def other_parts(folder: str, serial: str, ranks: frozenset[int]) -> Iterator[tuple[str, Part]]:
    """(name, part) of each rank as it comes. Raises OSError if one failed, or has stood still for PART_TIMEOUT_S."""
    waiting = {part_name(serial, rank): rank for rank in sorted(ranks)}
    since_s, before, pause_s = time.monotonic(), dict[str, int](), 0.01
    while waiting:
        sizes = storage.sizes(folder)
        if sizes != before:
            since_s, before = time.monotonic(), sizes
        for name in waiting.keys() & sizes.keys():
            rank, url = waiting.pop(name), storage.join(folder, name)
            try:
                part = decoded(Part, storage.read(url))
            except ValueError as error:
                raise OSError(f"{storage.shown(url)} is not what rank {rank} wrote: {error}") from error
            if part.error:
                raise OSError(f"rank {rank} could not save its share: {part.error}")
            yield name, part
        if waiting and time.monotonic() - since_s > PART_TIMEOUT_S:
            late = f"ranks {sorted(waiting.values())} have written nothing for {PART_TIMEOUT_S:.0f} s"
            raise OSError(f"{late}; is {storage.shown(folder)} the same place for all ranks?")
        if waiting:
            time.sleep(pause_s)
            pause_s = min(1.0, pause_s * 1.5)


def part_name(serial: str, rank: int) -> str:
    return f"part-{serial}.{rank}.json"


def joined(parts: Iterable[Part]) -> Part:
    """The files and tensors of all parts together."""
    files, entries = dict[str, FileEntry](), defaultdict[str, list[TensorEntry]](list)
    for part in parts:
        files |= part.files
        for name, entry in part.tensors.items():
            entries[name].append(entry)
    tensors = {
        name: found[0].model_copy(update={"chunks": tuple(chunk for entry in found for chunk in entry.chunks)})
        for name, found in entries.items()
    }
    return Part(files=files, tensors=tensors)


def check_space(url: str, needed: int) -> None:
    """Raises OSError if the disk has not enough room, before anything is written."""
    free = storage.free_bytes(url)
    if free is not None and free < needed + SPARE_BYTES:
        what = f"{storage.shown(url)}: a checkpoint needs {_mib(needed + SPARE_BYTES)}, {_mib(free)} are free"
        raise OSError(ENOSPC, f"{os.strerror(ENOSPC)}: {what}; make room, or keep fewer with checkpoint.keep")


def check_sizes(folder: str, manifest: Manifest) -> None:
    """Raises OSError for a store that said "written" and has not: before anyone relies on it."""
    sizes = storage.sizes(folder)
    for name, entry in manifest.files.items():
        if sizes.get(name) != entry.bytes:
            where = storage.shown(storage.join(folder, name))
            raise OSError(f"{where} has {sizes.get(name, 'no')} bytes after {entry.bytes} were written")


def clean_up(folder: str, names: list[str]) -> None:
    """Remove what a failed save has written. What the store does not let us is left for the next start."""
    with storage.patience(CLEAN_UP_S):
        for name in names:
            try:
                storage.remove(storage.join(folder, name))
            except OSError:
                return  # it has no manifest, so it is no checkpoint


def _write_file(url: str, file: File, snapshot: Snapshot) -> tuple[FileEntry, list[str]]:
    content = memoryview(snapshot.buffer.numpy())[file.start : file.stop]  # type: ignore[arg-type]
    whole, sums = _sums(content, [(piece.start - file.start, piece.bytes) for piece in file.pieces])
    storage.write(url, content, durable=False)
    return FileEntry(bytes=len(content), xxh3_128=whole), sums


def _sums(content: memoryview, places: list[tuple[int, int]]) -> tuple[str, list[str]]:
    """The checksums of a file, and of its pieces at (offset, bytes), which lie in order: all is fetched from memory
    once, and is still in the cache when it is summed again.
    """
    whole, sums, done = xxhash.xxh3_128(), list[str](), 0
    for offset, size in places:
        whole.update(content[done:offset])
        done, one = offset + size, xxhash.xxh3_128()
        for start in range(offset, done, HASH_BYTES):
            part = content[start : min(start + HASH_BYTES, done)]
            one.update(part)
            whole.update(part)
        sums.append(one.hexdigest())
    whole.update(content[done:])
    return whole.hexdigest(), sums


def _entry(shard: Shard, chunks: list[Chunk]) -> TensorEntry:
    return TensorEntry(dtype=DTYPE_NAMES[shard.local.dtype], shape=shard.shape, chunks=tuple(chunks))


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
