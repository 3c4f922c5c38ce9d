"""Boxes: which part of a tensor a piece of memory holds.

A box is one (start, stop) pair for each dimension of the whole tensor; that of a scalar is empty.
"""

import secrets
from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement

from toolkit.errors import RunError

Box = tuple[tuple[int, int], ...]

_PRIME = (1 << 127) - 1


class Shard(NamedTuple):
    """What this rank holds of a tensor.

    `owned`: whether it is this rank that saves it, of those that hold the same. `varies`: it should be the same on
    every rank and need not be, as running statistics, so rank 0's counts.
    """

    local: Tensor
    shape: tuple[int, ...]
    box: Box
    replicated: bool
    owned: bool
    varies: bool = False


def shard_of(tensor: Tensor) -> Shard:
    """The local part of a DTensor and its place; a plain tensor is whole, and the same on every rank."""
    if not isinstance(tensor, DTensor):
        shape = tuple(tensor.shape)
        return Shard(tensor.detach(), shape, whole(shape), replicated=True, owned=True)
    placements: tuple[Placement, ...] = tensor.placements
    if any(placement.is_partial() for placement in placements):
        raise RunError(f"a tensor with placements {placements} is a sum not yet taken; redistribute it before saving")
    mesh, shape = tensor.device_mesh, tuple(tensor.shape)
    if _in_stripes(shape, mesh.shape, placements):
        raise RunError(f"a part of a tensor with shape {shape} and placements {placements} is no box; redistribute it")
    local, place = tensor.to_local().detach(), mesh.get_coordinate()
    if place is None:  # this rank has no part in it
        return Shard(local, shape, tuple((0, 0) for _ in shape), replicated=False, owned=False)
    sizes, starts = compute_local_shape_and_global_offset(shape, mesh, placements)
    first = all(place[dim] == 0 for dim, placement in enumerate(placements) if placement.is_replicate())
    box = tuple((start, start + size) for start, size in zip(starts, sizes, strict=True))
    return Shard(local, shape, box, replicated=False, owned=first)


def _in_stripes(shape: Sequence[int], mesh: Sequence[int], placements: Sequence[Placement]) -> bool:
    """Whether a local part may be several boxes, as with FSDP over tensor parallelism where it does not divide evenly.

    That shards one dimension from right to left, and writes it down as left to right with a `split_factor`.
    """
    for at, placement in enumerate(placements):
        if (factor := getattr(placement, "split_factor", 1)) > 1:
            dim = placement.dim  # type: ignore[attr-defined]
            same = [
                size if getattr(other, "dim", None) == dim else 1 for size, other in zip(mesh, placements, strict=True)
            ]
            if factor != prod(same[at + 1 :]) or shape[dim] % prod(same):
                return True
    return False


def whole(shape: Sequence[int]) -> Box:
    return tuple((0, size) for size in shape)


def extents(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(stop - start for start, stop in box)


def volume(box: Box) -> int:
    """How many elements lie in a box; 1 for that of a scalar."""
    return prod(extents(box))


def intersection(one: Box, other: Box) -> Box | None:
    """The box of what two boxes of one tensor share, or None."""
    shared = tuple((max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(one, other, strict=True))
    return None if any(start >= stop for start, stop in shared) else shared


def within(box: Box, origin: Box) -> tuple[slice, ...]:
    """Slices that pick a box out of a tensor that holds `origin`."""
    return tuple(slice(start - base, stop - base) for (start, stop), (base, _) in zip(box, origin, strict=True))


def cut(box: Box, limit: int) -> Iterator[Box]:
    """The box in pieces of at most `limit` elements, contiguous in memory and in the order they lie there."""
    if volume(box) <= limit:
        yield box
        return
    (start, stop), rest = box[0], box[1:]
    row = volume(rest)
    if row <= limit:
        rows = limit // row
        for at in range(start, stop, rows):
            yield ((at, min(at + rows, stop)), *rest)
    else:
        for at in range(start, stop):
            for piece in cut(rest, limit):
                yield ((at, at + 1), *piece)


def cover(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Whether the boxes hold every element of a tensor exactly once."""
    limits = whole(shape)
    if any(len(box) != len(limits) for box in boxes):
        return False
    if any(not a[0] <= b[0] < b[1] <= a[1] for box in boxes for a, b in zip(limits, box, strict=True)):
        return False
    # Give every element a weight: the product of one random number for each of its coordinates. Boxes that hold all
    # elements once have the same sum of weights as the whole; any others differ, but for a chance of 2**-120. A box's
    # sum is the product of those over its sides, so this takes one pass, where comparing boxes in pairs takes hours.
    sums: defaultdict[tuple[int, int], int] = defaultdict(
        lambda: secrets.randbelow(_PRIME)
    )  # of all before a coordinate

    def weight(box: Box) -> int:
        return prod(sums[dim, stop] - sums[dim, start] for dim, (start, stop) in enumerate(box)) % _PRIME

    return (sum(map(weight, boxes)) - weight(limits)) % _PRIME == 0
