"""The transfer plan: what is in the bundle of every hop, and where each edge is added up. Pure data, no ranks.

With v virtual stages the chunks of layers go round the P stages: chunk c is on stage c mod P, and hop c, the way
from chunk c to c + 1, crosses boundary c mod P, of which the last leads from the last stage back to the first.
A stage keeps every entry that it has made or received, so no entry crosses to the same stage twice.

The raw entry of source j, made at chunk c(j), is carried over the next h(j) <= P - 1 hops. With a static router the
sum of reader i may be begun t(i) chunks before the reader's own, c(i), and is carried there as a *partial sum* of the
same size. An edge (reader i, source j) is served when h(j) + t(i) >= d = (c(i) - c(j)) mod P: at some chunk from
c(i) - t(i) to c(i) the stage has both, and at the first such chunk the source is added in. `relay` never begins early;
`least` minimises the total that crosses.

`least` is a minimum cut. With x[j, a] = "h(j) >= a" and y[i, b] = "t(i) >= b" it minimises the weighted sum of all x
and y under x[j, a] or y[i, b] for every edge and all a + b = d + 1 (a, b >= 1), x falling with a and y with b.
x[j, a] and y[i, b] with a + b = d + 1 cross the same boundary, so that but for the falling each boundary asks for a
vertex cover of its own. These fit into one plan: from a boundary to the next one the sources of the stage between come
and its readers go, which only ever turns raw entries into partial sums (of minimum cuts the one with the smallest end
side is monotone in such changes: Gallo, Grigoriadis and Tarjan 1989). So the plan is the least over every boundary by
itself, hence in total, at the largest, and under any boundary costs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import or_

from lime_dist.depth.pattern import Pattern
from lime_dist.errors import PlanError, shown
from lime_dist.plan.vertex_cover import bits, least_cover


@dataclass(frozen=True, kw_only=True)
class HopPlan:
    """The hop from chunk `hop` to `hop + 1`, besides the residual: layers ascending.

    raw_entries: source layers whose entries cross. partial_sums: reader layers whose sums, begun before, cross.
    """

    hop: int
    raw_entries: tuple[int, ...] = ()
    partial_sums: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ChunkTransfer:
    """One chunk's part of the plan.

    reads: for each reader, in this chunk or later, the sources that are added into its sum here, ascending.
    kept: for each earlier chunk of the same stage, ascending, the entries made or received there that are read here.
    shares: for each entry made or received here, of how many gradients its own is the sum: one of each reader that adds it
    here or on a later chunk of the stage, and one of the next chunk if it is sent on.
    """

    pattern: Pattern
    received: HopPlan
    sent: HopPlan
    reads: dict[int, tuple[int, ...]]
    kept: dict[int, tuple[int, ...]]
    shares: dict[int, int]

    def own_entries(self, layers: range) -> tuple[int, ...]:
        """Of the chunk's own layers, those whose entries are read at all."""
        return tuple(filter(self.pattern.is_entry, layers))

    def own_blocks(self, layers: range) -> tuple[range, ...]:
        """The blocks whose sum the chunk makes."""
        return tuple(block for block in self.pattern.blocks if block[-1] in layers)

    @cached_property
    def summed_readers(self) -> tuple[int, ...]:
        """The readers, ascending, that have a sum here.

        It arrives or leaves as a partial sum, or takes entries received or kept.
        """
        if not self.pattern.routing.presummable:
            return ()
        return tuple(sorted({*self.received.partial_sums, *self.sent.partial_sums, *self.added_before}))

    @cached_property
    def added(self) -> frozenset[int]:
        """The sources that the chunk adds into sums of readers."""
        return frozenset(source for sources in self.reads.values() for source in sources)

    @cached_property
    def added_before(self) -> frozenset[int]:
        """The readers to whose sums entries are added before the chunk's layers run: those received or kept."""
        not_own = {*self.received.raw_entries, *(entry for entries in self.kept.values() for entry in entries)}
        return frozenset(reader for reader, sources in self.reads.items() if not_own & set(sources))


@dataclass(frozen=True, kw_only=True)
class TransferPlan:
    """chunks[c]: the layers of chunk c, on stage c mod num_stages.

    raw_until[i]: the last chunk to which the raw entry of layer i is carried, at least its own.
    sum_from[j]: the chunk at which the sum of reader j is begun, at most its own.
    """

    pattern: Pattern
    chunks: tuple[range, ...]
    num_stages: int
    raw_until: tuple[int, ...]
    sum_from: tuple[int, ...]

    @cached_property
    def chunk_of(self) -> tuple[int, ...]:
        return chunk_of_layers(self.chunks)

    @cached_property
    def hops(self) -> tuple[HopPlan, ...]:
        layers = range(self.pattern.num_layers)
        return tuple(
            HopPlan(
                hop=hop,
                raw_entries=tuple(i for i in layers if self.chunk_of[i] <= hop < self.raw_until[i]),
                partial_sums=tuple(j for j in layers if self.sum_from[j] <= hop < self.chunk_of[j]),
            )
            for hop in range(len(self.chunks) - 1)
        )

    @property
    def num_crossings(self) -> int:
        """Entries and partial sums over all hops."""
        return sum(len(hop.raw_entries) + len(hop.partial_sums) for hop in self.hops)

    def added_at(self, reader: int, source: int) -> int:
        """The one chunk that adds the source into the reader's sum: the first whose stage has both."""
        first = max(self.sum_from[reader], self.chunk_of[source])
        if self._present_since(source, first) <= self.raw_until[source]:
            return first
        return first + (self.chunk_of[source] - first) % self.num_stages  # the next chunk of the stage that made it

    def chunk(self, chunk_index: int) -> ChunkTransfer:
        return self._chunk_transfers[chunk_index]

    @cached_property
    def _chunk_transfers(self) -> tuple[ChunkTransfer, ...]:
        nothing = HopPlan(hop=-1)
        received, sent = (nothing, *self.hops), (*self.hops, nothing)
        return tuple(
            ChunkTransfer(
                pattern=self.pattern,
                received=received[index],
                sent=sent[index],
                reads=reads,
                kept=self._kept(index),
                shares=self._shares[index],
            )
            for index, reads in enumerate(self._reads)
        )

    @cached_property
    def _reads(self) -> tuple[dict[int, tuple[int, ...]], ...]:
        """For each chunk, the sources that it adds into each reader's sum."""
        reads: tuple[dict[int, list[int]], ...] = tuple({} for _ in self.chunks)
        for reader, sources in enumerate(self.pattern.sources):
            for source in sources if self.pattern.has_router(reader) else ():
                reads[self.added_at(reader, source)].setdefault(reader, []).append(source)
        return tuple({reader: tuple(sources) for reader, sources in chunk.items()} for chunk in reads)

    @cached_property
    def _shares(self) -> tuple[dict[int, int], ...]:
        shares: tuple[Counter[int], ...] = tuple(Counter() for _ in self.chunks)
        for chunk_index, reads in enumerate(self._reads):
            kept_at = {source: earlier for earlier, sources in self._kept(chunk_index).items() for source in sources}
            for source in (source for sources in reads.values() for source in sources):
                shares[kept_at.get(source, chunk_index)][source] += 1
        for hop in self.hops:
            shares[hop.hop].update(hop.raw_entries)
        return tuple(dict(counted) for counted in shares)

    def _kept(self, chunk_index: int) -> dict[int, tuple[int, ...]]:
        kept: dict[int, list[int]] = defaultdict(list)
        for source in sorted({source for sources in self._reads[chunk_index].values() for source in sources}):
            kept[self._present_since(source, chunk_index)].append(source)
        return {earlier: tuple(kept[earlier]) for earlier in sorted(kept) if earlier < chunk_index}

    def _present_since(self, source: int, chunk_index: int) -> int:
        """The first chunk of the same stage that the entry could come to: has come to, if not after `raw_until`."""
        made_at = self.chunk_of[source]
        return made_at + (chunk_index - made_at) % self.num_stages


def chunk_of_layers(chunks: Sequence[range]) -> tuple[int, ...]:
    return tuple(index for index, layers in enumerate(chunks) for _ in layers)


def plan_transfer(
    pattern: Pattern,
    chunks: tuple[range, ...],
    *,
    policy: str,
    num_stages: int | None = None,
    boundary_cost: Sequence[float] | None = None,
    sum_cost: int = 1,
) -> TransferPlan:
    """Plan by `policy`: relay or least, which are the same where sums cannot cross in place of entries.

    num_stages: the stages that the chunks go round; one for each chunk if None. boundary_cost: what a byte over each
    boundary counts; equal if None. sum_cost: bytes of a partial sum over those of an entry.
    Raises: PlanError for an unknown policy, costs that do not fit the boundaries, chunks that do not fit the stages,
    or a block over the end of a chunk.
    """
    num_stages = num_stages or len(chunks)
    if len(chunks) % num_stages:
        raise PlanError(
            f"parallel.virtual_stages: {len(chunks)} chunks of layers do not go round {num_stages} stages; "
            "give every stage as many"
        )
    chunk_of = chunk_of_layers(chunks)
    _check_blocks(pattern, chunk_of, "chunk" if len(chunks) > num_stages else "stage")
    if policy == "relay" or (policy == "least" and not pattern.routing.presummable):
        raw_until, sum_from = _relay(pattern, chunk_of, num_stages)
    elif policy == "least":
        _check_costs(boundary_cost, _num_boundaries(num_stages, len(chunks) - 1))
        raw_until, sum_from = _least(pattern, chunk_of, num_stages, sum_cost)
    else:
        raise PlanError(f"depth.policy: {shown(policy)} is unknown; use least or relay")
    return TransferPlan(pattern=pattern, chunks=chunks, num_stages=num_stages, raw_until=raw_until, sum_from=sum_from)


def _check_blocks(pattern: Pattern, chunk_of: tuple[int, ...], noun: str) -> None:
    for block in pattern.blocks:
        if chunk_of[block[0]] != chunk_of[block[-1]]:
            raise PlanError(
                f"depth.pattern: the block of layers {block[0]} to {block[-1]} spans a {noun} boundary; "
                f"choose pipeline.partition so that {noun}s end where blocks do"
            )


def _num_boundaries(num_stages: int, num_hops: int) -> int:
    """One between each two stages and, with virtual stages, one from the last back to the first."""
    return min(num_stages, num_hops)


def _check_costs(boundary_cost: Sequence[float] | None, num_boundaries: int) -> None:
    if boundary_cost is None:
        return
    if len(boundary_cost) != num_boundaries or any(cost <= 0 for cost in boundary_cost):
        raise PlanError(
            f"pipeline.boundary_cost: {shown(list(boundary_cost))} must be {num_boundaries} numbers above 0, one for each boundary"
        )


def _crossing_edges(pattern: Pattern, chunk_of: tuple[int, ...], num_stages: int) -> Iterator[tuple[int, int, int]]:
    """(reader, source, d) of edges whose ends sit on different stages, d stages apart in the direction of the hops."""
    for reader, sources in enumerate(pattern.sources):
        for source in sources:
            if distance := (chunk_of[reader] - chunk_of[source]) % num_stages:
                yield reader, source, distance


def _relay(pattern: Pattern, chunk_of: tuple[int, ...], num_stages: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    num_hops = [0] * pattern.num_layers
    for _, source, distance in _crossing_edges(pattern, chunk_of, num_stages):
        num_hops[source] = max(num_hops[source], distance)
    return tuple(made_at + hops for made_at, hops in zip(chunk_of, num_hops)), chunk_of


def _least(
    pattern: Pattern, chunk_of: tuple[int, ...], num_stages: int, sum_cost: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The least over each boundary by itself; raw entries, where it makes no difference."""
    raw_until, sum_from = list(chunk_of), list(chunk_of)
    edges = _Edges(pattern, chunk_of, num_stages)
    for boundary in range(_num_boundaries(num_stages, chunk_of[-1])):
        sources_of = edges.over(boundary)
        cover = least_cover({readers: len(sources) for readers, sources in sources_of.items()}, sum_cost)
        for readers in cover.left:
            for source in sources_of[readers]:
                raw_until[source] += 1
        for reader in bits(cover.right):
            sum_from[reader] -= 1
    return tuple(raw_until), tuple(sum_from)


class _Edges:
    """Those between stages, by boundary. Sets of readers are bit masks."""

    def __init__(self, pattern: Pattern, chunk_of: tuple[int, ...], num_stages: int):
        self._stage_of = [chunk % num_stages for chunk in chunk_of]
        self._num_stages = num_stages
        self._readers = [0] * pattern.num_layers
        for reader, source, _ in _crossing_edges(pattern, chunk_of, num_stages):
            self._readers[source] |= 1 << reader
        on = [0] * num_stages
        for layer, stage in enumerate(self._stage_of):
            on[stage] |= 1 << layer
        self._before = [0, *accumulate(on, or_)]  # the layers on stages below each number

    def over(self, boundary: int) -> dict[int, list[int]]:
        """The sources whose edges cross the boundary behind stage `boundary`, by the readers of these edges."""
        found: dict[int, list[int]] = {}
        first = (boundary + 1) % self._num_stages
        behind = [self._between(first, stage) for stage in range(self._num_stages)]
        for source, readers in enumerate(self._readers):
            if crossing := readers & behind[self._stage_of[source]]:
                found.setdefault(crossing, []).append(source)
        return found

    def _between(self, first: int, stop: int) -> int:
        """The layers on stages `first`, ... up to `stop`, which is left out, round the loop."""
        if first <= stop:
            return self._before[stop] & ~self._before[first]
        return self._before[-1] & ~self._before[first] | self._before[stop]
