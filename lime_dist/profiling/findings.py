"""What stands out in a profile, and what mending it would bring. Pure data.

A fault is what differs from its like: a link from the other links, a rank from the other ranks, by the FLOPs of its layers. What
it costs is what the simulator says of the step with it and without it: alone, and behind all the others, as one fault
can hide another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean, median
from typing import NamedTuple

from lime_dist.formats import format_rate
from lime_dist.plan.costs import Costs, LinkSpeed
from lime_dist.plan.simulate import simulate
from lime_dist.profiling.accounting import Account
from lime_dist.profiling.calibration import wall_costs
from lime_dist.profiling.deliveries import Delivery
from lime_dist.profiling.operation_times import OwnTime, own_time
from lime_dist.profiling.profile_files import Profile
from lime_dist.profiling.timeline import Cause, StepTimeline

SLOW_LINK = 0.7  # of the bandwidth of the fastest boundary
SLOW_WAY = 0.5  # of the other way, where there is one boundary, whose two ways carry messages of other sizes
SLOW_PEER = 1.15  # times as long as the median of those that do the same
SLOW_STAGE = 1.25  # times as long a FLOP as the median of the other stages, whose layers are not quite the same
OF_ONE_KIND, IN_BURSTS = 1.3, 2.5  # times as far from the others, where only some of the passes are slow
HELD_UP = 2.5  # times as long as any other, without a core, or what messages take of the host
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
    without: Callable[[Costs], Costs]


def find_faults(profile: Profile, timelines: Sequence[StepTimeline], account: Account) -> list[Fault]:
    """Those that cost a fair part of a step, the dearest first."""
    suspects = [
        *_slow_links(profile, timelines),
        *_slow_ranks(profile),
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
            changed = one.without(changed)
        return simulate(profile.plan, changed).step_seconds

    alone = step([]) - step([suspect])
    behind_the_others = step(others) - step([*others, suspect])
    return Fault(kind=suspect.kind, seconds=max(alone, behind_the_others), name=suspect.name, mend=suspect.mend)


# ---- links

_Way = tuple[int, int]  # of stages


def _slow_links(profile: Profile, timelines: Sequence[StepTimeline]) -> Iterator[_Suspect]:
    """By boundary; those of a stage together where all are slow, as they are on one card."""
    speeds = _speeds(profile, timelines)
    ways_in_all = sum(map(len, speeds.values()))
    if ways_in_all < 2:
        return
    fastest = max(speed.least for own in speeds.values() for speed in own.values())
    share = SLOW_LINK if ways_in_all > 2 else SLOW_WAY
    slow = {
        pipeline: {way: speed.most for way, speed in own.items() if speed.most < share * fastest}
        for pipeline, own in speeds.items()
    }
    others = [
        speed.least for pipeline, own in speeds.items() for way, speed in own.items() if way not in slow[pipeline]
    ]
    like = LinkSpeed(bytes_per_second=median(others))
    alike = len({tuple(sorted(own)) for own in slow.values()}) == 1
    for pipeline, own in slow.items():
        for ways, name in _grouped(own, len(profile.plan.stages)):
            of_ranks = "" if alike else f" of tensor rank {pipeline[0]}, replica {pipeline[1]}"
            yield _Suspect(
                kind="link",
                name=f"{name}{of_ranks} ({format_rate(min(own[way] for way in ways))}, where others reach {format_rate(like.bytes_per_second)})",
                mend=f"look at the network card, cable and switch port of {name}{of_ranks}",
                pipeline=pipeline,
                without=partial(_with_links, ways, like),
            )
        if alike:
            return


def _with_links(ways: Sequence[_Way], speed: LinkSpeed, costs: Costs) -> Costs:
    return replace(costs, links={**costs.links, **dict.fromkeys(ways, speed)})


class _Speed(NamedTuple):
    """Bytes a second that a way carries. most: if messages beside each other share cards. least: as its quickest messages went,
    whatever was beside them, as each pair of ranks may have a link of its own."""

    least: float
    most: float


def _speeds(profile: Profile, timelines: Sequence[StepTimeline]) -> dict[tuple[int, int], dict[_Way, _Speed]]:
    """By pipeline (its tensor rank and replica) and way."""
    layout = profile.plan.layout
    carried: dict[tuple[int, int], dict[_Way, list[Delivery]]] = defaultdict(lambda: defaultdict(list))
    for timeline in timelines:
        for delivery in timeline.deliveries:
            sender, receiver = layout.coordinate(delivery.sender), layout.coordinate(delivery.receiver)
            carried[sender.tp_rank, sender.dp_rank][sender.pp_rank, receiver.pp_rank].append(delivery)
    return {
        pipeline: {way: speed for way, deliveries in own.items() if (speed := _speed(deliveries))}
        for pipeline, own in carried.items()
    }


def _speed(deliveries: Sequence[Delivery]) -> _Speed | None:
    num_bytes = sum(delivery.message.num_bytes for delivery in deliveries)
    by_size: dict[int, list[float]] = defaultdict(list)
    for delivery in deliveries:
        by_size[delivery.message.num_bytes].append(delivery.link_seconds)
    alone = sum(delivery.transfer_seconds for delivery in deliveries)
    quickest = sum(sorted(seconds)[len(seconds) // 4] * len(seconds) for seconds in by_size.values())
    if not alone or not quickest:
        return None
    return _Speed(least=num_bytes / max(alone, quickest), most=num_bytes / alone)


def _grouped(slow: Mapping[_Way, float], num_stages: int) -> Iterator[tuple[list[_Way], str]]:
    left = dict(slow)
    for stage in range(num_stages):
        ways = [way for way in left if stage in way]
        boundaries = sorted({(min(way), max(way)) for way in ways})
        if len(boundaries) < 2 or num_stages < 4 or len(ways) == len(slow) == 2 * (num_stages - 1):
            continue
        if max(left[way] for way in ways) > 1.5 * min(left[way] for way in ways):
            continue  # not one card: one of them is slower still
        for way in ways:
            del left[way]
        yield ways, f"the links of stage {stage}, {' and '.join(f'{one}>{other}' for one, other in boundaries)}"
    for one, other in sorted({(min(way), max(way)) for way in left}):
        ways = [way for way in left if {*way} == {one, other}]
        yield ways, f"the link {one}>{other}" if len(ways) == 2 else f"the way {ways[0][0]}>{ways[0][1]}"


# ---- ranks


def _slow_ranks(profile: Profile) -> Iterator[_Suspect]:
    """A whole stage, or single ranks of one: those that stand beside each other and do the same tell best."""
    layout = profile.plan.layout
    own = {record.rank: own_time(profile, record.rank) for record in profile.ranks}
    by_stage = {stage: [rank for rank in own if layout.coordinate(rank).pp_rank == stage] for stage in range(layout.pp)}
    of_stages = {}
    for stage, ranks in by_stage.items():
        slow = {rank: times for rank in ranks if (times := _over(own[rank], _without(own, ranks, rank), SLOW_PEER))}
        yield from (_slow_peer(profile, rank, times) for rank, times in slow.items())
        flops = sum(chunk.flops.total for chunk in profile.plan.stages[stage].chunks)
        of_stages[stage] = _mean(([own[rank] for rank in ranks if rank not in slow]), flops)
    for stage, ranks in by_stage.items():
        if times := _over(of_stages[stage], _without(of_stages, of_stages, stage), SLOW_STAGE):
            yield _slow_stage(profile, stage, ranks, times)


def _without(own: Mapping[int, OwnTime], members: Iterable[int], left_out: int) -> list[OwnTime]:
    return [own[member] for member in members if member != left_out]


def _mean(times: Sequence[OwnTime], flops: int) -> OwnTime:
    """For each FLOP."""
    return OwnTime(*(fmean(each) / flops for each in zip(*times)))


def _over(own: OwnTime, others: Sequence[OwnTime], slow: float) -> float | None:
    """How many times as long it takes as the median of the others, where that stands out.

    What takes longer in each pass shows in the quickest of them, of both kinds or clearly of one; what comes in bursts, such as
    another process on the core, in the whole alone, where there is more noise.
    """
    if not others:
        return None
    forward, backward, whole = (mine / median(theirs) for mine, theirs in zip(own[:3], zip(*others)))
    if min(forward, backward) > slow or max(forward, backward) > 1 + OF_ONE_KIND * (slow - 1):
        return max(whole, (own.forward + own.backward) / median(one.forward + one.backward for one in others))
    if whole > 1 + IN_BURSTS * (slow - 1):
        return whole
    longest = max(one.delayed for one in others)
    if own.delayed or longest:
        with_delay = (own.whole + own.delayed) / median(one.whole + one.delayed for one in others)
        return with_delay if with_delay > slow and own.delayed > HELD_UP * longest else None
    # A rank that is short of a core is short of it where it hands over: others go first.
    on_host = own.host / max(1e-12, max(one.host for one in others))
    return whole if whole > slow and on_host > HELD_UP else None


def _slow_peer(profile: Profile, rank: int, times: float) -> _Suspect:
    layout = profile.plan.layout
    place = layout.coordinate(rank)
    is_tensor = layout.tp > 1
    which = f"tensor rank {place.tp_rank}" if is_tensor else f"replica {place.dp_rank}"
    others = "the others of its tensor group" if is_tensor else "the other replicas"
    return _Suspect(
        kind="tensor rank" if is_tensor else "rank",
        name=f"rank {rank} ({which} of stage {place.pp_rank}), which takes {times:.2f} times as long as {others}",
        mend=f"look at host {profile.ranks[rank].host or 'of it'} for other processes, and at the clocks and heat of the device of rank {rank}",
        pipeline=(place.tp_rank, place.dp_rank),
        without=partial(_with_runs_scaled, _chunks_of(profile, place.pp_rank), 1 / times),
    )


def _slow_stage(profile: Profile, stage: int, ranks: Sequence[int], times: float) -> _Suspect:
    shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    return _Suspect(
        kind="rank",
        name=f"stage {stage} ({shown}), which takes {times:.2f} times as long for its layers as the others",
        mend=f"look at the host of {shown} for other processes, clocks and heat, or give stage {stage} fewer layers (pipeline.partition)",
        pipeline=(0, 0),
        without=partial(_with_runs_scaled, _chunks_of(profile, stage), 1 / times),
    )


def _chunks_of(profile: Profile, stage: int) -> frozenset[int]:
    return frozenset(chunk.chunk for chunk in profile.plan.stages[stage].chunks)


def _with_runs_scaled(chunks: frozenset[int], factor: float, costs: Costs) -> Costs:
    scaled = {
        (chunk, kind): tuple(factor * each for each in seconds) if chunk in chunks else seconds
        for (chunk, kind), seconds in costs.runs.items()
    }
    return replace(costs, runs=scaled)


# ---- data


def _late_data(account: Account, profile: Profile) -> Iterator[_Suspect]:
    worst = max(account.ranks, key=lambda rank: rank.seconds[Cause.DATA])
    seconds = worst.seconds[Cause.DATA]
    if seconds < WORTH_NAMING * account.step_seconds / 2:
        return
    place = profile.plan.layout.coordinate(worst.rank)
    late = [rank.rank for rank in account.ranks if rank.seconds[Cause.DATA] > seconds / 2]
    who = f"rank {worst.rank} (stage {worst.stage})" if len(late) == 1 else f"ranks {', '.join(map(str, late))}"
    who = "all ranks" if len(late) == len(account.ranks) > 1 else who
    yield _Suspect(
        kind="data",
        name=f"the data loader of {who}, which has a batch {1e3 * seconds:.0f} ms late",
        mend="put the token files on faster storage, or nearer",
        pipeline=(place.tp_rank, place.dp_rank),
        without=_without_data_waits,
    )


def _without_data_waits(costs: Costs) -> Costs:
    return replace(costs, data_seconds=(0.0,) * len(costs.data_seconds))
