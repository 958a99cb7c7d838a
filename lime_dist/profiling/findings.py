"""What stands out in a profile, and what mending it would bring. Pure data.

A fault is what differs from its like: a link from the other links, a rank from the other ranks, by the FLOPs of its layers. What
it costs is what the simulator says of the step with it and without it: alone, and behind all the others, as one fault
can hide another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from lime_dist.formats import format_rate
from lime_dist.plan.costs import Costs, LinkSpeed
from lime_dist.plan.flops import BACKWARD_FACTOR
from lime_dist.plan.schedule import Kind
from lime_dist.plan.simulate import simulate
from lime_dist.profiling.accounting import Account
from lime_dist.profiling.calibration import wall_costs
from lime_dist.profiling.operation_times import pass_seconds_of
from lime_dist.profiling.profile_files import Profile
from lime_dist.profiling.timeline import Cause, StepTimeline

SLOW_LINK = 0.7  # of the bandwidth of the fastest boundary
SLOW_RANK = 1.12  # times as long a FLOP as the median of the others
WORTH_NAMING = 0.02  # of a step


@dataclass(frozen=True, kw_only=True)
class Fault:
    """seconds: of a step, that mending it would save. name: what it is; mend: what to do, each a clause."""

    kind: str  # link | rank | tensor rank | data
    seconds: float
    name: str
    mend: str


@dataclass(frozen=True, kw_only=True)
class _Suspect:
    """without: the costs if it were like the others. pipeline: (tp, dp) ranks of the pipeline that it is looked for in."""

    kind: str
    name: str
    mend: str
    pipeline: tuple[int, int]
    without: _Change


class _Change:
    """Of costs; each is sure of its own part of them."""

    def of(self, costs: Costs) -> Costs:
        raise NotImplementedError


@dataclass(frozen=True)
class _LinksLike(_Change):
    ways: tuple[tuple[int, int], ...]
    speed: LinkSpeed

    def of(self, costs: Costs) -> Costs:
        return replace(costs, links={**costs.links, **dict.fromkeys(self.ways, self.speed)})


@dataclass(frozen=True)
class _RunsScaled(_Change):
    factors: Mapping[tuple[int, Kind], float]

    def of(self, costs: Costs) -> Costs:
        scaled = {
            place: tuple(seconds * self.factors.get(place, 1.0) for seconds in runs)
            for place, runs in costs.runs.items()
        }
        return replace(costs, runs=scaled)


@dataclass(frozen=True)
class _DataLike(_Change):
    seconds: float

    def of(self, costs: Costs) -> Costs:
        return replace(costs, data_seconds=tuple(min(self.seconds, each) for each in costs.data_seconds))


def find_faults(profile: Profile, timelines: Sequence[StepTimeline], account: Account) -> list[Fault]:
    """Those that cost a fair part of a step, the dearest first."""
    suspects = [
        *_slow_links(profile, account),
        *_slow_ranks(profile, timelines, account),
        *_late_data(account, profile),
    ]
    costs = {place: wall_costs(profile, timelines, place) for place in {one.pipeline for one in suspects}}
    faults = [_priced(suspect, suspects, profile, costs[suspect.pipeline]) for suspect in suspects]
    fair = [fault for fault in faults if fault.seconds >= WORTH_NAMING * account.step_seconds]
    return sorted(fair, key=lambda fault: -fault.seconds)


def _priced(suspect: _Suspect, suspects: Sequence[_Suspect], profile: Profile, costs: Costs) -> Fault:
    others = [one for one in suspects if one is not suspect and one.pipeline == suspect.pipeline]

    def step(mended: Iterable[_Suspect]) -> float:
        changed = costs
        for one in mended:
            changed = one.without.of(changed)
        return simulate(profile.plan, changed).step_seconds

    alone = step([]) - step([suspect])
    behind_the_others = step(others) - step([*others, suspect])
    return Fault(kind=suspect.kind, seconds=max(alone, behind_the_others), name=suspect.name, mend=suspect.mend)


# ---- links


def _slow_links(profile: Profile, account: Account) -> Iterator[_Suspect]:
    """By boundary; the two of a stage together where both are slow and others are not, as they are on one card."""
    speeds = {
        (each.from_stage, each.to_stage): each.bytes_per_second for each in account.boundaries if each.transfer > 0
    }
    if len(account.boundaries) < 4:
        return  # one boundary has none to compare with
    fastest = max(speeds.values())
    slow = {way: speed for way, speed in speeds.items() if speed < SLOW_LINK * fastest}
    like = LinkSpeed(bytes_per_second=median(speed for way, speed in speeds.items() if way not in slow))
    for ways, name in _grouped(slow, profile):
        speed = min(slow[way] for way in ways)
        yield _Suspect(
            kind="link",
            name=f"{name} ({format_rate(speed)}, where others reach {format_rate(like.bytes_per_second)})",
            mend=f"look at the network card, cable and switch port of {name}",
            pipeline=(0, 0),
            without=_LinksLike(tuple(ways), like),
        )


def _grouped(slow: Mapping[tuple[int, int], float], profile: Profile) -> Iterator[tuple[list[tuple[int, int]], str]]:
    left = dict(slow)
    num_stages = len(profile.plan.stages)
    for stage in range(num_stages):
        boundaries = {tuple(sorted(way)) for way in left if stage in way}
        neighbours = [way for way in left if stage in way]
        if len(boundaries) < 2 or num_stages < 3:
            continue
        if any(abs(left[one] / left[neighbours[0]] - 1) > 0.35 for one in neighbours):
            continue  # as slow as each other, or not the same card
        for way in neighbours:
            del left[way]
        yield neighbours, f"the links of stage {stage}, {_listed(sorted(boundaries))}"
    for boundary in sorted({tuple(sorted(way)) for way in left}):
        ways = [way for way in left if tuple(sorted(way)) == boundary]
        both = len(ways) == 2
        name = f"the link {boundary[0]}>{boundary[1]}" if both else f"the way {ways[0][0]}>{ways[0][1]}"
        yield ways, name


def _listed(boundaries: Sequence[tuple[int, ...]]) -> str:
    return " and ".join(f"{one}>{other}" for one, other in boundaries)


# ---- ranks


def _slow_ranks(profile: Profile, timelines: Sequence[StepTimeline], account: Account) -> Iterator[_Suspect]:
    """A whole stage, or single ranks of one: those that stand beside each other and do the same tell best."""
    layout = profile.plan.layout
    passes = {record.rank: pass_seconds_of(profile, record.rank) for record in profile.ranks}
    per_flop = {rank: _per_flop(profile, own) for rank, own in passes.items()}
    by_stage = {
        stage: [rank for rank in passes if layout.coordinate(rank).pp_rank == stage] for stage in range(layout.pp)
    }
    for stage, ranks in by_stage.items():
        slow = _slow_among(ranks, passes) if len(ranks) > 1 else {}
        for rank, factors in slow.items():
            yield _slow_peer(profile, rank, factors, ranks, passes)
        if slow or layout.pp == 1:
            continue
        others = [fmean(per_flop[rank] for rank in other) for index, other in by_stage.items() if index != stage]
        own = fmean(per_flop[rank] for rank in ranks)
        if own > SLOW_RANK * median(others):
            yield _slow_stage(profile, stage, ranks, own / median(others))


_Passes = Mapping[tuple[int, Kind], float]


def _per_flop(profile: Profile, passes: _Passes) -> float:
    """Seconds."""
    flops = 0
    for chunk, kind in passes:
        factor = 1 if kind is Kind.FORWARD else BACKWARD_FACTOR
        flops += factor * profile.plan.chunks[chunk].flops.total
    return sum(passes.values()) / flops


def _slow_among(ranks: Sequence[int], passes: Mapping[int, _Passes]) -> dict[int, dict[tuple[int, Kind], float]]:
    """Ranks whose passes take longer than their peers', and by what each is to be multiplied to be like theirs."""
    slow = {}
    for rank in ranks:
        peers = [other for other in ranks if other != rank]
        like = {place: median(passes[other][place] for other in peers) for place in passes[rank]}
        if sum(passes[rank].values()) > SLOW_RANK * sum(like.values()):
            slow[rank] = {place: min(1.0, like[place] / seconds) for place, seconds in passes[rank].items()}
    return slow


def _slow_peer(
    profile: Profile,
    rank: int,
    factors: Mapping[tuple[int, Kind], float],
    ranks: Sequence[int],
    passes: Mapping[int, _Passes],
) -> _Suspect:
    place = profile.plan.layout.coordinate(rank)
    is_tensor = profile.plan.layout.tp > 1
    times = fmean(1 / factor for factor in factors.values())
    others = "the others of its tensor group" if is_tensor else "the other replicas"
    name = f"rank {rank} (stage {place.pp_rank}, {'tensor rank ' + str(place.tp_rank) if is_tensor else 'replica ' + str(place.dp_rank)})"
    return _Suspect(
        kind="tensor rank" if is_tensor else "rank",
        name=f"{name}, which computes {times:.2f} times as long as {others}",
        mend=f"look at host {profile.ranks[rank].host} for other processes, clocks and heat of the device of rank {rank}",
        pipeline=(place.tp_rank, place.dp_rank),
        without=_RunsScaled(dict(factors)),
    )


def _slow_stage(profile: Profile, stage: int, ranks: Sequence[int], times: float) -> _Suspect:
    chunks = [chunk.chunk for chunk in profile.plan.stages[stage].chunks]
    host = profile.ranks[ranks[0]].host
    return _Suspect(
        kind="rank",
        name=f"stage {stage} (rank {_shown_ranks(ranks)}), which computes {times:.2f} times as long as its layers' share",
        mend=f"look at host {host} for other processes, clocks and heat, or give stage {stage} fewer layers (pipeline.partition)",
        pipeline=(0, 0),
        without=_RunsScaled({(chunk, kind): 1 / times for chunk in chunks for kind in Kind}),
    )


def _shown_ranks(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


# ---- data


def _late_data(account: Account, profile: Profile) -> Iterator[_Suspect]:
    worst = max(account.ranks, key=lambda rank: rank.seconds[Cause.DATA])
    seconds = worst.seconds[Cause.DATA]
    if seconds < WORTH_NAMING * account.step_seconds / 2:
        return
    place = profile.plan.layout.coordinate(worst.rank)
    everyone = min(rank.seconds[Cause.DATA] for rank in account.ranks) > seconds / 2
    who = "all ranks" if everyone else f"rank {worst.rank} (stage {worst.stage})"
    yield _Suspect(
        kind="data",
        name=f"the data loader of {who}, which has a batch {1e3 * seconds:.0f} ms late",
        mend="put the token files on faster storage, or nearer",
        pipeline=(place.tp_rank, place.dp_rank),
        without=_DataLike(0.0),
    )


# ---- sentences


def sentences(profile: Profile, account: Account, faults: Sequence[Fault]) -> list[str]:
    """What to know and do, in three sentences."""
    step = account.step_seconds
    return [_first(step, faults), _second(account, faults), _third(profile, account)]


def _first(step: float, faults: Sequence[Fault]) -> str:
    if not faults:
        return f"A step takes {_ms(step)}, and no link, rank or data loader stands out."
    named = "; ".join(f"{_ms(fault.seconds)} to {fault.name}" for fault in faults)
    return f"A step takes {_ms(step)}, of which {named}."


def _second(account: Account, faults: Sequence[Fault]) -> str:
    if faults:
        mend = faults[0].mend
        return f"{mend[0].upper()}{mend[1:]}: mended, a step is about {100 * faults[0].seconds / account.step_seconds:.0f} % shorter."
    worst = max(account.boundaries, key=lambda each: each.exposed, default=None)
    if worst is None or worst.exposed < WORTH_NAMING * account.step_seconds:
        return "What crosses boundaries is hidden behind computing."
    kind = max(worst.exposed_by, key=lambda name: worst.exposed_by[name])
    return (
        f"Boundary {worst.name} is waited for {_ms(worst.exposed)} a step, most of it for the {kind}: try pipeline.warmup=auto, "
        "or a pattern that sends less (`lime-dist plan --predict`)."
    )


def _third(profile: Profile, account: Account) -> str:
    share, own = account.bubble_share, schedule_bubble(profile)
    text = f"Waiting for other stages to compute (the bubble) takes {100 * share:.0f} % of all ranks' time, {100 * own:.0f} % in a perfect schedule of equal stages"
    if share < 0.05:
        return f"{text}: little is to be had there."
    return f"{text}: raise pipeline.num_microbatches or parallel.virtual_stages, as `lime-dist plan --predict` says what each brings."


def schedule_bubble(profile: Profile) -> float:
    """(P - 1) / (v m + P - 1) of P stages of v chunks and m microbatches (Narayanan et al. 2021, section 2.2)."""
    plan = profile.plan
    idle = len(plan.stages) - 1
    return idle / (plan.virtual_stages * plan.num_microbatches + idle)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"
