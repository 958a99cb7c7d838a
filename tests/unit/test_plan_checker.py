"""Plans as they are made pass the checker; each kind of damage is refused by name."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product

import pytest
from queues import check_operations

from lime_dist.checkpoint import edges
from lime_dist.checkpoint.edges import ready_plan
from lime_dist.config import Config, check_config, parse_config
from lime_dist.plan import checker
from lime_dist.plan.checker import check_run, check_stage
from lime_dist.plan.deadlock import PlanDefect
from lime_dist.plan.messages import Message
from lime_dist.plan.operations import Operation, Verb
from lime_dist.plan.run_plan import RunPlan, plan_run
from lime_dist.plan.schedule import Action, Kind, Passes, Step, eager_warmup, plain_warmup, plan_schedule
from lime_dist.plan.stages import ChunkPlan, StagePlan

BASE = {
    "model": {"num_layers": 6, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "vocab_size": 96},
    "data": {"seq_length": 6, "global_batch_size": 12},
    "pipeline": {"min_message": 0},
    "run": {"device": "cpu"},
}
AHEAD = (1, 2, 3, 4, 8)
SHAPES = [  # stages, virtual stages, microbatches
    (stages, virtual_stages, microbatches)
    for stages, virtual_stages in (
        (2, 1),
        (3, 1),
        (4, 1),
        (6, 1),
        (8, 1),
        (2, 2),
        (3, 2),
        (4, 2),
        (2, 3),
        (3, 3),
        (3, 4),
    )
    for microbatches in sorted({1, 2, stages, stages + 1, 2 * stages, 3 * stages})
    if virtual_stages == 1 or microbatches % max(1, microbatches // stages) == 0
]


def make_config(stages: int, virtual_stages: int, microbatches: int, *more: str) -> Config:
    """A layer a chunk, and one more for the last."""
    overrides = [
        f"parallel.pp={stages}",
        f"parallel.virtual_stages={virtual_stages}",
        f"model.num_layers={stages * virtual_stages + 1}",
        f"pipeline.num_microbatches={microbatches}",
        f"data.global_batch_size={microbatches}",
    ]
    config = parse_config(BASE, [*overrides, *more])
    return check_config(config, config.layout.world_size)


def make_plan(stages: int, virtual_stages: int, microbatches: int, *more: str) -> RunPlan:
    return plan_run(make_config(stages, virtual_stages, microbatches, *more))


def with_receives_ahead(plan: RunPlan, ahead: int) -> RunPlan:
    return replace(plan, stages=tuple(replace(stage, receives_ahead=ahead) for stage in plan.stages))


def operations_of(plan: RunPlan) -> list[list[Operation]]:
    return [[*stage.operations(stage.actions)] for stage in plan.stages]


def check_by_queues(plan: RunPlan) -> None:
    """All operations of a step, one by one."""
    operations = operations_of(plan)
    for stage, own in zip(plan.stages, operations):
        check_stage(stage, own)
    check_operations(operations)


# ---- plans as they are made


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_schedule_passes_with_receives_at_any_depth(shape: tuple[int, int, int]) -> None:
    stages, virtual_stages, microbatches = shape
    sizes = {"num_stages": stages, "num_microbatches": microbatches, "virtual_stages": virtual_stages}
    warmups = {plain_warmup(**sizes), eager_warmup(**sizes), plain_warmup(**sizes) + 1}
    for more in ("pipeline.schedule=gpipe", "pipeline.schedule=1f1b", *(f"pipeline.warmup={n}" for n in warmups)):
        plan = make_plan(*shape, more)
        for ahead in AHEAD:
            check_run(with_receives_ahead(plan, ahead))
        for ahead in AHEAD[:2]:
            check_by_queues(with_receives_ahead(plan, ahead))


@pytest.mark.parametrize("shape", ((1, 1, 3), (4, 1, 6), (3, 2, 3), (2, 4, 4)))
@pytest.mark.parametrize(
    "text",
    (
        "depth.pattern=last:2",
        "pipeline.min_message=256KiB",
        "pipeline.min_message=3000 depth.policy=relay",
        "depth.pattern=first:2 depth.policy=relay",
        "depth.pattern=within_stage",
        "depth.pattern=stride:3",
        "depth.router=none",
        "depth.entry=hidden",
        "run.dtype=bf16 depth.partial_sum_dtype=fp32",
    ),
)
def test_every_pattern_passes(shape: tuple[int, int, int], text: str) -> None:
    check_run(make_plan(*shape, *text.split()))


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[1] == 1], ids=str)
def test_without_virtual_stages_one_communicator_a_group_does_with_the_next_receives_posted(
    shape: tuple[int, int, int],
) -> None:
    stages, _, microbatches = shape
    eager = eager_warmup(num_stages=stages, num_microbatches=microbatches)
    for more in ("pipeline.schedule=gpipe", "pipeline.schedule=1f1b", f"pipeline.warmup={eager}"):
        check_operations(operations_of(with_receives_ahead(make_plan(*shape, more), 1)), by_pair=False)


STRICT = [  # where one communicator a group does not do: shape, receives posted ahead
    ((4, 2, 2), 1),  # the receive of the next chunk's input stands before what it comes from
    ((4, 1, 8), 2),
]


@pytest.mark.parametrize(("shape", "ahead"), STRICT)
def test_one_communicator_a_group_can_hang_where_pairs_do_not(shape: tuple[int, int, int], ahead: int) -> None:
    operations = operations_of(with_receives_ahead(make_plan(*shape), ahead))
    check_operations(operations)
    with pytest.raises(PlanDefect, match=r"deadlock: .* behind receive .* of stage \d, which waits for send "):
        check_operations(operations, by_pair=False)


def test_a_config_is_checked_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(2, 1, 2)
    broken = with_chunk(
        plan, 0, lambda chunk: with_messages(chunk, "sent", Kind.FORWARD, lambda messages: messages[1:])
    )
    monkeypatch.setattr(edges, "plan_run", lambda config: broken)
    with pytest.raises(PlanDefect, match="residual"):
        ready_plan(parse_config(BASE, ["parallel.pp=2"]))


# ---- of large plans the first rounds


@pytest.mark.parametrize(
    ("shape", "more"),
    (((4, 1, 40), ""), ((4, 1, 40), "pipeline.warmup=7"), ((4, 2, 40), ""), ((3, 2, 40), "pipeline.schedule=gpipe")),
)
def test_a_schedule_without_its_later_rounds_is_that_of_fewer_microbatches(
    shape: tuple[int, int, int], more: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checker, "MAX_PASSES", 1)
    plan = make_plan(*shape, *more.split())
    number = checker._num_checked(plan, [*Kind])
    assert number < shape[2]
    for index, stage in enumerate(plan.stages):
        place = {"stage_index": index, "num_stages": shape[0], "virtual_stages": shape[1]}
        fewer = plan_schedule(plan.schedule, num_microbatches=number, warmup=plan.warmup, **place)
        assert [*fewer] == [action for action in stage.actions if action.microbatch_index < number]
    check_run(plan)


RANDOM_SHAPES = ((3, 1, 12), (4, 1, 12), (2, 2, 12), (3, 2, 12), (3, 3, 12))


@pytest.mark.parametrize("shape", RANDOM_SHAPES, ids=str)
def test_the_first_rounds_show_whether_warmups_fit_each_other(
    shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stage has a warm-up of its own, which may be too short or too long for the next one's."""
    monkeypatch.setattr(checker, "MAX_PASSES", 1)
    choice, verdicts = random.Random(3), []
    for furthest in [2] * 50 + [100] * 50:
        plan = make_plan(*shape)
        for index, stage in enumerate(plan.stages):
            assert isinstance(stage.actions, Step)
            warmup = stage.actions.warmup + choice.randint(-furthest, furthest)
            plan = with_stage(plan, index, with_warmup(min(max(1, warmup), len(stage.actions) // 2)))
        verdicts.append(passes(check_run, plan))
        assert verdicts[-1] == passes(check_by_queues, plan)
    assert {*verdicts} == {True, False}


@pytest.mark.parametrize("shape", ((2, 1, 4), (3, 1, 4), (2, 2, 4), (3, 2, 3)), ids=str)
def test_orders_pass_where_their_operations_come_to_an_end(shape: tuple[int, int, int]) -> None:
    """Some neighbouring actions are exchanged, on any stages."""
    choice, verdicts = random.Random(4), []
    for _ in range(200):
        plan = make_plan(*shape)
        for _ in range(choice.randint(1, 4)):
            plan = with_stage(plan, choice.randrange(shape[0]), exchanged_at(choice.random()))
        verdicts.append(passes(check_run, plan))
        assert verdicts[-1] == passes(check_by_queues, plan)
    assert {*verdicts} == {True, False}


def exchanged_at(share: float) -> Callable[[StagePlan], StagePlan]:
    """Of the stage's order, from its beginning."""

    def change(stage: StagePlan) -> StagePlan:
        actions = [*stage.actions]
        place = int(share * (len(actions) - 1))
        actions[place : place + 2] = reversed(actions[place : place + 2])
        return replace(stage, actions=actions)

    return change


def passes(check: Callable[[RunPlan], None], plan: RunPlan) -> bool:
    try:
        check(plan)
    except PlanDefect:
        return False
    return True


def with_warmup(number: int) -> Callable[[StagePlan], StagePlan]:
    def change(stage: StagePlan) -> StagePlan:
        assert isinstance(stage.actions, Step)
        return replace(stage, actions=replace(stage.actions, warmup=number))

    return change


def last_microbatch_first(stage: StagePlan) -> StagePlan:
    assert isinstance(stage.evaluation, Passes)
    return replace(stage, evaluation=replace(stage.evaluation, backwards=True))


def without_the_last(stage: StagePlan) -> StagePlan:
    return replace(stage, evaluation=stage.evaluation[:-1])


def exchanged_passes(stage: StagePlan) -> StagePlan:
    """Two of the warm-up: of one microbatch where the stage has two chunks, else of two."""
    actions = [*stage.actions]
    actions[0], actions[2] = actions[2], actions[0]
    return replace(stage, actions=actions)


LARGE = (64, 1, 8192, ""), (32, 2, 4096, ""), (64, 1, 8192, "pipeline.schedule=gpipe"), (512, 1, 4096, "")
DAMAGED_LARGE = [  # stage, change, words
    (30, with_warmup(5000), "deadlock: stage 29 hangs in "),
    (29, with_warmup(33), "deadlock: stage 29 hangs in "),  # one less than the next stage's, or two
    (29, with_warmup(1), "stage 29"),  # with virtual stages goes back before it has gone forward
    (20, last_microbatch_first, "stage 19 sends for 20F0 where stage 20 receives for 20F"),
    (20, exchanged_passes, "stage 19 sends for 20F0 where stage 20 receives for 20F2"),
    (31, without_the_last, "stage 31: "),
]


@pytest.mark.parametrize("shape", LARGE[:2], ids=str)
@pytest.mark.parametrize(("stage_index", "change", "words"), DAMAGED_LARGE)
def test_damage_to_the_order_of_a_large_plan_is_refused(
    shape: tuple[int, int, int, str], stage_index: int, change: Callable[[StagePlan], StagePlan], words: str
) -> None:
    damaged = with_stage(make_large(*shape), stage_index, change)
    with pytest.raises(PlanDefect, match=re.escape(words)):
        check_run(damaged)


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_damage_to_the_messages_of_a_large_plan_is_refused(shape: tuple[int, int, int, str]) -> None:
    plan = make_large(*shape)
    check_run(plan)
    for way, kind in product(("sent", "received"), Kind):
        for change in (larger, without_the_first, *([swapped] if way == "received" else [])):
            damage = partial(with_messages, way=way, kind=kind, change=change)
            with pytest.raises(PlanDefect, match=r"^hop 2[67]: .* (meets|crosses with) "):
                check_run(with_chunk(plan, 27, damage))


@cache
def make_large(stages: int, virtual_stages: int, microbatches: int, more: str) -> RunPlan:
    return make_plan(
        stages,
        virtual_stages,
        microbatches,
        "depth.pattern=first:2",
        f"model.num_layers={stages * virtual_stages}",
        *more.split(),
    )


def without_the_first(messages: Sequence[Message]) -> tuple[Message, ...]:
    return tuple(messages[1:])


# ---- damage to a plan


def with_messages(
    chunk: ChunkPlan, way: str, kind: Kind, change: Callable[[tuple[Message, ...]], tuple[Message, ...]]
) -> ChunkPlan:
    messages: Mapping[Kind, tuple[Message, ...]] = getattr(chunk, way)
    return replace(chunk, **{way: {**messages, kind: change(messages[kind])}})


def with_chunk(plan: RunPlan, chunk: int, change: Callable[[ChunkPlan], ChunkPlan]) -> RunPlan:
    stages = [
        replace(stage, chunks=tuple(change(one) if one.chunk == chunk else one for one in stage.chunks))
        for stage in plan.stages
    ]
    return replace(plan, stages=tuple(stages))


def with_stage(plan: RunPlan, stage_index: int, change: Callable[[StagePlan], StagePlan]) -> RunPlan:
    stages = tuple(change(stage) if stage.stage_index == stage_index else stage for stage in plan.stages)
    return replace(plan, stages=stages)


def swapped(messages: Sequence[Message]) -> tuple[Message, ...]:
    return (messages[1], messages[0], *messages[2:])


def larger(messages: Sequence[Message]) -> tuple[Message, ...]:
    return (replace(messages[0], num_bytes=messages[0].num_bytes + 4), *messages[1:])


def make_relay() -> RunPlan:
    """Three stages: the second passes on what the first has sent."""
    return make_plan(3, 1, 4, "depth.policy=relay")


# Chunk, "sent" or "received", kind, change, words.
DAMAGED_MESSAGES = [
    (
        1,
        "received",
        Kind.FORWARD,
        swapped,
        "hop 0: send entries of layers 0 from chunk 0 to 1 (1536 bytes) meets receive residual from chunk 0 to 1 (768 bytes)",
    ),
    (
        1,
        "received",
        Kind.BACKWARD,
        swapped,
        "hop 1: send gradient of residual from chunk 2 to 1 (768 bytes) meets receive gradient of entries",
    ),
    (
        1,
        "sent",
        Kind.FORWARD,
        lambda messages: messages[:-1],
        "hop 1: residual crosses with 0 bytes, its gradient with 768",
    ),
    (
        1,
        "received",
        Kind.FORWARD,
        lambda messages: messages[:-1],
        "hop 0: send residual from chunk 0 to 1 (768 bytes) meets no receive",
    ),
    (2, "received", Kind.FORWARD, larger, "bytes) meets receive "),
    (0, "sent", Kind.FORWARD, larger, "hop 0: entries of layer 0 crosses with 1540 bytes, its gradient with 1536"),
    (2, "sent", Kind.BACKWARD, larger, "hop 1: residual crosses with 768 bytes, its gradient with 772"),
    (
        2,
        "received",
        Kind.FORWARD,
        lambda messages: tuple(replace(message, to_chunk=1, from_chunk=0) for message in messages),
        "chunk 2: entries of layers 0 from chunk 0 to 1 is no message of its forward pass",
    ),
]


@pytest.mark.parametrize(("chunk", "way", "kind", "change", "words"), DAMAGED_MESSAGES)
def test_damaged_messages_are_refused(
    chunk: int, way: str, kind: Kind, change: Callable[[tuple[Message, ...]], tuple[Message, ...]], words: str
) -> None:
    damaged = with_chunk(make_relay(), chunk, lambda whole: with_messages(whole, way, kind, change))
    with pytest.raises(PlanDefect, match=re.escape(words)):
        check_run(damaged)


def backward_first(stage: StagePlan) -> StagePlan:
    return replace(stage, actions=(stage.actions[1], stage.actions[0], *stage.actions[2:]))


def other_microbatch_first(stage: StagePlan) -> StagePlan:
    return replace(stage, actions=tuple(_exchanged(action) for action in stage.actions))


def twice(actions: Sequence[Action]) -> list[Action]:
    """The second one is planned again in place of the first."""
    return [actions[1], *actions[1:]]


def _exchanged(action: Action) -> Action:
    is_forward, index = action.kind is Kind.FORWARD, action.microbatch_index
    return action._replace(microbatch_index=1 - index) if is_forward and index < 2 else action


DAMAGED_ACTIONS = [  # stage, change, words
    (2, backward_first, "stage 2: 2B0 is planned where 2F0 is due"),
    (1, other_microbatch_first, "stage 0 sends for 1F0 where stage 1 receives for 1F1"),
    (0, lambda stage: replace(stage, actions=stage.actions[1:]), "stage 0: 7 passes are planned, not 8"),
    (0, lambda stage: replace(stage, evaluation=[*stage.evaluation] * 2), "stage 0: 8 passes are planned, not 4"),
    (0, lambda stage: replace(stage, actions=twice(stage.actions)), "stage 0: 0B0 is planned where 0F0 is due"),
    (2, lambda stage: replace(stage, evaluation=twice(stage.evaluation)), "stage 2: 2F1 is planned where 2F0 is due"),
]


@pytest.mark.parametrize(("stage_index", "change", "words"), DAMAGED_ACTIONS)
def test_damaged_actions_are_refused(stage_index: int, change: Callable[[StagePlan], StagePlan], words: str) -> None:
    with pytest.raises(PlanDefect, match=re.escape(words)):
        check_run(with_stage(make_relay(), stage_index, change))


def test_orders_of_which_each_stage_waits_for_the_other_are_a_deadlock() -> None:
    """Both stages' orders are possible alone: all forwards first on the one, a backward before the second forward on the other."""
    plan = make_plan(2, 1, 2)
    first = plan_schedule("gpipe", stage_index=0, num_stages=2, num_microbatches=2)
    waiting = [first[0], first[2], first[1], first[3]]  # 0F0 0B0 0F1 0B1
    every = plan_schedule("gpipe", stage_index=1, num_stages=2, num_microbatches=2)
    plan = with_stage(plan, 0, lambda stage: replace(stage, actions=tuple(waiting)))
    plan = with_stage(plan, 1, lambda stage: replace(stage, actions=tuple(every)))
    words = "deadlock: stage 0 hangs in 0B0, which waits for 1B0 of stage 1; stage 1 hangs in 1F1, which waits for 0F1 of stage 0"
    with pytest.raises(PlanDefect, match=re.escape(words)):
        check_run(plan)


# ---- damage to a list of operations


def place_of(operations: Sequence[Operation], verb: Verb, text: str) -> int:
    return next(
        index for index, operation in enumerate(operations) if operation.verb is verb and text in str(operation)
    )


def moved(operations: Sequence[Operation], start: int, stop: int) -> list[Operation]:
    left = [*operations]
    left.insert(stop, left.pop(start))
    return left


def test_an_operation_too_early_or_lacking_is_refused() -> None:
    stage = make_relay().stages[1]
    whole = [*stage.operations(stage.actions)]
    check_stage(stage, whole)
    part, end = (
        next(at for at, one in enumerate(whole) if str(one) == run) for run in ("run 1F0 to layer 1", "run 1F0")
    )
    sent, made = place_of(whole, Verb.SEND, "residual from chunk 1 to 2"), place_of(whole, Verb.SEND, "layers 1 from")
    passing = place_of(whole, Verb.SEND, "entries of layers 0 from")
    received = place_of(whole, Verb.RECEIVE, "residual from chunk 0 to 1")
    behind = place_of(whole, Verb.RUN, "1F1")
    for damaged, words in (
        (moved(whole, sent, end), "send residual from chunk 1 to 2, microbatch 0 comes before run 1F0"),
        (moved(whole, part, 0), "run 1F0 to layer 1 comes before await "),
        (moved(whole, end, part), "run 1F0 comes before run 1F0 to layer 1"),
        (
            moved(whole, made, part),
            "send entries of layers 1 from chunk 1 to 2, microbatch 0 comes before run 1F0 to layer 1",
        ),
        (
            moved(whole, passing, 0),
            "send entries of layers 0 from chunk 1 to 2, microbatch 0 comes before await entries",
        ),
        (moved(whole, received, part), "await residual from chunk 0 to 1, microbatch 0 comes before receive residual"),
        (moved(whole, sent, behind), "comes after run 1F1 to layer 1, not right after run 1F0"),
        (moved(whole, made, end), "comes after run 1F0, not right after run 1F0 to layer 1"),
        ([*whole[:sent], *whole[sent + 1 :]], "run 1F0 to layer 1 sends 3 of its 4 messages"),
        ([*whole, whole[sent]], "comes twice"),
    ):
        with pytest.raises(PlanDefect, match=re.escape(words)):
            check_stage(stage, damaged)


@pytest.mark.parametrize(
    ("stage_index", "verb", "words"),
    (
        (
            2,
            Verb.RECEIVE,
            "send residual from chunk 1 to 2, microbatch 3 has no receive on the other side",
        ),
        (1, Verb.SEND, "receive residual from chunk 1 to 2, microbatch 3 has no send on the other side"),
    ),
)
def test_a_message_without_its_other_side_is_refused(stage_index: int, verb: Verb, words: str) -> None:
    operations = operations_of(make_relay())
    last = place_of(operations[stage_index], verb, "residual from chunk 1 to 2, microbatch 3")
    del operations[stage_index][last]
    with pytest.raises(PlanDefect, match=re.escape(f"pp_forward from stage 1 to 2: {words}")):
        check_operations(operations)
