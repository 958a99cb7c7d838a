"""What a profile says a machine costs, for `plan/simulate.py`. Pure data.

On CPUs that ranks share, computing is counted by the time that a rank had of a core, and the simulator lets ranks share the
cores again; what other threads of a rank did, which move its messages, is laid on its sends.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import inf
from statistics import fmean, median

import numpy

from lime_dist.layout import Coordinate
from lime_dist.plan.costs import (
    Costs,
    LinkSpeed,
    MoveCost,
    Rates,
    collective_seconds,
    costs_of,
    pass_seconds,
    reduction_seconds,
)
from lime_dist.plan.machine import Machine
from lime_dist.plan.operations import Verb
from lime_dist.plan.schedule import Kind
from lime_dist.plan.simulate import simulate
from lime_dist.profiling.accounting import account
from lime_dist.profiling.deliveries import Delivery
from lime_dist.profiling.operation_times import Timed, timed_operations
from lime_dist.profiling.profile_files import Profile
from lime_dist.profiling.timeline import Cause, Piece, StepTimeline

_MOST_KEPT = 2000  # of the variation of RUNs
_SHARED = frozenset({Cause.DEPENDENCY, Cause.DATA_PARALLEL})  # of the end, what is priced by itself
_END_PHASES = frozenset(("gradients", "norm", "agreement", "update", "record"))


def measured_rates(profile: Profile, timelines: Sequence[StepTimeline]) -> Rates:
    """With which any plan of the model can be priced.

    Collectives are priced by their bytes: at the speed that those of the profile reached, or where it has none at that of its
    slowest link. Whatever the simulator leaves out, such as switches between processes, makes passes and messages longer alike:
    by as much as the profile's own step took longer than its simulation.
    """
    rates, recorded = _rates(profile, timelines), account(profile, timelines).step_seconds
    for _ in range(_SCALINGS):
        rates = _scaled(rates, recorded / simulate(profile.plan, costs_of(profile.plan, rates)).step_seconds)
    return rates


_SCALINGS = 2  # not all of a step is scaled, so that once leaves a little


def _scaled(rates: Rates, factor: float) -> Rates:
    return replace(
        rates,
        seconds_per_flop={kind: factor * seconds for kind, seconds in rates.seconds_per_flop.items()},
        seconds_per_routing_flop={kind: factor * seconds for kind, seconds in rates.seconds_per_routing_flop.items()},
        moves={verb: MoveCost(seconds=factor * cost.seconds) for verb, cost in rates.moves.items()},
    )


def _rates(profile: Profile, timelines: Sequence[StepTimeline]) -> Rates:
    cores = shared_cores(profile)
    operations = _Operations(profile, range(len(profile.ranks)), by_core=cores is not None, collectives=False)
    per_flop = {kind: operations.seconds_per_flop(kind) for kind in Kind}
    stages = [_ranks_of(profile, stage) for stage in range(len(profile.plan.stages))]
    links = measured_links(timelines)
    collectives = _collective_speed(profile, timelines) or _slowest(links)
    return Rates(
        seconds_per_flop={kind: layers for kind, (layers, _) in per_flop.items()},
        seconds_per_routing_flop={kind: routing for kind, (_, routing) in per_flop.items()},
        within_node=collectives,
        between_nodes=collectives,
        links=links,
        moves=operations.moves,
        data_seconds=median(_phase_seconds(timelines, ranks, {"data"}) for ranks in stages),
        end_seconds=max(_phase_seconds(timelines, ranks, _END_PHASES, _SHARED) for ranks in stages),
        cores=cores,
        variation=operations.variation,
    )


def wall_costs(profile: Profile, timelines: Sequence[StepTimeline], pipeline: tuple[int, int]) -> Costs:
    """Of the profile's own plan, each pass of each stage as long as it was: what shared cores cost is in it, and what its
    messages take of the host, which is laid on the next RUN.

    pipeline: whose stages, by tensor rank and replica.
    """
    layout = profile.plan.layout
    ranks = [
        layout.global_rank(Coordinate(pp_rank=stage, tp_rank=pipeline[0], dp_rank=pipeline[1]))
        for stage in range(layout.pp)
    ]
    operations = _Operations(profile, ranks, by_core=False, collectives=True)
    return Costs(
        runs=operations.runs,
        links=measured_links(timelines, frozenset(ranks)),
        data_seconds=tuple(_phase_seconds(timelines, [rank], {"data"}) for rank in ranks),
        end_seconds=tuple(_phase_seconds(timelines, [rank], _END_PHASES) for rank in ranks),
    )


def shared_cores(profile: Profile) -> float | None:
    """Of all hosts together; None where ranks have devices of their own, or several threads, whose time on a core is not known."""
    hosts = {record.host: record.cores for record in profile.ranks}
    if max(record.threads for record in profile.ranks) > 1 or None in hosts.values():
        return None
    return float(sum(count for count in hosts.values() if count is not None))


# ---- operations


class _Operations:
    """Mean seconds of each, of all steps of some ranks.

    by_core: only those in which a rank had a core, with what messages take of the host by itself, else laid on the next RUN.
    collectives: whether RUNs have what they waited in those of the tensor group.
    """

    def __init__(self, profile: Profile, ranks: Iterable[int], *, by_core: bool, collectives: bool):
        self._profile, self._by_core, self._collectives = profile, by_core, collectives
        self._runs: dict[tuple[int, Kind], list[list[float]]] = defaultdict(list)
        self._walls: dict[tuple[int, Kind, int], list[float]] = defaultdict(list)  # of each RUN of a pass
        self._moves: dict[Verb, list[float]] = defaultdict(list)
        self._other_threads = 0.0  # of a step, of all ranks
        for rank in ranks:
            for step, timed in zip(profile.ranks[rank].steps, timed_operations(profile, rank), strict=True):
                self._add(timed)
                if self._by_core and step.busy is not None:
                    own = step.busy[-1] - step.busy[0]
                    self._other_threads += max(0, step.process_busy - own) / 1e9

    def _add(self, operations: Iterable[Timed]) -> None:
        of_pass: list[float] = []
        on_host = 0.0
        for timed in operations:
            seconds = timed.busy if self._by_core and timed.busy is not None else timed.seconds - timed.collective
            if timed.operation.verb is Verb.RUN:
                place = timed.operation.action.chunk, timed.operation.action.kind, len(of_pass)
                self._walls[place].append(timed.seconds - timed.collective)
                of_pass.append(seconds + on_host + (timed.collective if self._collectives else 0.0))
                on_host = 0.0
                if timed.operation.until == "behind":
                    self._runs[timed.operation.action.chunk, timed.operation.action.kind].append(of_pass)
                    of_pass = []
            elif self._by_core:
                self._moves[timed.operation.verb].append(seconds)
            elif timed.operation.verb is not Verb.AWAIT:
                on_host += seconds

    @property
    def runs(self) -> dict[tuple[int, Kind], tuple[float, ...]]:
        """By chunk and kind, of each RUN of a pass."""
        return {place: tuple(map(fmean, zip(*passes))) for place, passes in self._runs.items()}

    @property
    def variation(self) -> tuple[float, ...]:
        """What each RUN took over the mean of its place in a pass."""
        found = [wall / mean for walls in self._walls.values() if (mean := fmean(walls)) > 0 for wall in walls]
        return tuple(found[:: 1 + len(found) // _MOST_KEPT])

    @property
    def moves(self) -> dict[Verb, MoveCost]:
        number = len(self._moves[Verb.SEND])
        others = {Verb.SEND: self._other_threads / number} if number else {}
        return {
            verb: MoveCost(seconds=fmean(seconds) + others.get(verb, 0.0))
            for verb, seconds in self._moves.items()
            if seconds
        }

    def seconds_per_flop(self, kind: Kind) -> tuple[float, float]:
        """Of layers and head, and of routing."""
        chunks, runs = self._profile.plan.chunks, self.runs
        of_layers, of_routing = (
            [sum(pass_seconds(self._profile.plan.config, rates, chunk, kind)) for chunk in chunks] for rates in _UNITS
        )
        return _fitted(of_layers, of_routing, [sum(runs[chunk.chunk, kind]) for chunk in chunks])


def _unit(layers: float, routing: float, bytes_per_second: float = inf) -> Rates:
    """With which a pass takes as many seconds as it has operations of these, and no collectives, if not as many as their bytes."""
    link = LinkSpeed(bytes_per_second=bytes_per_second)
    return Rates(
        seconds_per_flop=dict.fromkeys(Kind, layers),
        seconds_per_routing_flop=dict.fromkeys(Kind, routing),
        within_node=link,
        between_nodes=link,
    )


_UNITS = _unit(1.0, 0.0), _unit(0.0, 1.0)
_MOST_OVER = 40.0  # times as long as one of a matrix product a routing FLOP may take, to be believed


def _fitted(layers: Sequence[float], routing: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Least squares over the chunks, which differ in their routing; one rate where that tells nothing that can be."""
    both = numpy.array([layers, routing]).T
    if numpy.linalg.matrix_rank(both) == 2:
        of_layers, of_routing = numpy.linalg.lstsq(both, numpy.array(seconds), rcond=None)[0].tolist()
        if 0 < of_layers <= of_routing <= _MOST_OVER * of_layers:
            return of_layers, of_routing
    alike = sum(seconds) / (sum(layers) + sum(routing))
    return alike, alike


# ---- collectives


def _collective_speed(profile: Profile, timelines: Sequence[StepTimeline]) -> LinkSpeed | None:
    """That at which the bytes of the tensor group's collectives take what they took, else those of the replicas' sum."""
    plan, unit = profile.plan, _unit(0.0, 0.0, bytes_per_second=1.0)
    if plan.layout.tp > 1:
        counted = [collective_seconds(plan.layout.tp, unit, one) for one in plan.chunks]
        num_bytes, cause = len(Kind) * plan.num_microbatches * sum(counted) / len(plan.stages), Cause.TENSOR
    elif plan.layout.dp > 1:
        num_bytes = fmean(reduction_seconds(plan, unit, stage) for stage in plan.stages)
        cause = Cause.DATA_PARALLEL
    else:
        return None
    taken = fmean(
        sum(piece.seconds for piece in timeline.pieces[record.rank] if piece.cause is cause and _is_complete(piece))
        for timeline in timelines
        for record in profile.ranks
    )
    return LinkSpeed(bytes_per_second=num_bytes / taken) if num_bytes and taken else None


def _is_complete(piece: Piece) -> bool:
    """All ranks have come to the collective: what it takes from here on is its own."""
    return piece.collective is not None and piece.begin >= piece.collective.complete


# ---- links


def measured_links(
    timelines: Sequence[StepTimeline], senders: frozenset[int] | None = None
) -> dict[tuple[int, int], LinkSpeed]:
    """By (from stage, to stage): what messages took alone. senders: global ranks; None: all."""
    ways: dict[tuple[int, int], list[Delivery]] = defaultdict(list)
    for timeline in timelines:
        for delivery in timeline.deliveries:
            if senders is not None and delivery.sender not in senders:
                continue
            ways[timeline.stage_of(delivery.sender), timeline.stage_of(delivery.receiver)].append(delivery)
    return {way: _speed(deliveries) for way, deliveries in ways.items()}


def _speed(deliveries: Sequence[Delivery]) -> LinkSpeed:
    """A line through the median times of messages of each size, where there are two sizes or more."""
    by_size: dict[int, list[float]] = defaultdict(list)
    for delivery in deliveries:
        by_size[delivery.message.num_bytes].append(delivery.transfer_seconds)
    points = [(size, median(seconds), len(seconds)) for size, seconds in by_size.items()]
    weight = sum(count for *_, count in points)
    mean_size = sum(size * count for size, _, count in points) / weight
    mean_seconds = max(1e-9, sum(seconds * count for _, seconds, count in points) / weight)
    spread = sum(count * (size - mean_size) ** 2 for size, _, count in points)
    slope = sum(count * (size - mean_size) * (seconds - mean_seconds) for size, seconds, count in points)
    per_byte = min(slope / spread if spread else 0.0, mean_seconds / mean_size)
    if per_byte <= 0:
        per_byte = mean_seconds / mean_size
    return LinkSpeed(bytes_per_second=1 / per_byte, latency_seconds=max(0.0, mean_seconds - per_byte * mean_size))


def _slowest(links: Mapping[tuple[int, int], LinkSpeed]) -> LinkSpeed:
    return min(links.values(), key=lambda link: link.bytes_per_second, default=Machine().rates().within_node)


# ---- the rest of a step


def _ranks_of(profile: Profile, stage: int) -> list[int]:
    return [one.rank for one in profile.ranks if profile.plan.layout.coordinate(one.rank).pp_rank == stage]


def _phase_seconds(
    timelines: Sequence[StepTimeline],
    ranks: Sequence[int],
    phases: set[str] | frozenset[str],
    without: frozenset[Cause] = frozenset({Cause.DEPENDENCY}),
) -> float:
    """Mean over `ranks` of what these phases took, waits of the causes `without` left out: for other stages, at least."""
    return fmean(
        sum(piece.seconds for piece in timeline.pieces[rank] if piece.about in phases and piece.cause not in without)
        for timeline in timelines
        for rank in ranks
    )
