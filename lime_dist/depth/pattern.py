"""Depth patterns: which earlier entries each layer reads. Pure data.

An *entry* is what layer l leaves for later layers. A pattern maps every reader to its sources, in
ascending order with the reader's own layer last, which is the order of the router's middle axis
(LIMe v2, arXiv 2502.09245v2, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

from lime_dist.errors import PlanError


@dataclass(frozen=True)
class Pattern:
    """`sources[j]`: the layers that layer j reads, ascending, j itself last."""

    name: str
    sources: tuple[tuple[int, ...], ...]

    @property
    def num_layers(self) -> int:
        return len(self.sources)

    def has_router(self, layer: int) -> bool:
        """A layer that reads nothing but itself keeps its own keys and values and has no router."""
        return len(self.sources[layer]) > 1

    def is_entry(self, layer: int) -> bool:
        """Whether some router reads what `layer` leaves: its own, or a later layer's."""
        return self.has_router(layer) or self.last_reader(layer) > layer

    def last_reader(self, source: int) -> int:
        """The last layer that reads the entry of `source` (at least `source` itself)."""
        return max(reader for reader, read in enumerate(self.sources) if source in read)


def _earlier_full(reader: int, _: int) -> set[int]:
    return set(range(reader))


def _earlier_first(reader: int, count: int) -> set[int]:
    return {layer for layer in (*range(count), reader - 1) if 0 <= layer < reader}


def _earlier_last(reader: int, count: int) -> set[int]:
    return set(range(max(0, reader - count), reader))


def _earlier_stride(reader: int, step: int) -> set[int]:
    return {layer for layer in range(reader) if layer % step == 0 or layer == reader - 1}


_KINDS = {"full": _earlier_full, "first": _earlier_first, "last": _earlier_last, "stride": _earlier_stride}


def none_pattern(num_layers: int) -> Pattern:
    """Every layer reads only itself: the ordinary transformer."""
    return Pattern("none", tuple((layer,) for layer in range(num_layers)))


def parse_pattern(text: str, num_layers: int) -> Pattern:
    """`full`, `first:j` (the first j and the preceding layer), `last:j`, `stride:k` (every k-th and the preceding one).

    Raises: PlanError for anything else.
    """
    kind, _, argument = text.partition(":")
    if kind not in _KINDS or (kind == "full") == bool(argument):
        raise PlanError(f"depth.pattern: {text!r} is not a pattern; use full, first:j, last:j or stride:k")
    count = 0
    if argument:
        if not argument.strip().isdigit() or int(argument) < 1:
            raise PlanError(f"depth.pattern: {text!r} needs a whole number of at least 1 after the colon")
        count = int(argument)
    earlier = _KINDS[kind]
    sources = tuple((*sorted(earlier(reader, count)), reader) for reader in range(num_layers))
    return Pattern(text, sources)
