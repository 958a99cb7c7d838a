"""The transfer plan: what is in the bundle of every stage boundary. Pure data, no ranks.

Policy `relay`: a raw entry is carried, stage by stage, from the stage that makes it to the last stage
that reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

from lime_dist.depth.pattern import Pattern


@dataclass(frozen=True, kw_only=True)
class BoundaryPlan:
    """The hop from stage `boundary` to stage `boundary + 1`: raw entries by layer, ascending, besides the residual."""

    boundary: int
    raw_entries: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TransferPlan:
    """One `BoundaryPlan` per boundary; stage s receives `received(s)` and sends `sent(s)`."""

    boundaries: tuple[BoundaryPlan, ...]

    def received(self, stage_index: int) -> tuple[int, ...]:
        """Layers whose raw entries stage `stage_index` gets from the stage before it."""
        return self.boundaries[stage_index - 1].raw_entries if stage_index > 0 else ()

    def sent(self, stage_index: int) -> tuple[int, ...]:
        """Layers whose raw entries stage `stage_index` sends to the next stage."""
        return self.boundaries[stage_index].raw_entries if stage_index < len(self.boundaries) else ()


def plan_relay(pattern: Pattern, stages: tuple[range, ...]) -> TransferPlan:
    """Relay every raw entry to the last stage that reads it. `stages[s]`: the layers of stage s, in order."""
    return TransferPlan(
        boundaries=tuple(
            BoundaryPlan(
                boundary=boundary,
                raw_entries=tuple(layer for layer in range(layers.stop) if pattern.last_reader(layer) >= layers.stop),
            )
            for boundary, layers in enumerate(stages[:-1])
        )
    )
