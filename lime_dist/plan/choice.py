"""What a start that chose its edges kept and dropped, and how much weight the kept ones have. Pure data.

The choosing is `selection.py`'s; where the weights come from is for `checkpoint/edges.py` to know.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lime_dist.depth.pattern import Pattern
from lime_dist.plan.selection import EdgeWeights, kept_share

MAX_GROUPS = 16  # lines of a table, so that it fits a screen


@dataclass(frozen=True, kw_only=True)
class KeptEdges:
    """Of neighbouring readers. sources: what any of them reads, ascending, without the own layers, which all read.

    weight_share: of the sum of their edges' weights; None where those are not known.
    """

    readers: range
    sources: tuple[int, ...]
    num_kept: int
    num_edges: int
    weight_share: float | None


@dataclass(frozen=True, kw_only=True)
class EdgeChoice:
    """pattern: what was kept. weights: of every edge that could have been, 0 for those that the routers do not have.

    weights are None where nothing was weighed at this start. how: it was chosen, in words.
    """

    pattern: Pattern
    weights: EdgeWeights | None
    how: str

    @cached_property
    def sources(self) -> tuple[tuple[int, ...], ...]:
        """Of each reader the earlier layers that there were to choose from, ascending."""
        if self.weights is None:
            return tuple(tuple(range(reader)) for reader in range(self.pattern.num_layers))
        sources: list[list[int]] = [[] for _ in range(self.pattern.num_layers)]
        for reader, source in sorted(self.weights):
            sources[reader].append(source)
        return tuple(map(tuple, sources))

    def is_kept(self, reader: int, source: int) -> bool:
        return source in self.pattern.sources[reader]

    def of_readers(self, readers: range) -> KeptEdges:
        edges = [(reader, source) for reader in readers for source in self.sources[reader]]
        kept = [edge for edge in edges if self.is_kept(*edge)]
        weights = None if self.weights is None else {edge: self.weights[edge] for edge in edges}
        return KeptEdges(
            readers=readers,
            sources=tuple(sorted({source for _, source in kept})),
            num_kept=len(kept),
            num_edges=len(edges),
            weight_share=None if weights is None else kept_share(weights, self.pattern),
        )

    @property
    def total(self) -> KeptEdges:
        return self.of_readers(range(self.pattern.num_layers))

    def groups(self, most: int = MAX_GROUPS) -> list[KeptEdges]:
        """Each reader, or runs of as many readers each that there are at most `most` of them."""
        readers = range(1, self.pattern.num_layers)
        size = max(1, -(-len(readers) // most))
        return [self.of_readers(readers[start : start + size]) for start in range(0, len(readers), size)]

    def report(self) -> dict[str, Any]:
        """All edges: of each reader what it reads and what was dropped, each source with its weight."""
        total = self.total
        return {
            "pattern": self.pattern.name,
            "how": self.how,
            "num_kept": total.num_kept,
            "num_edges": total.num_edges,
            "weight_share": total.weight_share,
            "readers": [self._reader_report(reader) for reader in range(1, self.pattern.num_layers)],
        }

    def _reader_report(self, reader: int) -> dict[str, Any]:
        kept = [source for source in self.sources[reader] if self.is_kept(reader, source)]
        dropped = [source for source in self.sources[reader] if not self.is_kept(reader, source)]
        return {
            "reader": reader,
            "weight_share": self.of_readers(range(reader, reader + 1)).weight_share,
            "kept": [self._weighed(reader, source) for source in kept],
            "dropped": [self._weighed(reader, source) for source in dropped],
        }

    def _weighed(self, reader: int, source: int) -> dict[str, Any]:
        return {"source": source, "weight": None if self.weights is None else self.weights[reader, source]}
