"""Layers to stages. Pure data."""

from __future__ import annotations

from collections.abc import Sequence

from lime_dist.errors import LayoutError, shown


def plan_partition(num_layers: int, num_stages: int, partition: str | Sequence[int]) -> tuple[range, ...]:
    """The layers of each stage, contiguous and in order.

    `auto` gives every stage the same number and spreads a remainder over the middle stages first, as
    the first and the last also hold the embedding and the head. A list gives each stage's count.
    Raises: LayoutError when a stage would be empty or the counts do not add up.
    """
    if num_stages > num_layers:
        raise LayoutError(
            f"parallel.pp: {num_stages} stages for model.num_layers={num_layers}; use at most {num_layers}"
        )
    if isinstance(partition, str) and partition != "auto":
        raise LayoutError(
            f"pipeline.partition: {shown(partition)} is unknown; use auto or a list of counts, one for each stage"
        )
    counts = _even_counts(num_layers, num_stages) if isinstance(partition, str) else list(partition)
    if len(counts) != num_stages:
        raise LayoutError(
            f"pipeline.partition: {shown(counts)} has {len(counts)} stages, parallel.pp is {num_stages}; give one count a stage"
        )
    if min(counts) < 1 or sum(counts) != num_layers:
        raise LayoutError(
            f"pipeline.partition: {shown(counts)} must be counts of at least 1 that add up to model.num_layers={num_layers}"
        )
    stages, first = [], 0
    for count in counts:
        stages.append(range(first, first + count))
        first += count
    return tuple(stages)


def _even_counts(num_layers: int, num_stages: int) -> list[int]:
    counts = [num_layers // num_stages] * num_stages
    middle_first = sorted(range(num_stages), key=lambda stage: abs(2 * stage - (num_stages - 1)))
    for stage in middle_first[: num_layers % num_stages]:
        counts[stage] += 1
    return counts
