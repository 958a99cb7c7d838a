"""Profiles as ranks would have recorded them, made from a plan and the times that its parts take.

Ranks carry out their plan's operations, each as long as `Times` says, and wait for messages and for each other in collectives
as real ones do. All is in ns of one true clock, and is written down as the clocks of the ranks would show it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from lime_dist.config import check_config, parse_config
from lime_dist.layout import Coordinate
from lime_dist.pipeline.step_times import PHASES, CollectiveTimes, StepTimes
from lime_dist.plan.messages import Message
from lime_dist.plan.operations import Operation, Verb
from lime_dist.plan.run_plan import RunPlan, plan_run
from lime_dist.plan.schedule import Kind
from lime_dist.profiling.clock_offset import ClockOffset
from lime_dist.profiling.profile_files import MeasuredLink, Profile, RankRecord, read_profile, write_head, write_rank

BASE = {
    "model": {"num_layers": 8, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "vocab_size": 96},
    "pipeline": {"num_microbatches": 4, "min_message": 0},
    "data": {"seq_length": 16, "global_batch_size": 8},
    "run": {"device": "cpu"},
}
LLAMA = "depth.router=none"  # whose only messages are residuals
US, MS = 1_000, 1_000_000  # ns
EPOCH_NS = 1_700_000_000 * 10**9  # time of day at 0


def make_plan(*overrides: str) -> RunPlan:
    config = parse_config(BASE, overrides)
    return plan_run(check_config(config, config.layout.world_size))


def operations_of(plan: RunPlan, rank: int) -> tuple[Operation, ...]:
    stage = plan.stages[plan.layout.coordinate(rank).pp_rank]
    return tuple(stage.operations(stage.actions))


@dataclass(frozen=True, kw_only=True)
class Times:
    """In ns. run: of a RUN on a rank. link: that a message is on its way, by (sender, receiver). data, phase: by rank.
    host: of each RECEIVE and SEND, and of taking a message in. tensor, others: of a collective of the tensor group, which
    follows each RUN, and of those behind the passes, from when the last rank has come.
    """

    run: Callable[[int, Operation], int] = lambda rank, operation: 10 * MS
    link: Callable[[int, int, Message], int] = lambda sender, receiver, message: 0
    data: Callable[[int], int] = lambda rank: 0
    phase: Callable[[int, str], int] = lambda rank, phase: 0
    host: Callable[[], int] = lambda: 0
    tensor: Callable[[], int] = lambda: 0
    others: Callable[[], int] = lambda: 0


def random_times(random: Random) -> Times:
    """Anything between nothing and much, of each part."""

    def some(most: int) -> int:
        return random.choice([0, random.randrange(most)])

    return Times(
        run=lambda rank, operation: some(20 * MS),
        link=lambda *way: some(10 * MS),
        data=lambda rank: some(MS),
        phase=lambda rank, phase: some(MS),
        host=lambda: some(MS // 10),
        tensor=lambda: some(MS),
        others=lambda: some(MS),
    )


def usual_times(random: Random) -> Times:
    """Passes of about a ms, and links that take at most a third of it; some messages are there before their send returns."""

    def about(mean: int) -> int:
        return random.randrange(mean // 2, mean * 3 // 2)

    return Times(
        run=lambda rank, operation: about(900 * US),
        link=lambda *way: random.randrange(random.choice([300 * US, 300 * US, 300 * US, 2 * US])),
        data=lambda rank: about(30 * US),
        phase=lambda rank, phase: about(60 * US),
        host=lambda: about(10 * US),
        tensor=lambda: about(80 * US),
        others=lambda: about(40 * US),
    )


@dataclass(frozen=True, kw_only=True)
class RankClock:
    """ahead: of the true one at 0, in ns; drift: ns a ns. wrong: by how much `ahead` was measured wrongly; error: as stated."""

    ahead: int = 0
    drift: float = 0.0
    wrong: int = 0
    error: int = 0

    def at(self, moment: int) -> int:
        return moment + self.ahead + round(self.drift * moment)

    def offset(self, moment: int) -> ClockOffset:
        return ClockOffset(self.at(moment), self.at(moment) - moment + self.wrong, self.error)


TRUE_CLOCK = RankClock()


def recorded(
    plan: RunPlan,
    *times: Times,
    clocks: Mapping[int, RankClock] | None = None,
    links: Sequence[MeasuredLink] = (),
    folder: Path = Path(),
) -> Profile:
    """A step for each of `times`, one after another."""
    work, clocks, world = _Work(plan), clocks or {}, range(plan.layout.world_size)
    for step in times or (Times(),):
        work.do(step)
    end = max(work.now.values())
    ranks = [
        RankRecord(
            rank=rank,
            host=f"host{rank}",
            device="CPU",
            cores=64,
            threads=1,
            offsets=(clock.offset(0), clock.offset(end)),
            epoch_ns=EPOCH_NS - clock.ahead,
            group_ranks={_name(group): group for group in _groups(plan, rank).values()},
            steps=tuple(_shown(step[rank], clock) for step in work.steps),
        )
        for rank in world
        for clock in [clocks.get(rank, TRUE_CLOCK)]
    ]
    numbers = tuple(range(1, 1 + len(work.steps)))
    return Profile(folder=folder, plan=plan, steps=numbers, ranks=tuple(ranks), links=tuple(links))


def write(profile: Profile) -> None:
    profile.folder.mkdir(parents=True, exist_ok=True)
    for record in profile.ranks:
        write_rank(profile.folder, record)
    write_head(profile.folder, profile.plan, profile.steps, profile.links)


def disagreeing_clock(rank: int) -> RankClock:
    """Rank 0's is true."""
    return RankClock(ahead=40 * MS * rank, drift=2e-5 * rank, error=500)


def written(folder: Path, plan: RunPlan, num_steps: int = 2) -> Profile:
    """As read from `folder`: steps 3, 4, ... of usual times, by clocks that do not agree."""
    random = Random(1)
    clocks = {rank: disagreeing_clock(rank) for rank in range(plan.layout.world_size)}
    steps = [usual_times(random) for _ in range(num_steps)]
    profile = recorded(plan, *steps, clocks=clocks, folder=folder)
    write(replace(profile, steps=tuple(range(3, 3 + num_steps))))
    return read_profile(folder)


def _shown(step: StepTimes, clock: RankClock) -> StepTimes:
    return StepTimes(
        marks=[clock.at(mark) for mark in step.marks],
        busy=step.busy,
        process_busy=step.process_busy,
        arrivals=[clock.at(arrival) for arrival in step.arrivals],
        collectives=[
            CollectiveTimes(each.group_name, *map(clock.at, (each.entered, each.wait_begun, each.wait_ended)))
            for each in step.collectives
        ],
        sent_bytes=step.sent_bytes,
    )


# ---- groups

_Group = tuple[int, ...]


def _groups(plan: RunPlan, rank: int) -> dict[str, _Group]:
    """What this rank meets others in, by what for."""
    layout, place = plan.layout, plan.layout.coordinate(rank)

    def ranks(pp: Sequence[int], dp: Sequence[int], tp: Sequence[int]) -> _Group:
        places = (Coordinate(pp_rank=p, dp_rank=d, tp_rank=t) for p in pp for d in dp for t in tp)
        return tuple(map(layout.global_rank, places))

    own, whole = ([place.pp_rank], [place.dp_rank], [place.tp_rank]), range
    found = {
        "tensor": ranks(own[0], own[1], whole(layout.tp)),
        "norm": ranks(own[0], whole(layout.dp), own[2]),
        "agreement": ranks(whole(layout.pp), whole(layout.dp), whole(layout.tp)),
    }
    if place.pp_rank in (0, layout.pp - 1):  # the ends of a tied embedding
        found["gradients"] = ranks([0, layout.pp - 1], own[1], own[2])
    return {purpose: group for purpose, group in found.items() if len(set(group)) > 1}


def _name(group: _Group) -> str:
    return "-".join(map(str, group))


# ---- ranks at work


@dataclass
class _Channel:
    handed: list[int] = field(default_factory=list)
    posted: list[int] = field(default_factory=list)
    seconds: list[int] = field(default_factory=list)  # by message, as handed
    arrived: list[int] = field(default_factory=list)

    def arrival(self, place: int) -> int | None:
        """Of the message there, if it is known yet."""
        for index in range(len(self.arrived), min(len(self.handed), len(self.posted))):
            free = self.arrived[-1] if self.arrived else 0
            self.arrived.append(max(self.handed[index], self.posted[index], free) + self.seconds[index])
        return self.arrived[place] if place < len(self.arrived) else None


class _Work:
    """Of all ranks; `now`: how far each is, on the true clock."""

    def __init__(self, plan: RunPlan):
        self.plan = plan
        self.now = dict.fromkeys(range(plan.layout.world_size), 0)
        self.steps: list[dict[int, StepTimes]] = []

    def do(self, times: Times) -> None:
        """One step."""
        self._times = times
        self._channels: dict[tuple[int, int, Kind], _Channel] = defaultdict(_Channel)
        self._entered: dict[tuple[_Group, int], dict[int, int]] = defaultdict(dict)
        self._lengths: dict[tuple[_Group, int], int] = {}
        found: dict[int, StepTimes] = {}
        at_work = [self._rank(rank, found) for rank in self.now]
        while at_work:
            before = dict(self.now), len(at_work), {key: dict(each) for key, each in self._entered.items()}
            at_work = [rank for rank in at_work if next(rank, "done") != "done"]
            after = dict(self.now), len(at_work), self._entered
            assert before != after, "all ranks wait"
        self.steps.append(found)

    def _rank(self, rank: int, found: dict[int, StepTimes]) -> Iterator[None]:
        """Goes on until it waits for another."""
        groups, times = _groups(self.plan, rank), self._times
        step = StepTimes(marks=[], busy=None, process_busy=0, arrivals=[], collectives=[], sent_bytes=(0, 0))
        incoming: dict[tuple[object, object], tuple[_Channel, int]] = {}
        sent = dict.fromkeys(Kind, 0)
        in_order: list[tuple[_Channel, int]] = []

        def spend(ns: int) -> None:
            self.now[rank] += ns

        step.marks.append(self.now[rank])
        spend(times.data(rank))
        step.marks.append(self.now[rank])
        for operation in operations_of(self.plan, rank):
            channel = self._channel(rank, operation)
            if operation.verb is Verb.RUN:
                spend(times.run(rank, operation))
                if "tensor" in groups:
                    yield from self._meet(rank, groups["tensor"], step, times.tensor)
            elif operation.verb is Verb.RECEIVE:
                spend(times.host())
                incoming[operation.action, operation.message] = channel, len(channel.posted)
                in_order.append((channel, len(channel.posted)))
                channel.posted.append(self.now[rank])
            elif operation.verb is Verb.SEND:
                assert operation.message is not None
                spend(times.host())
                to = self._neighbour(rank, operation.action.kind, sends=True)
                channel.handed.append(self.now[rank])
                channel.seconds.append(times.link(rank, to, operation.message))
                sent[operation.action.kind] += operation.message.num_bytes
            else:
                waited_for, index = incoming[operation.action, operation.message]
                while (arrival := waited_for.arrival(index)) is None:
                    yield
                self.now[rank] = max(self.now[rank], arrival)
                spend(times.host())
            step.marks.append(self.now[rank])
        for phase in PHASES:
            if phase == "flush":
                yield from self._flush(rank)
            spend(times.phase(rank, phase))
            if phase in groups:
                yield from self._meet(rank, groups[phase], step, times.others)
            step.marks.append(self.now[rank])
        arrivals = [channel.arrival(index) for channel, index in in_order]
        step.arrivals.extend(arrival for arrival in arrivals if arrival is not None)
        found[rank] = StepTimes(**{**vars(step), "sent_bytes": (sent[Kind.FORWARD], sent[Kind.BACKWARD])})

    def _flush(self, rank: int) -> Iterator[None]:
        """What was sent has left when it has arrived."""
        for (sender, _, _), channel in list(self._channels.items()):
            if sender == rank and channel.handed:
                while (arrival := channel.arrival(len(channel.handed) - 1)) is None:
                    yield
                self.now[rank] = max(self.now[rank], arrival)

    def _channel(self, rank: int, operation: Operation) -> _Channel:
        sends = operation.verb is Verb.SEND
        other = self._neighbour(rank, operation.action.kind, sends=sends)
        ends = (rank, other) if sends else (other, rank)
        return self._channels[(*ends, operation.action.kind)]

    def _neighbour(self, rank: int, kind: Kind, *, sends: bool) -> int:
        layout, place = self.plan.layout, self.plan.layout.coordinate(rank)
        step = 1 if (kind is Kind.FORWARD) == sends else -1
        to = (place.pp_rank + step) % layout.pp
        return layout.global_rank(Coordinate(pp_rank=to, dp_rank=place.dp_rank, tp_rank=place.tp_rank))

    def _meet(self, rank: int, group: _Group, step: StepTimes, length: Callable[[], int]) -> Iterator[None]:
        index = sum(each.group_name == _name(group) for each in step.collectives)
        key, entered = (group, index), self.now[rank]
        self._entered[key][rank] = entered
        while len(self._entered[key]) < len(group):
            yield
        self._lengths.setdefault(key, length())
        self.now[rank] = max(self._entered[key].values()) + self._lengths[key]
        step.collectives.append(CollectiveTimes(_name(group), entered, entered, self.now[rank]))
