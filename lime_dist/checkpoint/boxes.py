"""Boxes of a tensor: what a rank holds of it, what a file holds, and where the two meet. Pure data, without torch.

A box is a rectangle of elements. A replica's share of a parameter under ZeRO is a range of its elements in row-major
order, which is a few boxes; a parameter's pieces lie in logical tensors at other offsets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from lime_dist.plan.tensors import LogicalTensor, ParameterSpec, Piece


@dataclass(frozen=True)
class Box:
    """`sizes` elements along each dimension, from `offsets` on."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return prod(self.sizes)

    def moved(self, dim: int, by: int) -> Box:
        offsets = list(self.offsets)
        offsets[dim] += by
        return Box(tuple(offsets), self.sizes)

    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(offset, offset + size) for offset, size in zip(self.offsets, self.sizes, strict=True))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Where this box lies in the values of `outer`, which holds it."""
        return tuple(
            slice(offset - start, offset - start + size)
            for offset, size, start in zip(self.offsets, self.sizes, outer.offsets, strict=True)
        )


def common(left: Box, right: Box) -> Box | None:
    """What both hold; None for nothing."""
    offsets = tuple(map(max, left.offsets, right.offsets))
    ends = (
        min(start + size, other + other_size)
        for start, size, other, other_size in zip(left.offsets, left.sizes, right.offsets, right.sizes, strict=True)
    )
    sizes = tuple(end - offset for end, offset in zip(ends, offsets, strict=True))
    return Box(offsets, sizes) if min(sizes) > 0 else None


def range_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """The elements `start` to `stop`, in row-major order, of a tensor of `shape`: at most 2 * dimensions - 1 boxes."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield Box((start,), (stop - start,))
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # within one row
        yield from _in_row(shape, start // row, start % row, stop - start // row * row)
        return
    yield from _in_row(shape, first - 1, start - (first - 1) * row, row if start < first * row else 0)
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Box]:
    for box in range_boxes(shape[1:], start, stop):
        yield Box((row, *box.offsets), (1, *box.sizes))


@dataclass(frozen=True)
class Part:
    """The box `local` of a parameter is the box `logical` of `tensor`, which tensor ranks cut along `dim`."""

    tensor: LogicalTensor
    dim: int
    logical: Box
    local: Box


def parts_of(spec: ParameterSpec, start: int, stop: int) -> Iterator[Part]:
    """What the elements `start` to `stop` of a parameter are; padding is nothing."""
    for box in range_boxes(spec.shape, start, stop):
        for piece in spec.pieces:
            local = common(box, _place(spec, piece))
            if local is not None:
                logical = local.moved(piece.dim, piece.start - piece.local_start)
                yield Part(piece.tensor, piece.dim, logical, local)


def _place(spec: ParameterSpec, piece: Piece) -> Box:
    offsets, sizes = [0] * len(spec.shape), list(spec.shape)
    offsets[piece.dim], sizes[piece.dim] = piece.local_start, piece.length
    return Box(tuple(offsets), tuple(sizes))


# ---- what a file holds: chunks, the unit of reading and of checksums

_CHUNK_BYTES = 2**19
_MOST_ROWS = 256  # of chunks, about as many a tensor, whatever its size
_COLUMN_BLOCKS = 16  # so that up to as many tensor ranks read no one else's columns
_ELEMENT_BYTES = 4


def cut_into_chunks(part: Part) -> Iterator[Part]:
    """The same in chunks of at most about half a megabyte, at the same places whatever the layout: others read little more than
    they need."""
    rows, columns = _grid(part.tensor.shape, part.dim)
    for columns_of_part in _cut(part, 1, columns) if len(part.tensor.shape) > 1 else (part,):
        yield from _cut(columns_of_part, 0, rows)


def _grid(shape: tuple[int, ...], dim: int) -> tuple[int, int]:
    """Rows and columns of a chunk, at most. Whole rows of about half a megabyte: a replica's share ends somewhere among them."""
    most = max(_CHUNK_BYTES, _ELEMENT_BYTES * prod(shape) // _MOST_ROWS)
    rows = max(1, most // (_ELEMENT_BYTES * prod(shape[1:])))
    columns = shape[1] if len(shape) > 1 else 1
    return rows, columns // _COLUMN_BLOCKS if dim == 1 and columns % _COLUMN_BLOCKS == 0 else columns


def _cut(part: Part, dim: int, size: int) -> Iterator[Part]:
    """At the multiples of `size` along `dim` of the logical tensor."""
    start, stop = part.logical.offsets[dim], part.logical.offsets[dim] + part.logical.sizes[dim]
    while start < stop:
        end = min(stop, (start // size + 1) * size)
        logical = _narrowed(part.logical, dim, start, end - start)
        local_start = start - part.logical.offsets[dim] + part.local.offsets[dim]
        yield Part(part.tensor, part.dim, logical, _narrowed(part.local, dim, local_start, end - start))
        start = end


def _narrowed(box: Box, dim: int, start: int, size: int) -> Box:
    offsets, sizes = list(box.offsets), list(box.sizes)
    offsets[dim], sizes[dim] = start, size
    return Box(tuple(offsets), tuple(sizes))
