"""One training step over a plan, simulated event by event: when each stage computes, and what it waits for. Pure data.

A RECEIVE posts and a SEND hands over, and neither waits; an AWAIT waits until its message is here. The messages of one
direction of a boundary go one after another, each when it is handed over and its receive is posted, as gloo's and NCCL's do.
A stage has one card, which sends and receives at once: messages in flight that share a side of it, such as activations to
the next stage and gradients to the one before, each get an equal part of their link's speed. A link may let a burst through
at once when both cards have been idle for as long as it takes to save for it. Where what passes take varies, waits are longer
than those of mean passes, as one that is late is waited for and one that is early waits: then a step is the mean of several.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from heapq import heappop, heappush
from math import inf
from random import Random
from statistics import fmean

from lime_dist.plan.costs import Costs, LinkSpeed, MoveCost
from lime_dist.plan.messages import Message
from lime_dist.plan.operations import Operation, Verb
from lime_dist.plan.run_plan import RunPlan
from lime_dist.plan.schedule import Kind
from lime_dist.plan.stages import StagePlan, plan_stages


@dataclass(frozen=True, kw_only=True)
class StageTimes:
    """What a stage does with a step, in seconds, which add up to the step.

    compute, host: RUNs, and what messages take of the host. dependency: waits for a message that its sender had not handed
    over. queue: that was handed over, while its link was busy with others, or that shared cards with others. transfer: that
    was on its way. drain: waits at the end for other stages. data, end: before the first operation, behind the last.
    """

    data: float = 0.0
    compute: float = 0.0
    host: float = 0.0
    dependency: float = 0.0
    queue: float = 0.0
    transfer: float = 0.0
    drain: float = 0.0
    end: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    @property
    def exposed(self) -> float:
        """Waits for what was handed over."""
        return self.queue + self.transfer

    @property
    def bubble(self) -> float:
        """Waits for other stages' passes."""
        return self.dependency + self.drain


@dataclass(frozen=True, kw_only=True)
class LinkTimes:
    """One way of one boundary. busy_seconds: with a message in flight. exposed_seconds: that the receiver waited for."""

    num_bytes: float = 0.0
    busy_seconds: float = 0.0
    exposed_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """A step. stages: by pipeline rank. links: by (from stage, to stage)."""

    step_seconds: float
    stages: tuple[StageTimes, ...]
    links: Mapping[tuple[int, int], LinkTimes]

    @property
    def bubble_share(self) -> float:
        """Of the step, on average over the stages."""
        return sum(stage.bubble for stage in self.stages) / (len(self.stages) * self.step_seconds)

    @property
    def exposed_seconds(self) -> float:
        """Of the stage that waits most for messages on their way."""
        return max(stage.exposed for stage in self.stages)


DRAWS = 6  # steps, where what RUNs take varies


def simulate(plan: RunPlan, costs: Costs) -> Simulated:
    return _simulate(plan.stages, costs)


def _simulate(stages: Sequence[StagePlan], costs: Costs) -> Simulated:
    if not costs.variation:
        return _Simulation(stages, costs, Random(0)).run()
    return _mean([_Simulation(stages, costs, Random(seed)).run() for seed in range(DRAWS)])


def _mean(steps: Sequence[Simulated]) -> Simulated:
    return _combined(steps, fmean)


def _combined(steps: Sequence[Simulated], combine: Callable[[Sequence[float]], float]) -> Simulated:
    """A step whose every figure `combine` makes of those of `steps`."""

    def of(parts: Sequence[StageTimes] | Sequence[LinkTimes]) -> dict[str, float]:
        return {one.name: combine([getattr(part, one.name) for part in parts]) for one in fields(parts[0])}

    return Simulated(
        step_seconds=combine([step.step_seconds for step in steps]),
        stages=tuple(StageTimes(**of(same)) for same in zip(*(step.stages for step in steps))),
        links={way: LinkTimes(**of([step.links[way] for step in steps])) for way in steps[0].links},
    )


# ---- messages on their way


class _Link:
    """One way of one boundary."""

    __slots__ = ("bytes_per_second", "latency", "burst", "num_bytes", "busy", "exposed", "num_active", "busy_since")

    def __init__(self, speed: LinkSpeed):
        self.bytes_per_second, self.latency = speed.bytes_per_second, speed.latency_seconds
        self.burst = speed.burst_bytes
        self.num_bytes, self.busy, self.exposed = 0, 0.0, 0.0
        self.num_active, self.busy_since = 0, 0.0

    def times(self) -> LinkTimes:
        return LinkTimes(num_bytes=self.num_bytes, busy_seconds=self.busy, exposed_seconds=self.exposed)


class _Side(list["_Flow"]):
    """One side of a card: what goes through it now. idle_since: when the last went."""

    __slots__ = ("idle_since",)

    def __init__(self) -> None:
        super().__init__()
        self.idle_since = -inf


class _Channel:
    """What keeps its order: the messages one way over one boundary, of forward or of backward passes.

    out_side, in_side: the flows through the sender's and the receiver's card, those of other channels too.
    """

    __slots__ = ("link", "out_side", "in_side", "sent", "posted", "ready", "is_busy")

    def __init__(self, link: _Link, out_side: _Side, in_side: _Side):
        self.link, self.out_side, self.in_side = link, out_side, in_side
        self.sent: deque[_Flow] = deque()  # and not posted
        self.posted: deque[_Flow] = deque()  # and not sent
        self.ready: deque[_Flow] = deque()
        self.is_busy = False


class _Flow:
    """One message of one microbatch. waiting: the stage that awaits it, if one does."""

    __slots__ = ("channel", "num_bytes", "handed", "begun", "arrived", "left", "rate", "updated", "version", "waiting")

    def __init__(self, channel: _Channel, num_bytes: int):
        self.channel, self.num_bytes = channel, num_bytes
        self.handed = self.begun = self.arrived = inf
        self.left, self.rate, self.updated, self.version = float(num_bytes), 0.0, 0.0, -1  # -1: its latency
        self.waiting: _Stage | None = None

    def shares_of(self, begin: float) -> tuple[float, float, float]:
        """How long one who waited from `begin` until now waited for (the sender, the link and other messages, its own way)."""
        late = max(0.0, self.handed - begin)
        under_way = self.arrived - max(begin, self.begun)
        link = self.channel.link
        whole = self.arrived - self.begun
        alone = under_way * min(1.0, (link.latency + self.num_bytes / link.bytes_per_second) / whole) if whole else 0.0
        return late, self.arrived - begin - late - alone, alone


# ---- stages


class _Ways:
    """One chunk's messages of one kind of pass: where they go, and what they take of the host."""

    __slots__ = ("channel", "num_bytes", "host")

    def __init__(self, channel: _Channel, num_bytes: int, host: float):
        self.channel, self.num_bytes, self.host = channel, num_bytes, host


class _Stage:
    """since: when what it now does began. operation: that one, or None where the next is due."""

    __slots__ = (
        "index", "operations", "incoming", "run_index", "operation", "since", "compute", "host", "dependency", "queue",
        "transfer", "finished",
    )  # fmt: skip

    def __init__(self, plan: StagePlan, since: float):
        self.index = plan.stage_index
        self.operations: Iterator[Operation] = plan.operations(plan.actions)
        self.incoming: dict[tuple[int, int], _Flow] = {}  # by microbatch and message
        self.run_index = 0
        self.operation: Operation | None = None
        self.since, self.finished = since, inf
        self.compute = self.host = self.dependency = self.queue = self.transfer = 0.0


class _Simulation:
    """Two heaps: stages that compute, by how much of a processor's time they will have had, and messages, by the time.

    Where stages share cores, each of n that compute has had the same since it began, at min(1, cores / n) a second: so their
    order stays as it is, and one number, `_processed`, goes on for all.
    """

    def __init__(self, stages: Sequence[StagePlan], costs: Costs, random: Random):
        self._random = random
        self._costs, self._cores = costs, inf if costs.cores is None else costs.cores
        self._now = self._processed = 0.0
        self._computing: list[tuple[float, int]] = []
        # Time, order of making, flow and its version then (another by now: it has got another speed); no flow: a stage begins.
        self._events: list[tuple[float, int, int, _Flow | None]] = []
        self._num_events = 0
        self._links = {way: _Link(speed) for way, speed in costs.links.items()}
        self._ways = self._plan_ways(stages)
        self._stages = [_Stage(plan, costs.data_seconds[plan.stage_index]) for plan in stages]

    def _plan_ways(self, stages: Sequence[StagePlan]) -> dict[tuple[Verb, int], _Ways]:
        """By the message's identity: the plan holds each of them once at either end, for all microbatches."""
        outs, ins = [_Side() for _ in stages], [_Side() for _ in stages]
        channels: dict[tuple[int, int, Kind], _Channel] = {}
        ways: dict[tuple[Verb, int], _Ways] = {}

        def add(verb: Verb, message: Message, kind: Kind) -> None:
            sender, receiver = message.from_chunk % len(stages), message.to_chunk % len(stages)
            place = sender, receiver, kind
            if place not in channels:
                channels[place] = _Channel(self._links[sender, receiver], outs[sender], ins[receiver])
            host = self._costs.moves.get(verb, MoveCost()).of(message.num_bytes)
            ways[verb, id(message)] = _Ways(channels[place], message.num_bytes, host)

        for chunk in (chunk for stage in stages for chunk in stage.chunks):
            for kind in Kind:
                for message in chunk.received[kind]:
                    add(Verb.RECEIVE, message, kind)
                    add(Verb.AWAIT, message, kind)
                for message in chunk.sent[kind]:
                    add(Verb.SEND, message, kind)
        return ways

    def run(self) -> Simulated:
        for stage in self._stages:
            self._push(stage.since, stage.index, None)
        while self._computing or self._events:
            self._next_event()
        assert all(stage.finished < inf for stage in self._stages), "the plan cannot be carried out"
        return self._result()

    def _next_event(self) -> None:
        computing, events = self._computing, self._events
        if computing:
            rate = min(1.0, self._cores / len(computing))
            done = self._now + (computing[0][0] - self._processed) / rate
            if not events or done <= events[0][0]:
                self._now = done
                self._processed, index = heappop(computing)
                self._finish(self._stages[index])
                return
            self._processed += (events[0][0] - self._now) * rate
        self._now, _, version, flow = heappop(events)
        if flow is None:
            self._go_on(self._stages[version])
        elif version == flow.version:
            if version < 0:
                self._start(flow)
            else:
                self._arrive(flow)

    def _push(self, time: float, version: int, flow: _Flow | None) -> None:
        self._num_events += 1
        heappush(self._events, (time, self._num_events, version, flow))

    # ---- operations

    def _go_on(self, stage: _Stage) -> None:
        """Until it computes, waits or is through."""
        ways = self._ways
        for operation in stage.operations:
            message = operation.message
            if message is None:
                self._compute(stage, operation, self._run_seconds(stage, operation))
                return
            verb = operation.verb
            way = ways[verb, id(message)]
            if verb is Verb.AWAIT and not self._is_here(stage, operation, message):
                return
            if way.host:
                self._compute(stage, operation, way.host)
                return
            self._move(stage, operation, message)
        stage.finished = self._now

    def _run_seconds(self, stage: _Stage, operation: Operation) -> float:
        seconds = self._costs.runs[operation.action.chunk, operation.action.kind][stage.run_index]
        stage.run_index = 0 if operation.until == "behind" else stage.run_index + 1
        variation = self._costs.variation
        return seconds * self._random.choice(variation) if variation else seconds

    def _compute(self, stage: _Stage, operation: Operation, seconds: float) -> None:
        stage.operation, stage.since = operation, self._now
        heappush(self._computing, (self._processed + seconds, stage.index))

    def _finish(self, stage: _Stage) -> None:
        operation, elapsed = stage.operation, self._now - stage.since
        assert operation is not None
        if operation.message is None:
            stage.compute += elapsed
        else:
            stage.host += elapsed
            self._move(stage, operation, operation.message)
        self._go_on(stage)

    def _move(self, stage: _Stage, operation: Operation, message: Message) -> None:
        if operation.verb is Verb.SEND:
            self._hand_over(self._ways[Verb.SEND, id(message)])
        elif operation.verb is Verb.RECEIVE:
            posted = self._post(self._ways[Verb.RECEIVE, id(message)])
            stage.incoming[operation.action.microbatch_index, id(message)] = posted

    def _is_here(self, stage: _Stage, operation: Operation, message: Message) -> bool:
        """If not, the stage waits from now on."""
        flow = stage.incoming.pop((operation.action.microbatch_index, id(message)))
        if flow.arrived <= self._now:
            return True
        flow.waiting, stage.operation, stage.since = stage, operation, self._now
        return False

    def _wake(self, stage: _Stage, flow: _Flow) -> None:
        late, queued, under_way = flow.shares_of(stage.since)
        stage.dependency += late
        stage.queue += queued
        stage.transfer += under_way
        flow.channel.link.exposed += queued + under_way
        operation = stage.operation
        assert operation is not None and operation.message is not None
        host = self._ways[Verb.AWAIT, id(operation.message)].host
        if host:
            self._compute(stage, operation, host)
        else:
            self._go_on(stage)

    # ---- messages

    def _hand_over(self, way: _Ways) -> None:
        channel = way.channel
        if channel.posted:
            flow = channel.posted.popleft()
            channel.ready.append(flow)
        else:
            flow = _Flow(channel, way.num_bytes)
            channel.sent.append(flow)
        flow.handed = self._now
        self._begin_next(channel)

    def _post(self, way: _Ways) -> _Flow:
        channel = way.channel
        if channel.sent:
            flow = channel.sent.popleft()
            channel.ready.append(flow)
            self._begin_next(channel)
        else:
            flow = _Flow(channel, way.num_bytes)
            channel.posted.append(flow)
        return flow

    def _begin_next(self, channel: _Channel) -> None:
        if channel.is_busy or not channel.ready:
            return
        flow, link = channel.ready.popleft(), channel.link
        channel.is_busy, flow.begun = True, self._now
        if link.num_active == 0:
            link.busy_since = self._now
        link.num_active += 1
        if link.latency:
            self._push(self._now + link.latency, flow.version, flow)
        else:
            self._start(flow)

    def _start(self, flow: _Flow) -> None:
        """Its first byte leaves."""
        channel = flow.channel
        flow.updated, flow.version = self._now, 0
        if channel.link.burst and not channel.out_side and not channel.in_side:
            idle = self._now - max(channel.out_side.idle_since, channel.in_side.idle_since)
            flow.left -= min(flow.left, channel.link.burst, idle * channel.link.bytes_per_second)
        channel.out_side.append(flow)
        channel.in_side.append(flow)
        self._share(channel)

    def _arrive(self, flow: _Flow) -> None:
        channel, link = flow.channel, flow.channel.link
        for side in (channel.out_side, channel.in_side):
            side.remove(flow)
            side.idle_since = self._now
        flow.arrived, channel.is_busy = self._now, False
        link.num_bytes += flow.num_bytes
        link.num_active -= 1
        if link.num_active == 0:
            link.busy += self._now - link.busy_since
        self._begin_next(channel)
        self._share(channel)
        if flow.waiting is not None:
            self._wake(flow.waiting, flow)

    def _share(self, channel: _Channel) -> None:
        """New speeds for what goes through the sides of the cards of `channel`."""
        self._set_rates(channel.out_side)
        self._set_rates(channel.in_side)

    def _set_rates(self, flows: _Side) -> None:
        for flow in flows:
            channel = flow.channel
            rate = channel.link.bytes_per_second / max(len(channel.out_side), len(channel.in_side))
            if rate == flow.rate:
                continue
            if self._now > flow.updated:
                flow.left -= flow.rate * (self._now - flow.updated)
            flow.rate, flow.updated = rate, self._now
            flow.version += 1
            self._push(self._now + max(0.0, flow.left) / rate, flow.version, flow)

    # ---- the end

    def _result(self) -> Simulated:
        last = max(stage.finished for stage in self._stages)
        step = last + max(self._costs.end_seconds)
        return Simulated(
            step_seconds=step,
            stages=tuple(self._times(stage, step) for stage in self._stages),
            links={way: link.times() for way, link in self._links.items()},
        )

    def _times(self, stage: _Stage, step: float) -> StageTimes:
        end = self._costs.end_seconds[stage.index]
        return StageTimes(
            data=self._costs.data_seconds[stage.index],
            compute=stage.compute,
            host=stage.host,
            dependency=stage.dependency,
            queue=stage.queue,
            transfer=stage.transfer,
            drain=max(0.0, step - stage.finished - end),
            end=end,
        )


# ---- long steps

ROUNDS_TO_SETTLE = 8  # of as many microbatches as there are stages, until each is like the one before
COMPARED_ROUNDS = 4  # neighbours may differ in turn


def simulate_long(plan: RunPlan, costs: Costs) -> Simulated:
    """As `simulate`. A step of many more microbatches than stages is taken to go on as two shorter ones, so that it takes no longer."""
    unit = _round_size(plan)
    fewer, more = ROUNDS_TO_SETTLE * unit, (ROUNDS_TO_SETTLE + COMPARED_ROUNDS) * unit
    number = plan.num_microbatches
    if number <= fewer + more:
        return simulate(plan, costs)
    first, second = (_simulate(_with_microbatches(plan, count), costs) for count in (fewer, more))
    return _extended(first, second, (number - more) / (more - fewer))


def _round_size(plan: RunPlan) -> int:
    """Of microbatches after which a stage does the same again."""
    num_stages, number = len(plan.stages), plan.num_microbatches
    return num_stages if plan.virtual_stages == 1 else number // max(1, number // num_stages)


def _with_microbatches(plan: RunPlan, number: int) -> tuple[StagePlan, ...]:
    """Of the same size."""
    pipeline = replace(plan.config.pipeline, num_microbatches=number)
    return plan_stages(replace(plan.config, pipeline=pipeline), plan.chunks, plan.warmup)


def _extended(first: Simulated, second: Simulated, times: float) -> Simulated:
    """`second` and `times` more of what it has ahead of `first`."""
    return _combined([first, second], lambda pair: pair[1] + times * (pair[1] - pair[0]))
