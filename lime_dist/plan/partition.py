"""Layers to chunks, and chunks to stages. Pure data."""

from __future__ import annotations

from collections.abc import Sequence

from lime_dist.errors import LayoutError, shown


def plan_partition(
    num_layers: int, num_stages: int, partition: str | Sequence[int], virtual_stages: int = 1
) -> tuple[range, ...]:
    """The layers of each of num_stages x virtual_stages chunks, contiguous and in order; chunk c is on stage c mod num_stages.

    `auto` gives every chunk the same number and spreads a remainder over the middle chunks first, as
    the first and the last also hold the embedding and the head. A list gives each chunk's count.
    Raises: LayoutError when a chunk would be empty or the counts do not add up.
    """
    num_chunks, is_virtual = num_stages * virtual_stages, virtual_stages > 1
    if num_chunks > num_layers:
        raise LayoutError(
            f"parallel.virtual_stages: {virtual_stages} x parallel.pp={num_stages} are {num_chunks} chunks "
            f"for model.num_layers={num_layers}; use at most {num_layers} chunks"
            if is_virtual
            else f"parallel.pp: {num_stages} stages for model.num_layers={num_layers}; use at most {num_layers}"
        )
    if isinstance(partition, str) and partition != "auto":
        raise LayoutError(
            f"pipeline.partition: {shown(partition)} is unknown; use auto or a list of counts, one for each stage"
        )
    counts = _even_counts(num_layers, num_chunks) if isinstance(partition, str) else list(partition)
    if len(counts) != num_chunks:
        raise LayoutError(
            f"pipeline.partition: {shown(counts)} has {len(counts)} chunks, parallel.pp={num_stages} x "
            f"parallel.virtual_stages={virtual_stages} are {num_chunks}; give one count a chunk"
            if is_virtual
            else f"pipeline.partition: {shown(counts)} has {len(counts)} stages, parallel.pp is {num_stages}; give one count a stage"
        )
    if min(counts) < 1 or sum(counts) != num_layers:
        raise LayoutError(
            f"pipeline.partition: {shown(counts)} must be counts of at least 1 that add up to model.num_layers={num_layers}"
        )
    chunks, first = [], 0
    for count in counts:
        chunks.append(range(first, first + count))
        first += count
    return tuple(chunks)


def _even_counts(num_layers: int, num_chunks: int) -> list[int]:
    counts = [num_layers // num_chunks] * num_chunks
    middle_first = sorted(range(num_chunks), key=lambda chunk: abs(2 * chunk - (num_chunks - 1)))
    for chunk in middle_first[: num_layers % num_chunks]:
        counts[chunk] += 1
    return counts


def layers_of_stages(chunks: Sequence[range], num_stages: int) -> tuple[tuple[int, ...], ...]:
    """The layers of all chunks of each stage, ascending."""
    return tuple(
        tuple(layer for layers in chunks[stage::num_stages] for layer in layers) for stage in range(num_stages)
    )
