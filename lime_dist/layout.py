"""Rank <-> (pp, dp, tp). Integers only; knows no process group and no device.

Tensor ranks are neighbours, then data ranks, then pipeline ranks: Megatron's order "tp-cp-ep-dp-pp",
so that the chattiest group stays within a node and neighbouring stages on neighbouring nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

from lime_dist.errors import LayoutError


@dataclass(frozen=True, kw_only=True)
class Coordinate:
    """The place of one global rank."""

    pp_rank: int
    dp_rank: int
    tp_rank: int

    def __str__(self) -> str:
        return f"pp={self.pp_rank} dp={self.dp_rank} tp={self.tp_rank}"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The sizes of the three axes."""

    tp: int = 1
    pp: int = 1
    dp: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def coordinate(self, global_rank: int) -> Coordinate:
        """Place of `global_rank`. Raises: LayoutError when it lies outside the layout."""
        if not 0 <= global_rank < self.world_size:
            raise LayoutError(f"rank {global_rank} is outside {self}: start {self.world_size} ranks")
        rest, tp_rank = divmod(global_rank, self.tp)
        pp_rank, dp_rank = divmod(rest, self.dp)
        return Coordinate(pp_rank=pp_rank, dp_rank=dp_rank, tp_rank=tp_rank)

    def global_rank(self, coordinate: Coordinate) -> int:
        return (coordinate.pp_rank * self.dp + coordinate.dp_rank) * self.tp + coordinate.tp_rank

    def __str__(self) -> str:
        return f"tp={self.tp} pp={self.pp} dp={self.dp}"
