"""The plan of a run: which warm-up it takes, and what it says of chunks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from lime_dist.config import Config, check_config, parse_config
from lime_dist.errors import ConfigError, LayoutError
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


def told(operations: Sequence[Operation]) -> list[str]:
    """Without the microbatch, which is the same in all."""
    return [str(operation).partition(", microbatch")[0] for operation in operations]


def of_first_pass(stage: StagePlan, kind: Kind) -> list[str]:
    action = next(action for action in stage.actions if action.kind is kind)
    return [one for one in told(operations_of(stage, action)) if not one.startswith("receive")]


def test_entries_leave_as_they_are_made_and_what_passes_by_before() -> None:
    """Relay, two layers a stage: forward of the third stage, then backward of the second."""
    plan = make_plan("depth.policy=relay")
    assert of_first_pass(plan.stages[2], Kind.FORWARD) == [
        "await entries of layers 0, 1 from chunk 1 to 2",
        "await entries of layers 2 from chunk 1 to 2",
        "await entries of layers 3 from chunk 1 to 2",
        "send entries of layers 0, 1, 2, 3 from chunk 2 to 3",
        "await residual from chunk 1 to 2",
        "run 2F0 to layer 4",
        "send entries of layers 4 from chunk 2 to 3",
        "run 2F0 to layer 5",
        "send entries of layers 5 from chunk 2 to 3",
        "run 2F0",
        "send residual from chunk 2 to 3",
    ]
    assert of_first_pass(plan.stages[1], Kind.BACKWARD) == [
        "await gradient of residual from chunk 2 to 1",
        "run 1B0 to layer 3",
        "await gradient of entries of layers 3 from chunk 2 to 1",
        "run 1B0 to layer 2",
        "await gradient of entries of layers 2 from chunk 2 to 1",
        "run 1B0",
        "send gradient of residual from chunk 1 to 0",
        "await gradient of entries of layers 0, 1 from chunk 2 to 1",
        "send gradient of entries of layers 1 from chunk 1 to 0",
        "send gradient of entries of layers 0 from chunk 1 to 0",
    ]


def test_a_sum_is_awaited_by_its_reader_and_its_gradient_leaves_behind_it() -> None:
    """Least, two layers a stage: the last stage, and the backward pass of the one before it."""
    plan = make_plan()
    assert of_first_pass(plan.stages[3], Kind.FORWARD) == [
        "await residual from chunk 2 to 3",
        "run 3F0 to layer 6",
        "await sums of layers 6 from chunk 2 to 3",
        "run 3F0 to layer 7",
        "await sums of layers 7 from chunk 2 to 3",
        "run 3F0",
    ]
    assert of_first_pass(plan.stages[3], Kind.BACKWARD) == [
        "run 3B0 to layer 7",
        "send gradient of sums of layers 7 from chunk 3 to 2",
        "run 3B0 to layer 6",
        "send gradient of sums of layers 6 from chunk 3 to 2",
        "run 3B0",
        "send gradient of residual from chunk 3 to 2",
    ]


def test_what_a_stage_adds_nothing_to_passes_by_both_ways() -> None:
    """Of two layers at each end only the last read, and only the first are read: relayed entries, then one sum."""
    relayed = make_plan("depth.pattern={7: [0, 1], 6: [0, 1]}").stages[2]
    assert of_first_pass(relayed, Kind.FORWARD)[:2] == [
        "await entries of layers 0, 1 from chunk 1 to 2",
        "send entries of layers 0, 1 from chunk 2 to 3",
    ]
    assert of_first_pass(relayed, Kind.BACKWARD)[:2] == [
        "await gradient of entries of layers 0, 1 from chunk 3 to 2",
        "send gradient of entries of layers 0, 1 from chunk 2 to 1",
    ]
    summed = make_plan("depth.pattern={7: [0, 1, 2, 3]}").stages[2]
    for kind, what, behind in ((Kind.FORWARD, "sums", 3), (Kind.BACKWARD, "gradient of sums", 1)):
        assert of_first_pass(summed, kind)[:2] == [
            f"await {what} of layers 7 from chunk {4 - behind} to 2",
            f"send {what} of layers 7 from chunk 2 to {behind}",
        ]


def test_a_sum_that_is_added_to_is_awaited_before_its_reader_where_its_chunk_adds_to_it() -> None:
    """The gradient needs nothing of that chunk, and goes on at once."""
    stage = make_plan("depth.pattern={7: [0, 1, 2, 3, 4, 5]}").stages[1]
    assert of_first_pass(stage, Kind.FORWARD)[:4] == [
        "await residual from chunk 0 to 1",
        "run 1F0 to layer 3",
        "await sums of layers 7 from chunk 0 to 1",
        "run 1F0",
    ]
    assert of_first_pass(stage, Kind.BACKWARD)[:2] == [
        "await gradient of sums of layers 7 from chunk 2 to 1",
        "send gradient of sums of layers 7 from chunk 1 to 0",
    ]


@pytest.mark.parametrize(
    ("overrides", "ahead"), [("", 1), ("pipeline.warmup=auto", 2), ("pipeline.receives_ahead=4", 4)]
)
def test_receives_are_posted_ahead(overrides: str, ahead: int) -> None:
    """When an action runs, those of as many actions behind it are posted, and no more."""
    stage = make_plan(*overrides.split()).stages[1]
    posted: set[Action] = set()
    for operation in stage.operations(stage.actions):
        if operation.verb is Verb.RECEIVE:
            posted.add(operation.action)
        elif operation.verb is Verb.RUN:
            assert posted == set(stage.actions[: stage.actions.index(operation.action) + 1 + ahead])
