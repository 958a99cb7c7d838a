"""Depth patterns: which earlier entries each layer reads. Pure data.

An *entry* is what layer l leaves for later layers; which of its tensors that is says `routing`. A pattern
maps every reader to its sources, in ascending order with the reader's own layer last, which is the order of
the router's second axis (LIMe v2, arXiv 2502.09245v2, section 3; selective patterns: its appendix D and beyond).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from lime_dist.depth.key_value import KEY_VALUE, NO_ROUTING
from lime_dist.depth.routing import Routing
from lime_dist.errors import PlanError, shown

# The edges of a pattern as a config holds them once it is resolved: reader -> earlier sources.
Edges = Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class Pattern:
    """`sources[j]`: the layers that layer j reads, ascending, j itself last.

    blocks: groups of neighbouring layers that later readers see as one. What the last layer of a block
    leaves for them is the sum of the entries of the whole block; the layers of the block see their own entries.
    """

    name: str
    sources: tuple[tuple[int, ...], ...]
    blocks: tuple[range, ...] = ()
    routing: Routing = KEY_VALUE

    @property
    def num_layers(self) -> int:
        return len(self.sources)

    @property
    def num_edges(self) -> int:
        """Edges between different layers."""
        return sum(len(sources) - 1 for sources in self.sources)

    @property
    def edges(self) -> dict[int, list[int]]:
        """The pattern as a config can hold it."""
        return {reader: list(sources[:-1]) for reader, sources in enumerate(self.sources) if len(sources) > 1}

    def has_router(self, layer: int) -> bool:
        """A layer that reads nothing but itself keeps its own keys and values and has no router."""
        return len(self.sources[layer]) > 1

    def is_entry(self, layer: int) -> bool:
        """Whether some router reads what `layer` leaves: its own, or a later layer's."""
        return self.has_router(layer) or self.last_reader(layer) > layer

    def last_reader(self, source: int) -> int:
        """The last layer that reads the entry of `source` (at least `source` itself)."""
        return self._last_readers[source]

    @cached_property
    def _last_readers(self) -> tuple[int, ...]:
        last = list(range(self.num_layers))
        for reader, sources in enumerate(self.sources):
            for source in sources:
                last[source] = max(last[source], reader)
        return tuple(last)


def lost_edges(before: Pattern, after: Pattern) -> int:
    """How many edges of `before` are not in `after`."""
    return sum(len(set(old) - set(new)) for old, new in zip(before.sources, after.sources, strict=True))


def none_pattern(num_layers: int) -> Pattern:
    """Every layer reads only itself: the ordinary transformer."""
    return Pattern("none", tuple((layer,) for layer in range(num_layers)), routing=NO_ROUTING)


def pattern_of_edges(edges: Mapping[int, Iterable[int]], num_layers: int, name: str = "edges") -> Pattern:
    """Raises: PlanError for an edge outside the model or to a layer that is not earlier."""
    sources = []
    for reader in edges:
        if not 0 <= reader < num_layers:
            raise PlanError(
                f"depth.pattern: reader {reader} is outside the {num_layers} layers; use 1 to {num_layers - 1}"
            )
    for reader in range(num_layers):
        earlier = set(edges.get(reader, ()))
        for source in earlier:
            if not 0 <= source < reader:
                raise PlanError(
                    f"depth.pattern: layer {reader} cannot read layer {source}; a layer reads earlier layers, 0 to {reader - 1}"
                )
        sources.append((*sorted(earlier), reader))
    return Pattern(name, tuple(sources))


# Each term of a pattern: (reader, its number, the stages) -> earlier sources.
_Term = Callable[[int, int, Sequence[Sequence[int]]], Iterable[int]]


def _full(reader: int, _: int, __: Sequence[Sequence[int]]) -> Iterable[int]:
    return range(reader)


def _first(reader: int, count: int, _: Sequence[Sequence[int]]) -> Iterable[int]:
    return {*range(min(count, reader)), reader - 1}


def _last(reader: int, count: int, _: Sequence[Sequence[int]]) -> Iterable[int]:
    return range(max(0, reader - count), reader)


def _stride(reader: int, step: int, _: Sequence[Sequence[int]]) -> Iterable[int]:
    return {*range(0, reader, step), reader - 1}


def _within_stage(reader: int, _: int, stages: Sequence[Sequence[int]]) -> Iterable[int]:
    (own,) = (layers for layers in stages if reader in layers)
    return own[: own.index(reader)]


def _block(reader: int, size: int, _: Sequence[Sequence[int]]) -> Iterable[int]:
    own_block = reader // size * size
    return {*range(size - 1, own_block, size), *range(own_block, reader)}


_TERMS: dict[str, tuple[_Term, bool]] = {  # term, whether it takes a number
    "full": (_full, False),
    "first": (_first, True),
    "last": (_last, True),
    "stride": (_stride, True),
    "block": (_block, True),
    "within_stage": (_within_stage, False),
}
_KNOWN = (
    "full, first:j, last:j, stride:k, block:n, within_stage, several of these joined by +, edges:FILE, budget:SIZE or top_p:P"
    " (LLaMA: set depth.router=none)"
)


def parse_pattern(text: str, num_layers: int, stages: Sequence[Sequence[int]] | None = None) -> Pattern:
    """Terms joined by `+`, whose edges are united.

    `full`; `first:j` the first j and the preceding layer; `last:j`; `stride:k` every k-th and the
    preceding one; `block:n` the sum of each earlier block of n layers as one entry, and the layers of the own
    block; `within_stage` all earlier layers of the reader's own stage (needs `stages`: the layers of each).
    Raises: PlanError for anything else.
    """
    stages = stages if stages is not None else (range(num_layers),)
    terms = [_parse_term(term.strip(), text) for term in text.split("+")]
    edges = {
        reader: {source for term, number in terms for source in term(reader, number, stages)}
        for reader in range(1, num_layers)
    }
    return replace(pattern_of_edges(edges, num_layers, text), blocks=_blocks(text, terms, num_layers))


def _blocks(text: str, terms: Sequence[tuple[_Term, int]], num_layers: int) -> tuple[range, ...]:
    """The whole blocks of a `block:n` term; a block of one layer is that layer's own entry."""
    sizes = [number for term, number in terms if term is _block]
    if sizes and (len(sizes) > 1 or any(term is _within_stage for term, _ in terms)):
        raise PlanError(
            f"depth.pattern: {shown(text)}: block:n stands once, and not with within_stage; drop one of them"
        )
    size = sizes[0] if sizes else 1
    return tuple(range(end - size, end) for end in range(size, num_layers, size)) if size > 1 else ()


def _parse_term(term: str, text: str) -> tuple[_Term, int]:
    kind, colon, argument = term.partition(":")
    if kind not in _TERMS or _TERMS[kind][1] != bool(colon):
        raise PlanError(f"depth.pattern: {shown(text)} is not a pattern; use {_KNOWN}")
    function, takes_number = _TERMS[kind]
    if not takes_number:
        return function, 0
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*", argument) or int(argument) < 1:
        raise PlanError(f"depth.pattern: {shown(text)} needs a whole number of at least 1 after the colon")
    return function, int(argument)
