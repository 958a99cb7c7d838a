"""Profiles without a run: what ranks would have recorded had each operation of their plan taken a given time."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lime_dist.config import check_config, parse_config
from lime_dist.pipeline.step_times import PHASES, CollectiveTimes, StepTimes
from lime_dist.plan.operations import Operation, Verb
from lime_dist.plan.run_plan import RunPlan, plan_run
from lime_dist.plan.schedule import Kind
from lime_dist.profiling.clock_offset import ClockOffset
from lime_dist.profiling.profile_files import RankRecord, profile_folder, write_head, write_rank

BASE: dict[str, Any] = {
    "model": {"num_layers": 8, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "vocab_size": 512},
    "pipeline": {"num_microbatches": 8},
    "data": {"seq_length": 128, "global_batch_size": 64},
    "run": {"device": "cpu"},
}
LAYER_US = {Kind.FORWARD: 1_000, Kind.BACKWARD: 2_000}
HOST_US, LATENCY_US, BYTES_PER_US = 20, 100, 400
STEP_BEGINS_APART_US = 10_000_000


def write_profile(run_dir: Path, *overrides: str, num_steps: int = 2, host: str = "host") -> Path:
    """The folder of a profile of the steps 3, 4, ... of a run with `BASE` and `overrides`, all on one host."""
    config = parse_config(BASE, overrides)
    plan = plan_run(check_config(config, config.layout.world_size))
    folder = profile_folder(run_dir, 3, 2 + num_steps)
    folder.mkdir(parents=True)
    steps = [_Step(plan, index).times() for index in range(num_steps)]
    for rank in range(plan.layout.world_size):
        write_rank(folder, _record(rank, host, plan.layout.world_size, tuple(step[rank] for step in steps)))
    write_head(folder, plan, range(3, 3 + num_steps), ())
    return folder


def _record(rank: int, host: str, world_size: int, steps: tuple[StepTimes, ...]) -> RankRecord:
    return RankRecord(
        rank=rank,
        host=host,
        device="CPU",
        cores=2,
        threads=1,
        offsets=(ClockOffset(0, 0, 1500), ClockOffset(10**12, 2000, 1500)),
        epoch_ns=1_700_000_000 * 10**9,
        group_ranks={"world": tuple(range(world_size))},
        steps=steps,
    )


class _Rank:
    """Of one step. received: by what is awaited, its place among the receives of its way, forward or backward."""

    def __init__(self, operations: tuple[Operation, ...], begin: int):
        self.operations, self.place = operations, 0
        self.marks = [begin, begin + 200]
        self.received: dict[tuple[Any, Any], int] = {}
        self.posted: dict[Kind, list[int]] = {kind: [] for kind in Kind}
        self.handed: dict[Kind, list[int]] = {kind: [] for kind in Kind}
        self.order: list[tuple[Kind, int]] = []  # of all receives
        self.sizes = {kind: _sizes(operations, kind) for kind in Kind}


class _Step:
    """In µs; the records are in ns."""

    def __init__(self, plan: RunPlan, index: int):
        self._plan, self._random = plan, random.Random(index)
        begin = (1 + index) * STEP_BEGINS_APART_US
        stages = [tuple(stage.operations(stage.actions)) for stage in plan.stages]
        self._ranks = [_Rank(stages[self._stage(rank)], begin) for rank in range(plan.layout.world_size)]
        self._arrivals: dict[tuple[int, Kind], list[int]] = defaultdict(list)  # by receiver

    def times(self) -> list[StepTimes]:
        """By rank."""
        while any(rank.place < len(rank.operations) for rank in self._ranks):
            assert any([self._go_on(rank) for rank in range(len(self._ranks))]), "the plan's ranks wait for each other"
        return list(self._ended())

    def _stage(self, rank: int) -> int:
        return self._plan.layout.coordinate(rank).pp_rank

    def _go_on(self, rank: int) -> bool:
        """As far as the rank comes; whether it came on at all."""
        first = self._ranks[rank].place
        while self._ranks[rank].place < len(self._ranks[rank].operations) and self._does_next(rank):
            self._ranks[rank].place += 1
        return self._ranks[rank].place > first

    def _does_next(self, rank: int) -> bool:
        own = self._ranks[rank]
        operation, now = own.operations[own.place], own.marks[-1]
        kind, message = operation.action.kind, operation.message
        if operation.verb is Verb.AWAIT:
            arrivals = self._carry(rank, kind)
            place = own.received[operation.action, message]
            if place >= len(arrivals):
                return False
            own.marks.append(max(now, arrivals[place]) + HOST_US)
            return True
        if operation.verb is Verb.RECEIVE:
            own.received[operation.action, message] = len(own.posted[kind])
            own.order.append((kind, len(own.posted[kind])))
            own.posted[kind].append(now + HOST_US)
        if operation.verb is Verb.SEND:
            own.handed[kind].append(now + HOST_US)
        own.marks.append(now + (self._run_us(kind) if operation.verb is Verb.RUN else HOST_US))
        return True

    def _run_us(self, kind: Kind) -> int:
        return round(LAYER_US[kind] * self._random.uniform(0.9, 1.1))

    def _carry(self, receiver: int, kind: Kind) -> list[int]:
        """When each message of a way that is posted and handed over arrives."""
        coordinate = self._plan.layout.coordinate(receiver)
        from_stage = (coordinate.pp_rank - (1 if kind is Kind.FORWARD else -1)) % len(self._plan.stages)
        sender = self._ranks[self._plan.layout.global_rank(replace(coordinate, pp_rank=from_stage))]
        arrivals, posted = self._arrivals[receiver, kind], self._ranks[receiver].posted[kind]
        while len(arrivals) < min(len(posted), len(sender.handed[kind])):
            place = len(arrivals)
            free = arrivals[-1] if arrivals else 0
            begin = max(posted[place], sender.handed[kind][place], free)
            arrivals.append(begin + LATENCY_US + sender.sizes[kind][place] // BYTES_PER_US)
        return arrivals

    def _ended(self) -> Iterator[StepTimes]:
        """With the agreement of all ranks, which nobody leaves before the last has come."""
        last = max(rank.marks[-1] for rank in self._ranks) + 500
        for number, rank in enumerate(self._ranks):
            entered = rank.marks[-1] + 300
            rank.marks += [entered - 200, entered - 100, entered, last, last + 1_500, last + 1_700]
            assert len(rank.marks) == 2 + len(rank.operations) + len(PHASES)
            yield StepTimes(
                marks=[1000 * mark for mark in rank.marks],
                busy=[1000 * mark for mark in rank.marks],
                process_busy=1000 * (rank.marks[-1] - rank.marks[0]),
                arrivals=[1000 * self._carry(number, kind)[place] for kind, place in rank.order],
                collectives=[CollectiveTimes("world", 1000 * entered, 1000 * entered, 1000 * last)],
                sent_bytes=(sum(rank.sizes[Kind.FORWARD]), sum(rank.sizes[Kind.BACKWARD])),
            )


def _sizes(operations: tuple[Operation, ...], kind: Kind) -> list[int]:
    """Of the messages sent."""
    messages = [each.message for each in operations if each.verb is Verb.SEND and each.action.kind is kind]
    return [message.num_bytes for message in messages if message is not None]
