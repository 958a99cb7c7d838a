"""Schedules are torch's where torch has them, pass every microbatch through every chunk, and cannot deadlock."""

from __future__ import annotations

import random
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from lime_dist.errors import ConfigError
from lime_dist.plan.schedule import (
    SCHEDULE_NAMES,
    Action,
    Kind,
    Step,
    check_schedule,
    eager_warmup,
    plain_warmup,
    plan_forward_only,
    plan_schedule,
)

ONE_CHUNK = {"1f1b": torch_schedules.Schedule1F1B, "gpipe": torch_schedules.ScheduleGPipe}
MANY_CHUNKS = {"1f1b": torch_schedules.ScheduleInterleaved1F1B, "gpipe": torch_schedules.ScheduleLoopedBFS}
# (num_stages, num_microbatches)
SHAPES = [(stages, microbatches) for stages in (1, 2, 3, 4, 5, 8) for microbatches in (1, 2, 3, 4, 5, 8, 16)]
# (num_stages, num_microbatches, virtual_stages) that interleaving takes: equal rounds of, below and above the number of stages
INTERLEAVED = [
    (stages, microbatches, virtual_stages)
    for stages in (1, 2, 3, 4, 8)
    for microbatches in sorted({stages - 1, stages, stages + 1, 2 * stages + 2, 3 * stages} - {0})
    for virtual_stages in (2, 3, 4)
    if microbatches % max(1, microbatches // stages) == 0
]
# name, (num_stages, num_microbatches, virtual_stages), warmup
PLAIN = [(name, shape, None) for name in SCHEDULE_NAMES for shape in [*((*shape, 1) for shape in SHAPES), *INTERLEAVED]]


def shape_of(shape: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("num_stages", "num_microbatches", "virtual_stages"), shape))


WARMED_UP = [("1f1b", (*shape, 1), warmup) for shape in SHAPES[7:] for warmup in range(shape[0] + 1, 2 * shape[0])] + [
    ("1f1b", shape, plain_warmup(**shape_of(shape)) + more) for shape in INTERLEAVED for more in (1, 5, 1000)
]


def plan_steps(name: str, shape: tuple[int, int, int], warmup: int | None = None) -> list[Step]:
    return [plan_schedule(name, stage_index=stage, **shape_of(shape), warmup=warmup) for stage in range(shape[0])]


def plan_all(name: str, shape: tuple[int, int, int], warmup: int | None = None) -> list[list[Action]]:
    return [[*step] for step in plan_steps(name, shape, warmup)]


def plan_all_forward_only(shape: tuple[int, int, int]) -> list[list[Action]]:
    stages, microbatches, virtual_stages = shape
    return [
        [*plan_forward_only(microbatches, stage_index=stage, num_stages=stages, virtual_stages=virtual_stages)]
        for stage in range(stages)
    ]


def passes_before(action: Action, num_chunks: int) -> list[Action]:
    """What an action reads: the pass of the chunk before, and for a backward pass the chunk's own forward."""
    forward, microbatch = action.kind is Kind.FORWARD, action.microbatch_index
    chunk = action.chunk + (-1 if forward else 1)
    before = [Action(kind=action.kind, chunk=chunk, microbatch_index=microbatch)] if 0 <= chunk < num_chunks else []
    return before if forward else [*before, Action(kind=Kind.FORWARD, chunk=action.chunk, microbatch_index=microbatch)]


def run_passes(plans: list[list[Action]], num_chunks: int, *, transfer_time: int = 0) -> int:
    """When the last pass ends, if each takes a unit of time, and what it makes `transfer_time` to another chunk."""
    ends: dict[Action, int] = {}
    free_at = [0] * len(plans)
    left = [deque(actions) for actions in plans]
    while any(left):
        ready = [
            stage for stage, queue in enumerate(left) if queue and ends.keys() >= {*passes_before(queue[0], num_chunks)}
        ]
        assert ready, "deadlock"
        for stage in ready:
            action = left[stage].popleft()
            arrivals = [
                ends[before] + (transfer_time if before.chunk != action.chunk else 0)
                for before in passes_before(action, num_chunks)
            ]
            ends[action] = free_at[stage] = max(free_at[stage], *arrivals, 0) + 1
    return max(free_at)


def assert_messages_are_read_as_sent(plans: list[list[Action]], num_chunks: int) -> None:
    """On each way from stage to stage forwards are read in the order they are sent, and so are backwards."""
    for kind, step in ((Kind.FORWARD, 1), (Kind.BACKWARD, -1)):
        for stage, actions in enumerate(plans):
            sent = [
                (action.chunk + step, action.microbatch_index)
                for action in actions
                if action.kind is kind and 0 <= action.chunk + step < num_chunks
            ]
            read = [
                (action.chunk, action.microbatch_index)
                for action in plans[(stage + step) % len(plans)]
                if action.kind is kind and 0 <= action.chunk - step < num_chunks
            ]
            assert sent == read


def forwards_before_first_backward(actions: Iterable[Action]) -> int:
    return next(index for index, action in enumerate(actions) if action.kind is Kind.BACKWARD)


def in_flight_counts(actions: Iterable[Action]) -> Iterator[Counter[int]]:
    """After each action, for each chunk with any, the number of microbatches whose activations it holds."""
    held: Counter[int] = Counter()
    for action in actions:
        held[action.chunk] += 1 if action.kind is Kind.FORWARD else -1
        yield +held


def peak_in_flight(actions: Iterable[Action]) -> int:
    return max((held.total() for held in in_flight_counts(actions)), default=0)


# ---- as torch orders them


def torch_order_of_one_chunk(name: str, num_stages: int, num_microbatches: int) -> list[str]:
    """Forward and backward passes of each stage in torch's order, such as FFBFBB; idle steps and the like left out.

    Without microbatch numbers: those that torch 2.13 gives the forwards of 1F1B's last stage begin at 1.
    """
    schedule = object.__new__(ONE_CHUNK[name])  # its constructor asks for a process group
    schedule._num_stages, schedule._n_microbatches = num_stages, num_microbatches
    order = schedule._get_pipeline_order()
    kinds = {torch_schedules.FORWARD: "F", torch_schedules.FULL_BACKWARD: "B"}
    return [
        "".join(kinds.get(action.computation_type, "") for action in order[stage] if action is not None)
        for stage in range(num_stages)
    ]


def torch_schedule_of_many_chunks(name: str, shape: tuple[int, int, int]) -> torch_schedules.PipelineScheduleMulti:
    num_stages, num_microbatches, virtual_stages = shape
    # All that its constructor reads of the first rank's stages.
    stages = [
        SimpleNamespace(stage_index=index, num_stages=num_stages * virtual_stages, group_size=num_stages, group_rank=0)
        for index in range(0, num_stages * virtual_stages, num_stages)
    ]
    return MANY_CHUNKS[name](stages, num_microbatches)


# torch refuses 1F1B of fewer microbatches than stages
KNOWN_TO_TORCH = [
    (name, *shape) for name in SCHEDULE_NAMES for shape in SHAPES if name != "1f1b" or shape[1] >= shape[0]
]


@pytest.mark.parametrize(("name", "num_stages", "num_microbatches"), KNOWN_TO_TORCH)
def test_order_is_torchs(name: str, num_stages: int, num_microbatches: int) -> None:
    plans = plan_all(name, (num_stages, num_microbatches, 1))
    ours = ["".join(action.kind.value for action in actions) for actions in plans]
    assert ours == torch_order_of_one_chunk(name, num_stages, num_microbatches)


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
@pytest.mark.parametrize("shape", INTERLEAVED)
def test_order_with_virtual_stages_is_torchs(name: str, shape: tuple[int, int, int]) -> None:
    order = torch_schedule_of_many_chunks(name, shape).pipeline_order
    torchs = [[str(action) for action in order[stage] if action is not None] for stage in range(shape[0])]
    assert [[str(action) for action in actions] for actions in plan_all(name, shape)] == torchs


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 7, 8])
def test_interleaving_takes_the_microbatches_that_torch_takes(num_stages: int) -> None:
    taken = []
    for count in range(1, 6 * num_stages + 1):
        try:
            torch_schedule_of_many_chunks("1f1b", (num_stages, count, 2))
            taken.append(count)
        except ValueError:
            pass
    for count in range(1, 6 * num_stages + 1):
        if count in taken:
            check_schedule("1f1b", num_stages=num_stages, num_microbatches=count, virtual_stages=2)
            continue
        below, above = max(n for n in taken if n < count), min(n for n in taken if n > count)
        fix = rf"^pipeline.num_microbatches: {count} cannot .* parallel.virtual_stages=2 .* use {below} or {above}$"
        with pytest.raises(ConfigError, match=fix):
            plan_all("1f1b", (num_stages, count, 2))
        plan_all("gpipe", (num_stages, count, 2))  # takes any


# ---- complete, in order, without deadlock


@pytest.mark.parametrize(("name", "shape", "warmup"), PLAIN + WARMED_UP)
def test_every_microbatch_passes_every_chunk_once_each_way(
    name: str, shape: tuple[int, int, int], warmup: int | None
) -> None:
    num_stages, num_microbatches, virtual_stages = shape
    plans = plan_all(name, shape, warmup)
    for stage, actions in enumerate(plans):
        wanted = {
            Action(kind=kind, chunk=chunk, microbatch_index=index)
            for kind in Kind
            for chunk in range(stage, num_stages * virtual_stages, num_stages)
            for index in range(num_microbatches)
        }
        assert len(actions) == len(wanted)
        assert set(actions) == wanted
    run_passes(plans, num_stages * virtual_stages)
    assert_messages_are_read_as_sent(plans, num_stages * virtual_stages)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 4, 5, 7, 8, 9, 15, 17])
@pytest.mark.parametrize("virtual_stages", [1, 2, 3])
def test_forward_only(num_stages: int, num_microbatches: int, virtual_stages: int) -> None:
    shape = num_stages, num_microbatches, virtual_stages
    plans = plan_all_forward_only(shape)
    for stage, actions in enumerate(plans):
        wanted = {
            (chunk, index)
            for chunk in range(stage, num_stages * virtual_stages, num_stages)
            for index in range(num_microbatches)
        }
        assert len(actions) == len(wanted)
        assert {(action.chunk, action.microbatch_index) for action in actions} == wanted
        assert {action.kind for action in actions} == {Kind.FORWARD}
    assert_messages_are_read_as_sent(plans, num_stages * virtual_stages)
    time = run_passes(plans, num_stages * virtual_stages)
    if num_microbatches >= num_stages:
        assert time == num_microbatches * virtual_stages + num_stages - 1, "a stage waits after its first pass"


@pytest.mark.parametrize("shape", [(*shape, 1) for shape in SHAPES] + INTERLEAVED)
def test_forward_only_is_the_forwards_of_training(shape: tuple[int, int, int]) -> None:
    training = [[action for action in actions if action.kind is Kind.FORWARD] for actions in plan_all("1f1b", shape)]
    assert plan_all_forward_only(shape) == training


def test_forward_only_of_unequal_rounds() -> None:
    assert [str(action) for action in plan_forward_only(3)] == ["0F0", "0F1", "0F2"]
    actions = plan_forward_only(5, stage_index=1, num_stages=2, virtual_stages=2)
    assert [str(action) for action in actions] == "1F0 1F1 1F2 3F0 3F1 3F2 1F3 1F4 3F3 3F4".split()


# ---- time and memory


@pytest.mark.parametrize("num_stages", [2, 3, 4, 8])
@pytest.mark.parametrize("virtual_stages", [1, 2, 3, 4])
def test_bubble_is_that_of_the_paper(num_stages: int, virtual_stages: int) -> None:
    """Narayanan et al. 2021, section 2.2.2: (P - 1) / v of a microbatch's both passes over a stage's layers."""
    shape = num_stages, 3 * num_stages, virtual_stages
    time = run_passes(plan_all("1f1b", shape), num_stages * virtual_stages)
    assert time == 2 * (3 * num_stages * virtual_stages + num_stages - 1)


def steady_time(num_stages: int, virtual_stages: int, warmup: int | None) -> int:
    """Of as many microbatches as stages, amid many, where a transfer takes as long as a pass."""
    times = [
        run_passes(
            plan_all("1f1b", (num_stages, rounds * num_stages, virtual_stages), warmup),
            num_stages * virtual_stages,
            transfer_time=1,
        )
        for rounds in (6, 7)
    ]
    return times[1] - times[0]


@pytest.mark.parametrize("num_stages", [2, 3, 4, 8])
@pytest.mark.parametrize("virtual_stages", [1, 2, 3])
def test_eager_warmup_and_no_less_hides_transfers(num_stages: int, virtual_stages: int) -> None:
    busy = 2 * num_stages * virtual_stages
    eager = eager_warmup(num_stages=num_stages, num_microbatches=7 * num_stages, virtual_stages=virtual_stages)
    assert steady_time(num_stages, virtual_stages, eager) == busy
    if virtual_stages == 1:
        assert steady_time(num_stages, 1, eager - 1) > busy


@pytest.mark.parametrize(("name", "shape", "warmup"), [case for case in PLAIN + WARMED_UP if case[0] == "1f1b"])
def test_forwards_before_the_first_backward(name: str, shape: tuple[int, int, int], warmup: int | None) -> None:
    num_stages, num_microbatches, virtual_stages = shape
    least, plans = plain_warmup(**shape_of(shape)), plan_all(name, shape, warmup)
    more = 0 if warmup is None else warmup - least
    for stage, actions in enumerate(plans):
        to_come = num_stages - stage
        if virtual_stages == 1:
            wanted = min(2 * to_come - 1, to_come + more)
        else:
            per_round = num_microbatches // max(1, num_microbatches // num_stages)
            wanted = (virtual_stages - 1) * per_round + 2 * (to_come - 1) + 1 + more
        wanted = min(wanted, num_microbatches * virtual_stages)
        assert forwards_before_first_backward(actions) == peak_in_flight(actions) == wanted


@pytest.mark.parametrize(
    ("shape", "plain", "eager"), [((4, 8, 1), 4, 7), ((1, 8, 1), 1, 1), ((4, 8, 2), 11, 11), ((4, 10, 3), 17, 17)]
)
def test_warmup_of_the_first_stage(shape: tuple[int, int, int], plain: int, eager: int) -> None:
    assert (plain_warmup(**shape_of(shape)), eager_warmup(**shape_of(shape))) == (plain, eager)
    assert plan_all("1f1b", shape, plain) == plan_all("1f1b", shape)


def test_gpipe_holds_all() -> None:
    assert [peak_in_flight(actions) for actions in plan_all("gpipe", (3, 5, 1))] == [5, 5, 5]
    assert [peak_in_flight(actions) for actions in plan_all("gpipe", (3, 5, 2))] == [10, 10, 10]


@pytest.mark.parametrize(("name", "shape", "warmup"), PLAIN + WARMED_UP)
def test_what_weighs_most_is_found_at_the_peaks(name: str, shape: tuple[int, int, int], warmup: int | None) -> None:
    """Whatever a microbatch of each chunk weighs, and there first where others weigh as much."""
    dice = random.Random(0)
    for step in plan_steps(name, shape, warmup):
        moments = [*in_flight_counts(step)]
        assert moments[-1] == Counter()
        assert all(+Counter(peak) in moments for peak in step.peaks())
        for _ in range(5):
            weights = {chunk: dice.choice([1, 2, 3, 10]) for chunk in step.forwards.chunks}

            def weight(held: Mapping[int, int], weights: dict[int, int] = weights) -> int:
                return sum(weights[chunk] * number for chunk, number in held.items())

            assert +Counter(max(step.peaks(), key=weight)) == max(moments, key=weight)


def test_peaks() -> None:
    step = plan_schedule("1f1b", stage_index=1, num_stages=2, num_microbatches=2, virtual_stages=2)
    assert [str(action) for action in step] == "1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1".split()
    assert step.peaks() == ({1: 2, 3: 1},)


def test_peaks_of_a_long_step_are_those_of_a_short_one() -> None:
    short, long = (
        plan_schedule("1f1b", stage_index=1, num_stages=4, num_microbatches=number, virtual_stages=3)
        for number in (16, 4 * 10**9)
    )
    assert short.peaks() == long.peaks()


@pytest.mark.parametrize(("name", "shape", "warmup"), PLAIN + WARMED_UP)
def test_an_action_is_found_by_its_place(name: str, shape: tuple[int, int, int], warmup: int | None) -> None:
    stages, microbatches, virtual_stages = shape
    place = {"num_stages": stages, "virtual_stages": virtual_stages}
    for stage, step in enumerate(plan_steps(name, shape, warmup)):
        for actions in (step, plan_forward_only(microbatches, stage_index=stage, **place)):
            assert [actions[index] for index in range(len(actions))] == [*actions]
            assert actions[-1] == [*actions][-1] and actions[1:3] == (*actions,)[1:3]
            with pytest.raises(IndexError):
                _ = actions[len(actions)]


@pytest.mark.parametrize("num_microbatches", [1, 5, 9, 14])
def test_an_evaluation_has_rounds_of_any_size(num_microbatches: int) -> None:
    passes = plan_forward_only(num_microbatches, stage_index=1, num_stages=4, virtual_stages=2)
    assert [passes[index] for index in range(len(passes))] == [*passes]
    assert len({*passes}) == len(passes) == 2 * num_microbatches


# ---- refused


@pytest.mark.parametrize(
    ("name", "shape", "warmup", "line"),
    [
        ("zb", (1, 1, 1), None, "pipeline.schedule: 'zb' is unknown; use one of 1f1b, gpipe"),
        ("1f1b", (4, 8, 1), 3, "pipeline.warmup: 3 does not fit 4 stages; use 4 to 7"),
        ("1f1b", (4, 8, 1), 8, "pipeline.warmup: 8 does not fit 4 stages; use 4 to 7"),
        ("1f1b", (4, 8, 2), 10, "pipeline.warmup: 10 does not fit 4 stages; use 11 or more"),
        ("gpipe", (4, 8, 1), 4, "pipeline.warmup: gpipe has none to set; remove it, or set pipeline.schedule=1f1b"),
        ("1f1b", (4, 9, 2), None, "pipeline.num_microbatches: 9 cannot be split into 2 equal rounds, as parallel.virtual_stages=2 over 4 stages asks; use 8 or 10"),
    ],
)  # fmt: skip
def test_refused(name: str, shape: tuple[int, int, int], warmup: int | None, line: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(line)}$"):
        plan_all(name, shape, warmup)
    with pytest.raises(ConfigError, match=f"^{re.escape(line)}$"):
        check_schedule(name, **shape_of(shape), warmup=warmup)
