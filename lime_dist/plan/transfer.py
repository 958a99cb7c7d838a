"""The transfer plan: what is in the bundle of every stage boundary, and where each edge is added up. Pure data, no ranks.

A raw entry made at stage s(i) is carried on to stage r(i) >= s(i). With a static router a reader's sum may be
started before the reader: at stage q(j) <= s(j), and carried to s(j) as a *partial sum* of the same size. An
edge (reader j, source i) is served when q(j) <= r(i): at some stage in between both are present and the
source is added in. `relay` never starts early; `least` minimises the total that crosses.

`least` is a minimum cut, and the least at every boundary by itself: from a boundary to the next one sources
come and readers go, which only ever turns raw entries into partial sums (minimum cuts are monotone in such
changes: Gallo, Grigoriadis and Tarjan 1989), so the minimum vertex covers of all boundaries (Koenig) fit into
one plan. It is therefore the least in total, at the largest boundary, and under any boundary costs. With x[i, b] = "raw i crosses boundary b" and y[j, b] = "partial sum j crosses b", it
minimises the weighted sum of all x and y under x[i, b] or y[j, b] for every edge that spans b, x falling and
y rising along the line of stages. All constraints are differences of two variables, so the cut is exact.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from math import lcm

from lime_dist.depth.pattern import Pattern
from lime_dist.errors import PlanError, shown


@dataclass(frozen=True, kw_only=True)
class BoundaryPlan:
    """The hop from stage `boundary` to `boundary + 1`, besides the residual: layers ascending.

    raw_entries: source layers whose entries cross. partial_sums: reader layers whose sums, begun before, cross.
    """

    boundary: int
    raw_entries: tuple[int, ...] = ()
    partial_sums: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StageTransfer:
    """One stage's part of the plan.

    reads: for each reader, on this stage or later, the sources that are added into its sum here, ascending.
    """

    pattern: Pattern
    received: BoundaryPlan
    sent: BoundaryPlan
    reads: dict[int, tuple[int, ...]]

    def own_entries(self, layers: range) -> tuple[int, ...]:
        """Of the stage's own layers, those whose entries are read at all."""
        return tuple(filter(self.pattern.is_entry, layers))

    def own_blocks(self, layers: range) -> tuple[range, ...]:
        """The blocks whose sum the stage makes."""
        return tuple(block for block in self.pattern.blocks if block[-1] in layers)

    @property
    def summed_readers(self) -> tuple[int, ...]:
        """The readers, ascending, that have a sum here: it arrives or leaves as a partial sum, or takes received entries."""
        if not self.pattern.routing.presummable:
            return ()
        received = set(self.received.raw_entries)
        reading = {reader for reader, sources in self.reads.items() if received & set(sources)}
        return tuple(sorted({*self.received.partial_sums, *self.sent.partial_sums, *reading}))


@dataclass(frozen=True, kw_only=True)
class TransferPlan:
    """stages[s]: the layers of stage s. raw_until[i] = r(i), sum_from[j] = q(j) as stage indices."""

    pattern: Pattern
    stages: tuple[range, ...]
    raw_until: tuple[int, ...]
    sum_from: tuple[int, ...]

    @cached_property
    def stage_of(self) -> tuple[int, ...]:
        return stage_of_layers(self.stages)

    @cached_property
    def boundaries(self) -> tuple[BoundaryPlan, ...]:
        layers = range(self.pattern.num_layers)
        return tuple(
            BoundaryPlan(
                boundary=boundary,
                raw_entries=tuple(i for i in layers if self.stage_of[i] <= boundary < self.raw_until[i]),
                partial_sums=tuple(j for j in layers if self.sum_from[j] <= boundary < self.stage_of[j]),
            )
            for boundary in range(len(self.stages) - 1)
        )

    @property
    def num_crossings(self) -> int:
        """Entries and partial sums over all boundaries."""
        return sum(len(boundary.raw_entries) + len(boundary.partial_sums) for boundary in self.boundaries)

    def added_at(self, reader: int, source: int) -> int:
        """The one stage that adds the source into the reader's sum: the first that has both."""
        return max(self.sum_from[reader], self.stage_of[source])

    @cached_property
    def _reads(self) -> tuple[dict[int, tuple[int, ...]], ...]:
        """For each stage, the sources that it adds into each reader's sum."""
        reads: tuple[dict[int, list[int]], ...] = tuple({} for _ in self.stages)
        for reader, sources in enumerate(self.pattern.sources):
            for source in sources if self.pattern.has_router(reader) else ():
                reads[self.added_at(reader, source)].setdefault(reader, []).append(source)
        return tuple({reader: tuple(sources) for reader, sources in stage.items()} for stage in reads)

    def stage(self, stage_index: int) -> StageTransfer:
        nothing = BoundaryPlan(boundary=-1)
        return StageTransfer(
            pattern=self.pattern,
            received=self.boundaries[stage_index - 1] if stage_index > 0 else nothing,
            sent=self.boundaries[stage_index] if stage_index < len(self.boundaries) else nothing,
            reads=self._reads[stage_index],
        )


def stage_of_layers(stages: Sequence[range]) -> tuple[int, ...]:
    return tuple(index for index, layers in enumerate(stages) for _ in layers)


def plan_transfer(
    pattern: Pattern,
    stages: tuple[range, ...],
    *,
    policy: str,
    boundary_cost: Sequence[float] | None = None,
    sum_cost: int = 1,
) -> TransferPlan:
    """Plan by `policy`: relay or least, which are the same where sums cannot cross in place of entries.

    boundary_cost: what a byte over each boundary counts; equal if None. sum_cost: bytes of a partial sum
    over those of an entry.
    Raises: PlanError for an unknown policy, costs that do not fit the boundaries, or a block over a boundary.
    """
    stage_of = stage_of_layers(stages)
    for block in pattern.blocks:
        if stage_of[block[0]] != stage_of[block[-1]]:
            raise PlanError(
                f"depth.pattern: the block of layers {block[0]} to {block[-1]} spans a stage boundary; "
                "choose pipeline.partition so that stages end where blocks do"
            )
    if policy == "relay" or (policy == "least" and not pattern.routing.presummable):
        raw_until, sum_from = _relay(pattern, stage_of)
    elif policy == "least":
        raw_until, sum_from = _least(pattern, stage_of, _integer_costs(boundary_cost, len(stages) - 1), sum_cost)
    else:
        raise PlanError(f"depth.policy: {shown(policy)} is unknown; use least or relay")
    return TransferPlan(pattern=pattern, stages=stages, raw_until=raw_until, sum_from=sum_from)


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


def _relay(pattern: Pattern, stage_of: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    raw_until = tuple(stage_of[pattern.last_reader(source)] for source in range(pattern.num_layers))
    return raw_until, stage_of


# Entries of one stage with the same readers, and readers of one stage with the same sources, fare alike:
# the cut is over such groups, which makes a full pattern of any depth a problem of the size of its stages.
_Group = tuple[int, frozenset[int]]


MAX_CUT_EDGES = 120_000  # which networkx cuts in a few seconds


@lru_cache(maxsize=8)  # a config's plan is asked for in several places
def _least(
    pattern: Pattern, stage_of: tuple[int, ...], costs: tuple[int, ...], sum_cost: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    import networkx  # slow to import, and not needed to relay

    readers_of, sources_of = _crossing_edges(pattern, stage_of)
    source_groups, reader_groups = _group(readers_of, stage_of), _group(sources_of, stage_of)
    group_of_reader = {reader: group for group, members in reader_groups.items() for reader in members}
    meetings = [(group, other) for group in source_groups for other in {group_of_reader[reader] for reader in group[1]}]
    _check_size(meetings, len(pattern.sources), len(costs))
    graph = networkx.DiGraph()
    graph.add_nodes_from(("start", "end"))
    for group, members in source_groups.items():
        _add_source(graph, group, len(members), costs)
    for group, members in reader_groups.items():
        _add_reader(graph, group, len(members) * sum_cost, costs)
    for group, reader_group in meetings:
        for boundary in range(group[0], reader_group[0]):
            graph.add_edge(("sum", reader_group, boundary), ("raw", group, boundary))
    # Of several minimum cuts networkx gives the one with the smallest end side: raw entries, where it makes no difference.
    _, (start_side, _) = networkx.minimum_cut(graph, "start", "end")
    raw_until, sum_from = list(stage_of), list(stage_of)
    for group, members in source_groups.items():
        crossed = sum(("raw", group, boundary) in start_side for boundary in range(group[0], len(costs)))
        for source in members:
            raw_until[source] = group[0] + crossed
    for group, members in reader_groups.items():
        crossed = sum(("sum", group, boundary) not in start_side for boundary in range(group[0]))
        for reader in members:
            sum_from[reader] = group[0] - crossed
    return tuple(raw_until), tuple(sum_from)


def _check_size(meetings: Sequence[tuple[_Group, _Group]], num_layers: int, num_boundaries: int) -> None:
    size = sum(reader_group[0] - group[0] for group, reader_group in meetings)
    if size > MAX_CUT_EDGES:
        raise PlanError(
            f"depth.pattern: too large to plan, {size} edges over {num_boundaries} boundaries of {num_layers} layers, "
            f"at most {MAX_CUT_EDGES}; lower parallel.pp or choose a smaller depth.pattern"
        )


def _crossing_edges(
    pattern: Pattern, stage_of: tuple[int, ...]
) -> tuple[dict[int, frozenset[int]], dict[int, frozenset[int]]]:
    """Readers of each source and sources of each reader over edges whose ends sit in different stages."""
    readers_of, sources_of = defaultdict(set), defaultdict(set)
    for reader, sources in enumerate(pattern.sources):
        for source in sources:
            if stage_of[source] < stage_of[reader]:
                readers_of[source].add(reader)
                sources_of[reader].add(source)
    freeze = lambda edges: {layer: frozenset(others) for layer, others in edges.items()}  # noqa: E731
    return freeze(readers_of), freeze(sources_of)


def _group(partners_of: dict[int, frozenset[int]], stage_of: tuple[int, ...]) -> dict[_Group, list[int]]:
    groups: dict[_Group, list[int]] = defaultdict(list)
    for layer, partners in partners_of.items():
        groups[stage_of[layer], partners].append(layer)
    return groups


def _add_source(graph, group: _Group, size: int, costs: tuple[int, ...]) -> None:
    """x = 1 where a node is on the start's side: then its edge to the end is cut. x falls along the boundaries."""
    for boundary in range(group[0], len(costs)):
        graph.add_edge(("raw", group, boundary), "end", capacity=size * costs[boundary])
        if boundary > group[0]:
            graph.add_edge(("raw", group, boundary), ("raw", group, boundary - 1))


def _add_reader(graph, group: _Group, size: int, costs: tuple[int, ...]) -> None:
    """y = 1 where a node is on the end's side: then its edge from the start is cut. y rises along the boundaries."""
    for boundary in range(group[0]):
        graph.add_edge("start", ("sum", group, boundary), capacity=size * costs[boundary])
        if boundary > 0:
            graph.add_edge(("sum", group, boundary), ("sum", group, boundary - 1))
