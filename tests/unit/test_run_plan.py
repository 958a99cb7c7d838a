"""The plan of a run: which warm-up it takes, and what it says of chunks."""

from __future__ import annotations

import pytest

from lime_dist.config import Config, check_config, parse_config
from lime_dist.errors import ConfigError, LayoutError
from lime_dist.plan.messages import Cargo
from lime_dist.plan.operations import Operation, Verb
from lime_dist.plan.run_plan import RunPlan, plan_run
from lime_dist.plan.schedule import Action, Kind
from lime_dist.plan.stages import StagePlan

BASE = {
    "model": {"num_layers": 8, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "vocab_size": 96},
    "parallel": {"pp": 4},
    "pipeline": {"num_microbatches": 12},
    "data": {"seq_length": 64, "global_batch_size": 12},
    "run": {"device": "cpu"},
}


def make_plan(*overrides: str) -> RunPlan:
    return plan_run(make_config(*overrides))


def make_config(*overrides: str) -> Config:
    return check_config(parse_config(BASE, overrides))


def first_forwards(plan: RunPlan) -> list[int]:
    """Of each stage, before its first backward."""
    return [[action.kind for action in stage.actions].index(Kind.BACKWARD) for stage in plan.stages]


def largest(plan: RunPlan) -> int:
    return max(memory.total_bytes for memory in plan.memory)


def test_auto_is_eager_where_memory_is_not_limited() -> None:
    assert first_forwards(make_plan()) == [4, 3, 2, 1]
    assert first_forwards(make_plan("pipeline.warmup=auto")) == [7, 5, 3, 1]
    assert make_plan("pipeline.warmup=auto") == make_plan("pipeline.warmup=7")


def test_auto_takes_the_most_that_the_memory_allows() -> None:
    needs = {warmup: largest(make_plan(f"pipeline.warmup={warmup}")) for warmup in (5, 6, 7)}
    assert len(set(needs.values())) > 1 and largest(make_plan()) < needs[5]
    for memory in needs.values():
        most = max(warmup for warmup, needed in needs.items() if needed <= memory)
        assert make_plan("pipeline.warmup=auto", f"run.memory={memory}").warmup == most
    assert make_plan("pipeline.warmup=auto", f"run.memory={needs[5] - 1}") == make_plan()


def test_what_does_not_fit_is_refused_by_name() -> None:
    needed = largest(make_plan())
    assert make_plan(f"run.memory={needed}").warmup is None
    for warmup in ("null", "auto"):
        with pytest.raises(
            LayoutError, match=r"^run\.memory: \d+, but a rank of stage 2 needs about .*; lower data\.seq"
        ):
            make_plan(f"pipeline.warmup={warmup}", f"run.memory={needed - 1}")
    with pytest.raises(ConfigError, match=r"^run\.memory: '70 apples' is no size; write 70GiB"):
        make_config("run.memory=70 apples")
    with pytest.raises(ConfigError, match=r"^pipeline\.warmup: 'eager' is unknown; use auto or a number"):
        make_config("pipeline.warmup=eager")


@pytest.mark.parametrize("warmup", [3, 8])
def test_a_warmup_outside_the_range_is_refused(warmup: int) -> None:
    with pytest.raises(ConfigError, match=rf"^pipeline\.warmup: {warmup} does not fit 4 stages; use 4 to 7"):
        make_config(f"pipeline.warmup={warmup}")


def test_auto_is_the_schedules_own_with_virtual_stages_and_gpipe() -> None:
    for overrides in (("parallel.virtual_stages=2",), ("pipeline.schedule=gpipe",)):
        own, auto = make_plan(*overrides), make_plan("pipeline.warmup=auto", *overrides)
        assert [stage.actions for stage in own.stages] == [stage.actions for stage in auto.stages]


def test_chunks_go_round_the_stages() -> None:
    plan = make_plan("parallel.virtual_stages=2", "depth.policy=relay")
    assert [[chunk.chunk for chunk in stage.chunks] for stage in plan.stages] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert [chunk.layers for chunk in plan.chunks] == [range(layer, layer + 1) for layer in range(8)]
    assert len(plan.boundary_bytes) == 4, "the last leads back to the first stage"
    assert plan.chunks[6].transfer.kept == {2: (0, 1, 2)}, "what stage 2 has had since chunk 2"
    assert plan.chunks[6].transfer.received.raw_entries == (3, 4, 5)
    assert [chunk.last_use for chunk in plan.chunks] == [4, 5, 6, 7, 4, 5, 6, 7]


def test_messages_are_addressed_and_mirrored() -> None:
    plan = make_plan("parallel.virtual_stages=2")
    for chunk, following in zip(plan.chunks, plan.chunks[1:]):
        assert chunk.sent[Kind.FORWARD] == following.received[Kind.FORWARD]
        assert following.sent[Kind.BACKWARD] == chunk.received[Kind.BACKWARD]
        there, back = chunk.sent[Kind.FORWARD], chunk.received[Kind.BACKWARD]
        assert sum(message.num_bytes for message in there) == sum(message.num_bytes for message in back)
        for messages, ends in ((there, (chunk.chunk, following.chunk)), (back, (following.chunk, chunk.chunk))):
            assert {(message.from_chunk, message.to_chunk) for message in messages} == {ends}
            carried = [(message.cargo, layer) for message in messages for layer in message.layers or (None,)]
            assert len(carried) == len(set(carried))


def operations_of(stage: StagePlan, action: Action) -> list[Operation]:
    return [operation for operation in stage.operations(stage.actions) if operation.action == action]


def test_what_passes_by_leaves_before_the_rest_is_awaited_and_the_residual_goes_ahead() -> None:
    stage = make_plan("depth.policy=relay").stages[2]
    _, *rest = operations_of(stage, stage.actions[0])  # behind the first posted receive
    told = [(one.verb, one.message and (one.message.cargo, one.message.passes_by)) for one in rest]
    received, passing, made = (Cargo.ENTRIES, True), (Cargo.ENTRIES, True), (Cargo.ENTRIES, False)
    residual = Cargo.RESIDUAL, False
    assert told == [
        (Verb.RECEIVE, residual),
        (Verb.RECEIVE, made),
        (Verb.AWAIT, received),
        (Verb.AWAIT, made),  # the layers of the chunk before, which pass by here
        (Verb.SEND, passing),
        (Verb.AWAIT, residual),
        (Verb.RUN, None),
        (Verb.SEND, residual),
        (Verb.SEND, made),
    ]


@pytest.mark.parametrize(("overrides", "ahead"), [("", 1), ("pipeline.warmup=auto", 2)])
def test_receives_are_posted_ahead(overrides: str, ahead: int) -> None:
    """When an action runs, those of as many actions behind it are posted, and no more."""
    stage = make_plan(*overrides.split()).stages[1]
    posted: set[Action] = set()
    for operation in stage.operations(stage.actions):
        if operation.verb is Verb.RECEIVE:
            posted.add(operation.action)
        elif operation.verb is Verb.RUN:
            assert posted == set(stage.actions[: stage.actions.index(operation.action) + 1 + ahead])
