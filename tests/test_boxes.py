"""Boxes: whoever wrote a tensor in whatever pieces, any box of it can be read."""

import itertools
from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor
from torch.distributed.tensor import Shard as Sharded
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard

from tests.states import bits
from toolkit import storage
from toolkit.checkpoint import boxes, manifest, plan, reader, writer
from toolkit.checkpoint.boxes import Box, Shard, cover, cut, extents, intersection, volume, whole, within
from toolkit.checkpoint.manifest import DTYPES, FileEntry, Manifest, Part, checksum
from toolkit.distributed import Ranks

quickly = settings(max_examples=120, deadline=None, derandomize=True, database=None)
SHAPES = some.lists(some.integers(0, 6), max_size=4).map(tuple)


@some.composite
def boxes_in(draw: Any, shape: tuple[int, ...], empty: bool = False) -> Box:
    """Any box of a tensor."""
    sides = []
    for size in shape:
        start = draw(some.integers(0, size if empty else size - 1))
        sides.append((start, draw(some.integers(start if empty else start + 1, size))))
    return tuple(sides)


@some.composite
def tilings(draw: Any, box: Box, most: int) -> list[Box]:
    """A box cut in up to so many boxes, at random places along random sides."""
    found = [box]
    for _ in range(draw(some.integers(0, most - 1))):
        which = draw(some.integers(0, len(found) - 1))
        cuttable = [dim for dim, (start, stop) in enumerate(found[which]) if stop - start > 1]
        if not cuttable:
            continue
        dim, one = draw(some.sampled_from(cuttable)), found.pop(which)
        at = draw(some.integers(one[dim][0] + 1, one[dim][1] - 1))
        found += [
            (*one[:dim], (one[dim][0], at), *one[dim + 1 :]),
            (*one[:dim], (at, one[dim][1]), *one[dim + 1 :]),
        ]
    return found


def counted(shape: tuple[int, ...], parts: list[Box]) -> "np.ndarray[Any, Any]":
    """How often each element lies in a box."""
    counts = np.zeros(shape, dtype=int)
    for part in parts:
        counts[tuple(slice(*side) for side in part)] += 1
    return counts


@quickly
@given(some.data())
def test_boxes_cover_a_tensor_if_each_element_is_in_one_of_them(data: Any) -> None:
    shape = data.draw(some.lists(some.integers(1, 5), max_size=4).map(tuple))
    parts = data.draw(tilings(whole(shape), 6))
    assert cover(shape, data.draw(some.permutations(parts)))
    assert not cover(shape, parts[1:])
    assert not cover(shape, [*parts, parts[0]])
    others = data.draw(some.lists(boxes_in(shape), max_size=4)) + parts[: data.draw(some.integers(0, len(parts)))]
    assert cover(shape, others) == bool((counted(shape, others) == 1).all())


@pytest.mark.parametrize(
    ("shape", "parts", "covered"),
    [
        ((), [()], True),
        ((), [], False),
        ((), [(), ()], False),
        ((0, 3), [], True),
        ((0, 3), [((0, 0), (0, 3))], False),
        ((4,), [((0, 2),), ((2, 4),)], True),
        ((4,), [((0, 3),), ((2, 4),)], False),
        ((4,), [((0, 2),), ((0, 2),)], False),
        ((4,), [((-1, 2),), ((2, 5),)], False),
        ((4,), [((0, 5),)], False),
        ((4,), [((4, 0),)], False),
        ((4,), [((0, 4), (0, 1))], False),
        ((4,), [()], False),
        ((3, 3), [((0, 1), (0, 2)), ((0, 2), (2, 3)), ((2, 3), (1, 3)), ((1, 3), (0, 1)), ((1, 2), (1, 2))], True),
        ((2, 2), [((0, 1), (0, 2)), ((0, 2), (0, 1))], False),
    ],
)
def test_what_covers_and_what_does_not(shape: tuple[int, ...], parts: list[Box], covered: bool) -> None:
    assert cover(shape, parts) == covered


@pytest.mark.timeout(60)
def test_a_hundred_thousand_boxes_beside_each_other_are_checked_in_seconds() -> None:
    parts = [((0, 1), (at, at + 1)) for at in range(100_000)]
    assert cover((1, len(parts)), parts)
    assert not cover((1, len(parts)), [*parts[:-1], parts[0]])


@quickly
@given(some.data())
def test_a_cut_box_lies_in_memory_piece_after_piece(data: Any) -> None:
    shape = data.draw(some.lists(some.integers(1, 6), max_size=4).map(tuple))
    box, limit = data.draw(boxes_in(shape)), data.draw(some.integers(1, 40))
    pieces = list(cut(box, limit))
    places = torch.arange(volume(box)).reshape(extents(box))
    assert torch.cat([places[within(piece, box)].reshape(-1) for piece in pieces]).tolist() == list(range(volume(box)))
    assert all(1 <= volume(piece) <= limit for piece in pieces)


@quickly
@given(some.data())
def test_an_intersection_is_what_two_boxes_share(data: Any) -> None:
    shape = data.draw(SHAPES)
    one, other = data.draw(boxes_in(shape, empty=True)), data.draw(boxes_in(shape, empty=True))
    shared, both = intersection(one, other), counted(shape, [one, other]) == 2
    if shared is None:
        assert not both.any()
    else:
        assert volume(shared) > 0 or not shape
        assert (counted(shape, [shared]) == both).all()


# -- from any ranks to any box


@pytest.fixture
def folder() -> Iterator[str]:
    yield "memory://boxes/step-00000001"
    storage.remove("memory://boxes")


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    content = torch.randint(0, 256, (prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    content = content % 2 if dtype == torch.bool else content
    return content.view(dtype).reshape(shape)


@some.composite
def shards_of(draw: Any, tensor: Tensor, world_size: int) -> list[Shard]:
    """A tensor as so many ranks may hold it: whole on each, or in boxes, some of them on several ranks or on none."""
    shape = tuple(tensor.shape)
    if draw(some.booleans()):
        return [Shard(tensor, shape, whole(shape), replicated=True, owned=True)] * world_size
    parts = [part for part in draw(tilings(whole(shape), world_size)) if volume(part)]
    nothing = tuple((0, 0) for _ in shape)
    held = [*parts, *(draw(some.sampled_from([*parts, nothing])) for _ in range(world_size - len(parts)))]
    found = []
    for place, box in enumerate(held):
        local = tensor[within(box, whole(shape))] if box != nothing or not shape else tensor.new_empty(0)
        found.append(Shard(local, shape, box, replicated=False, owned=place < len(parts)))
    return draw(some.permutations(found))


def written(folder: str, ranks: list[dict[str, Shard]]) -> Manifest:
    """What so many ranks write, each its plan, joined by rank 0 and read again."""
    storage.remove(folder)
    parts, writers = [], set()
    for rank, shards in enumerate(ranks):
        snapshot = writer.Snapshots(Ranks(rank, len(ranks))).take(shards)
        writers.add(snapshot.plan.writers)
        if rank in snapshot.plan.writers:
            parts.append(writer.write_share(folder, "1.1", rank, snapshot))
        else:
            assert not snapshot.plan.files
    assert len(writers) == 1, "all ranks must know who writes"
    storage.write(storage.join(folder, "state-1.1.json"), b"{}")
    state = Part(files={"state-1.1.json": FileEntry(bytes=2, xxh3_128=checksum(b"{}"))})
    found = writer.joined([*parts, state])
    about: dict[str, Any] = {"config_digest": "", "saved_at": "", "versions": {}, "score": None}
    made = Manifest(step=1, samples=1, world_size=len(ranks), attempt=1, state="state-1.1.json", **about, **dict(found))
    storage.write(storage.join(folder, manifest.NAME), made.encoded())
    read = manifest.read(folder, 1)
    assert read == made
    return made


def read_box(folder: str, made: Manifest, name: str, box: Box) -> Tensor:
    entry = made.tensors[name]
    local = torch.zeros(extents(box), dtype=DTYPES[entry.dtype])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "shard_of", lambda local: Shard(local, entry.shape, box, replicated=False, owned=True))
        reader.fill(folder, made, {name: local})
    return local


@settings(quickly, max_examples=150)
@given(data=some.data())
def test_any_box_can_be_read_of_what_any_ranks_have_written(data: Any) -> None:
    world_size, folder = data.draw(some.integers(1, 4)), "memory://boxes/step-00000001"
    names = [f"tensor {number}" for number in range(data.draw(some.integers(1, 4)))]
    kinds = some.sampled_from(sorted(DTYPES))
    tensors = {
        name: random_tensor(data.draw(SHAPES), DTYPES[data.draw(kinds)], number) for number, name in enumerate(names)
    }
    shards = {name: data.draw(shards_of(tensor, world_size)) for name, tensor in tensors.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "CHUNK_BYTES", data.draw(some.integers(1, 200)))
        patch.setattr(plan, "FILE_BYTES", data.draw(some.integers(1, 400)))
        patch.setattr(plan, "MIN_SHARE_BYTES", data.draw(some.integers(1, 400)))
        made = written(folder, [{name: shards[name][rank] for name in names} for rank in range(world_size)])
    assert made.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        for box in (whole(shape), data.draw(boxes_in(shape, empty=True)), data.draw(boxes_in(shape, empty=True))):
            expected = tensor[within(box, whole(shape))]
            assert bits({name: read_box(folder, made, name, box)}) == bits({name: expected})


def test_shares_of_what_all_ranks_hold_are_about_equal_and_each_byte_is_in_one(folder: str) -> None:
    tensors = {f"{number}": random_tensor((256, 128), torch.float32, number) for number in range(80)}  # 10 MiB
    ranks = [{name: boxes.shard_of(tensor) for name, tensor in tensors.items()} for _ in range(4)]
    made = written(folder, ranks)
    shares = [0, 0, 0, 0]
    for name, entry in made.files.items():
        if name != made.state:
            shares[int(name.split(".")[2])] += entry.bytes
    assert sum(shares) == sum(tensor.nbytes for tensor in tensors.values())
    assert max(shares) - min(shares) <= 2 * 256 * 128 * 4
    read = {name: read_box(folder, made, name, ((0, 256), (0, 128))) for name in tensors}
    assert bits(read) == bits(tensors)


def test_what_may_vary_is_saved_by_rank_0(folder: str) -> None:
    """Running statistics of ranks differ between two forwards; a mixture of them would be those of no rank."""

    def held(rank: int) -> dict[str, Tensor]:
        weights = {f"weight {number}": torch.full((512, 512), float(number)) for number in range(6)}
        return weights | {f"statistic {number}": torch.full((8,), float(rank)) for number in range(6)}

    varying = [name for name in held(0) if name.startswith("statistic")]
    made = written(folder, [plan.shards_of(held(rank), varying) for rank in range(3)])
    assert {name.split(".")[2] for name in made.files if name != made.state} == {"0", "1", "2"}
    for name in varying:
        assert read_box(folder, made, name, ((0, 8),)).tolist() == [0.0] * 8


def test_every_byte_of_a_file_is_under_a_checksum_and_aligned(folder: str) -> None:
    tensors = {dtype: random_tensor((3,), DTYPES[dtype], 0) for dtype in sorted(DTYPES)}
    made = written(folder, [plan.shards_of(tensors)])
    chunks = sorted(
        (chunk.offset, volume(chunk.box) * entry.itemsize, entry.itemsize)
        for entry in made.tensors.values()
        for chunk in entry.chunks
    )
    (size,) = [entry.bytes for name, entry in made.files.items() if name != made.state]
    assert [0, *(offset + length for offset, length, _ in chunks)] == [*(offset for offset, _, _ in chunks), size]
    assert all(offset % itemsize == 0 for offset, _, itemsize in chunks)


# -- DTensors, by their arithmetic; tests/dist/test_shards.py has real ones


def held_by(size: int, mesh: tuple[int, ...], place: tuple[int, ...], placements: list[Any]) -> list[int]:
    """The rows that a rank holds, by the definition of its placements."""
    rows = torch.arange(size)
    for ranks, at, placement in zip(mesh, place, placements, strict=True):
        groups = torch.chunk(rows, placement.split_factor) if isinstance(placement, _StridedShard) else (rows,)
        pieces = [torch.chunk(group, ranks) for group in groups]
        rows = torch.cat([group[at] for group in pieces if at < len(group)] or [rows[:0]])
    return rows.tolist()


@pytest.mark.parametrize("mesh", [(2, 2), (2, 3), (4, 2), (2, 2, 2)])
def test_a_part_that_is_not_refused_is_the_box_that_torch_says(mesh: tuple[int, ...]) -> None:
    kinds = [Sharded(0), *(_StridedShard(0, split_factor=factor) for factor in (2, 3, 4))]
    taken = set()
    for placements, size in itertools.product(itertools.product(kinds, repeat=len(mesh)), range(1, 25)):
        if boxes._in_stripes((size, 5), mesh, placements):
            continue
        taken.add(placements)
        for place in itertools.product(*map(range, mesh)):
            shape, starts = _compute_local_shape_and_global_offset((size, 5), mesh, place, placements)
            rows = held_by(size, mesh, place, list(placements))
            assert rows == list(range(starts[0], starts[0] + shape[0]))
    assert (Sharded(0),) * len(mesh) in taken
    last_two = (_StridedShard(0, split_factor=mesh[-1]), Sharded(0))
    assert (*[Sharded(0)] * (len(mesh) - 2), *last_two) in taken, "FSDP over tensor parallelism"
