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
and y under x[j, a] or y[i, b] for every edge and all a + b = d + 1 (a, b >= 1), x falling with a and y with b. All
constraints are differences of two variables, so the cut is exact. x[j, a] and y[i, b] with a + b = d + 1 cross the
same boundary, and the plan is the least over every boundary by itself, hence in total, at the largest, and under any
boundary costs: from a boundary to the next one the sources of the stage between come and its readers go, which only
ever turns raw entries into partial sums (minimum cuts are monotone in such changes: Gallo, Grigoriadis and Tarjan
1989), so the minimum vertex covers of all boundaries (Koenig) fit into one plan.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from math import lcm

from lime_dist.depth.pattern import Pattern
from lime_dist.errors import PlanError, shown


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
    """

    pattern: Pattern
    received: HopPlan
    sent: HopPlan
    reads: dict[int, tuple[int, ...]]
    kept: dict[int, tuple[int, ...]]

    def own_entries(self, layers: range) -> tuple[int, ...]:
        """Of the chunk's own layers, those whose entries are read at all."""
        return tuple(filter(self.pattern.is_entry, layers))

    def own_blocks(self, layers: range) -> tuple[range, ...]:
        """The blocks whose sum the chunk makes."""
        return tuple(block for block in self.pattern.blocks if block[-1] in layers)

    @property
    def summed_readers(self) -> tuple[int, ...]:
        """The readers, ascending, that have a sum here.

        It arrives or leaves as a partial sum, or takes entries received or kept.
        """
        if not self.pattern.routing.presummable:
            return ()
        return tuple(sorted({*self.received.partial_sums, *self.sent.partial_sums, *self.added_before}))

    @property
    def added(self) -> frozenset[int]:
        """The sources that the chunk adds into sums of readers."""
        return frozenset(source for sources in self.reads.values() for source in sources)

    @property
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
        nothing = HopPlan(hop=-1)
        return ChunkTransfer(
            pattern=self.pattern,
            received=self.hops[chunk_index - 1] if chunk_index > 0 else nothing,
            sent=self.hops[chunk_index] if chunk_index < len(self.hops) else nothing,
            reads=self._reads[chunk_index],
            kept=self._kept(chunk_index),
        )

    @cached_property
    def _reads(self) -> tuple[dict[int, tuple[int, ...]], ...]:
        """For each chunk, the sources that it adds into each reader's sum."""
        reads: tuple[dict[int, list[int]], ...] = tuple({} for _ in self.chunks)
        for reader, sources in enumerate(self.pattern.sources):
            for source in sources if self.pattern.has_router(reader) else ():
                reads[self.added_at(reader, source)].setdefault(reader, []).append(source)
        return tuple({reader: tuple(sources) for reader, sources in chunk.items()} for chunk in reads)

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
        costs = _integer_costs(boundary_cost, _num_boundaries(num_stages, len(chunks) - 1))
        hop_costs = tuple(costs[hop % num_stages] for hop in range(len(chunks) - 1))
        raw_until, sum_from = _least(pattern, chunk_of, num_stages, hop_costs, sum_cost)
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


def _integer_costs(boundary_cost: Sequence[float] | None, num_boundaries: int) -> tuple[int, ...]:
    """Whole numbers in the same proportions, so that the cut is exact."""
    if boundary_cost is None:
        return (1,) * num_boundaries
    if len(boundary_cost) != num_boundaries or any(cost <= 0 for cost in boundary_cost):
        raise PlanError(
            f"pipeline.boundary_cost: {shown(list(boundary_cost))} must be {num_boundaries} numbers above 0, one for each boundary"
        )
    fractions = [Fraction(str(cost)) for cost in boundary_cost]
    scale = lcm(*(fraction.denominator for fraction in fractions))
    return tuple(int(fraction * scale) for fraction in fractions)


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


# Entries of one chunk with the same readers, and readers of one chunk with the same sources, fare alike:
# the cut is over such groups, which makes a full pattern of any depth a problem of the size of its chunks.
_Group = tuple[int, frozenset[int]]


MAX_CUT_EDGES = 120_000  # which networkx cuts in a few seconds


@lru_cache(maxsize=8)  # a config's plan is asked for in several places
def _least(
    pattern: Pattern, chunk_of: tuple[int, ...], num_stages: int, hop_costs: tuple[int, ...], sum_cost: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    import networkx  # slow to import, and not needed to relay

    source_groups, reader_groups = _groups(pattern, chunk_of, num_stages)
    meetings = _meetings(source_groups, reader_groups, num_stages)
    _check_size(meetings, pattern.num_layers, _num_boundaries(num_stages, len(hop_costs)))
    graph = networkx.DiGraph()
    graph.add_nodes_from(("start", "end"))
    for group, members in source_groups.items():
        _add_source(graph, group, len(members), hop_costs[group[0] :][: num_stages - 1])
    for group, members in reader_groups.items():
        _add_reader(graph, group, len(members) * sum_cost, hop_costs[: group[0]][::-1][: num_stages - 1])
    for group, reader_group, distance in meetings:
        for hops in range(1, distance + 1):
            graph.add_edge(("sum", reader_group, distance + 1 - hops), ("raw", group, hops))
    # Of several minimum cuts networkx gives the one with the smallest end side: raw entries, where it makes no difference.
    # Any maximum flow gives the same one; this way to it takes half the time of networkx's own choice.
    _, (start_side, end_side) = networkx.minimum_cut(
        graph, "start", "end", flow_func=networkx.algorithms.flow.shortest_augmenting_path
    )
    raw_until, sum_from = list(chunk_of), list(chunk_of)
    for group, members in source_groups.items():
        for source in members:
            raw_until[source] += sum(("raw", group, hops) in start_side for hops in range(1, num_stages))
    for group, members in reader_groups.items():
        for reader in members:
            sum_from[reader] -= sum(("sum", group, hops) in end_side for hops in range(1, num_stages))
    return tuple(raw_until), tuple(sum_from)


def _groups(
    pattern: Pattern, chunk_of: tuple[int, ...], num_stages: int
) -> tuple[dict[_Group, list[int]], dict[_Group, list[int]]]:
    """Sources and readers of the edges between stages."""
    readers_of, sources_of = defaultdict(set), defaultdict(set)
    for reader, source, _ in _crossing_edges(pattern, chunk_of, num_stages):
        readers_of[source].add(reader)
        sources_of[reader].add(source)
    return _group(readers_of, chunk_of), _group(sources_of, chunk_of)


def _group(partners_of: dict[int, set[int]], chunk_of: tuple[int, ...]) -> dict[_Group, list[int]]:
    groups: dict[_Group, list[int]] = defaultdict(list)
    for layer, partners in partners_of.items():
        groups[chunk_of[layer], frozenset(partners)].append(layer)
    return groups


def _meetings(
    source_groups: dict[_Group, list[int]], reader_groups: dict[_Group, list[int]], num_stages: int
) -> list[tuple[_Group, _Group, int]]:
    """(sources, readers, d) for each two groups with edges between them."""
    group_of_reader = {reader: group for group, members in reader_groups.items() for reader in members}
    return [
        (group, other, (other[0] - group[0]) % num_stages)
        for group in source_groups
        for other in {group_of_reader[reader] for reader in group[1]}
    ]


def _check_size(meetings: Sequence[tuple[_Group, _Group, int]], num_layers: int, num_boundaries: int) -> None:
    size = sum(distance for *_, distance in meetings)
    if size > MAX_CUT_EDGES:
        raise PlanError(
            f"depth.pattern: too large to plan, {size} edges over {num_boundaries} boundaries of {num_layers} layers, "
            f"at most {MAX_CUT_EDGES}; lower parallel.pp or choose a smaller depth.pattern"
        )


def _add_source(graph, group: _Group, size: int, costs: Sequence[int]) -> None:
    """x = 1 where a node is on the start's side: then its edge to the end is cut.

    costs: of the hops after the chunk, in order.
    """
    for hops, cost in enumerate(costs, start=1):
        graph.add_edge(("raw", group, hops), "end", capacity=size * cost)
        if hops > 1:
            graph.add_edge(("raw", group, hops), ("raw", group, hops - 1))


def _add_reader(graph, group: _Group, size: int, costs: Sequence[int]) -> None:
    """y = 1 where a node is on the end's side: then its edge from the start is cut.

    costs: of the hops before the chunk, from the nearest.
    """
    for hops, cost in enumerate(costs, start=1):
        graph.add_edge("start", ("sum", group, hops), capacity=size * cost)
        if hops > 1:
            graph.add_edge(("sum", group, hops - 1), ("sum", group, hops))
