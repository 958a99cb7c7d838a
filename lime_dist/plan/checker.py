"""Proves of a plan, before anything runs, that its messages pair up and that no stage waits for ever. Pure data.

Every microbatch's pass of one kind through a chunk has the same operations. So what they are is proved of one microbatch, hop
by hop and stage by stage, and of the others only in which order each stage runs their passes.

Collectives are left out: those over tensor ranks are within a pass, of which all tensor ranks run the same in the same order,
for they have one plan; those at the end of a step come from code that is the same on all ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import islice, zip_longest

from lime_dist.plan.deadlock import PlanDefect, check_order
from lime_dist.plan.messages import Cargo, Message
from lime_dist.plan.operations import Operation, Verb, parts_of, stops
from lime_dist.plan.run_plan import RunPlan
from lime_dist.plan.schedule import Action, Kind
from lime_dist.plan.stages import ChunkPlan, StagePlan

MAX_PASSES = 50_000  # that are looked at, about: a tenth of a second's work


def check_run(plan: RunPlan) -> None:
    """A step and an evaluation of all stages.

    Raises: PlanDefect.
    """
    for chunk in plan.chunks:
        _check_addresses(chunk)
    for chunk, behind in zip(plan.chunks, plan.chunks[1:]):
        _check_mirror(chunk, behind)
        _check_hop(Kind.FORWARD, chunk, behind)
        _check_hop(Kind.BACKWARD, behind, chunk)
    for stage in plan.stages:
        check_stage(stage, [*stage.operations(_one_microbatch(stage))])
    _check_order(plan, (Kind.FORWARD, Kind.BACKWARD), lambda stage: stage.actions)
    _check_order(plan, (Kind.FORWARD,), lambda stage: stage.evaluation)


def _one_microbatch(stage: StagePlan) -> list[Action]:
    """Its passes through all chunks, forward and back."""
    chunks = [chunk.chunk for chunk in stage.chunks]
    return [Action(Kind.FORWARD, chunk, 0) for chunk in chunks] + [
        Action(Kind.BACKWARD, chunk, 0) for chunk in chunks[::-1]
    ]


# ---- the order of passes


def _check_order(plan: RunPlan, kinds: Sequence[Kind], actions_of: Callable[[StagePlan], Sequence[Action]]) -> None:
    """Of all passes, or of those of the first microbatches where there are more than MAX_PASSES.

    These are as many as stay below it, but the warm-up and a round at least (without virtual stages a round is one microbatch).
    They do: without the microbatches of its later rounds a schedule is the schedule of fewer microbatches. From round to
    round each stage's order repeats, and so do the numbers that `deadlock.py` compares, each larger by a round's forwards, up
    to all that there are. So they show with the backwards of the first round what is wrong with any.
    """
    number = _num_checked(plan, kinds)
    checked = []
    for stage in plan.stages:
        actions, of_one = actions_of(stage), len(kinds) * len(stage.chunks)
        if len(actions) != plan.num_microbatches * of_one:
            raise PlanDefect(
                f"stage {stage.stage_index}: {len(actions)} passes are planned, not {plan.num_microbatches * of_one}"
            )
        # No further than to the last of them: the others may be many.
        checked.append([*islice((one for one in actions if one.microbatch_index < number), number * of_one)])
    check_order(checked, kinds=kinds, num_chunks=len(plan.chunks), num_microbatches=number)


def _num_checked(plan: RunPlan, kinds: Sequence[Kind]) -> int:
    """Of microbatches."""
    first = plan.stages[0]
    in_a_round = _run_length(first.evaluation, lambda action: action.chunk) if plan.virtual_stages > 1 else 1
    has_warmup = plan.schedule == "1f1b" and Kind.BACKWARD in kinds
    warmup = _run_length(first.actions, lambda action: action.kind) if has_warmup else 0
    fewest = -(-warmup // (plan.virtual_stages * in_a_round)) + 1
    rounds = max(fewest, MAX_PASSES // (len(kinds) * len(plan.chunks) * in_a_round))
    return min(plan.num_microbatches, rounds * in_a_round)


def _run_length(actions: Sequence[Action], of: Callable[[Action], Hashable]) -> int:
    """How many of the first ones are alike."""
    return next((index for index, action in enumerate(actions) if of(action) != of(actions[0])), len(actions))


# ---- the messages of a hop


def _check_addresses(chunk: ChunkPlan) -> None:
    here, before, behind = chunk.chunk, chunk.chunk - 1, chunk.chunk + 1
    for messages, kind, way in (
        (chunk.received, Kind.FORWARD, (before, here)),
        (chunk.sent, Kind.FORWARD, (here, behind)),
        (chunk.received, Kind.BACKWARD, (behind, here)),
        (chunk.sent, Kind.BACKWARD, (here, before)),
    ):
        for message in messages[kind]:
            if (message.from_chunk, message.to_chunk) != way or not 0 <= min(way) <= max(way) < chunk.num_chunks:
                raise PlanDefect(f"chunk {here}: {message} is no message of its {kind.name.lower()} pass")


def _check_mirror(chunk: ChunkPlan, behind: ChunkPlan) -> None:
    """Of all that crosses a hop the gradient comes back, though it may be packed otherwise."""
    there, back = _cargo(chunk.sent[Kind.FORWARD]), _cargo(behind.sent[Kind.BACKWARD])
    for cargo, layer in {**there, **back}:
        if there[cargo, layer] != back[cargo, layer]:
            what = cargo.value if layer is None else f"{cargo.value} of layer {layer}"
            raise PlanDefect(
                f"hop {chunk.chunk}: {what} crosses with {there[cargo, layer]} bytes, its gradient with {back[cargo, layer]}"
            )


def _check_hop(kind: Kind, sender: ChunkPlan, receiver: ChunkPlan) -> None:
    """What a pass sends the next one receives, in the same order."""
    sent = [message for verb, message, _ in sender.operations[kind] if verb is Verb.SEND]
    hop = min(sender.chunk, receiver.chunk)
    for one, other in zip_longest(sent, receiver.received[kind]):
        if one != other:
            raise PlanDefect(f"hop {hop}: {_sized('send', one)} meets {_sized('receive', other)}")


def _sized(verb: str, message: Message | None) -> str:
    return f"no {verb}" if message is None else f"{verb} {message} ({message.num_bytes} bytes)"


def _cargo(messages: Iterable[Message]) -> Mapping[tuple[Cargo, int | None], int]:
    """Bytes."""
    counted: Counter[tuple[Cargo, int | None]] = Counter()
    for message in messages:
        layers = message.layers or (None,)
        counted.update({(message.cargo, layer): message.num_bytes // len(layers) for layer in layers})
    return counted


# ---- one stage


def check_stage(stage: StagePlan, operations: Sequence[Operation]) -> None:
    """What the stage has when it waits, runs and sends is what these need; each message of each pass is handled once.

    Raises: PlanDefect.
    """
    chunks = {chunk.chunk: chunk for chunk in stage.chunks}
    seen: set[Operation] = set()
    running: Operation | None = None  # or where the pass that ran last stands
    for operation in operations:
        missing = next(
            (other for other in _needed(operation, chunks[operation.action.chunk]) if other not in seen), None
        )
        if missing is not None:
            raise PlanDefect(f"stage {stage.stage_index}: {operation} comes before {missing}")
        if operation in seen:
            raise PlanDefect(f"stage {stage.stage_index}: {operation} comes twice")
        if (made_by := _made_by(operation)) not in (None, running):
            raise PlanDefect(f"stage {stage.stage_index}: {operation} comes after {running}, not right after {made_by}")
        seen.add(operation)
        running = operation if operation.verb is Verb.RUN else running
    _check_all_sent(stage, operations)


def _made_by(operation: Operation) -> Operation | None:
    """The part of a pass behind which a message leaves that does not only pass by."""
    message = operation.message
    if operation.verb is not Verb.SEND or message is None or message.passes_by:
        return None
    return Operation(Verb.RUN, operation.action, until=message.leaves)


def _check_all_sent(stage: StagePlan, operations: Sequence[Operation]) -> None:
    """What is received needs no such check: its pass waits for it."""
    planned = {(chunk.chunk, kind): len(chunk.sent[kind]) for chunk in stage.chunks for kind in chunk.sent}
    sent = Counter(operation.action for operation in operations if operation.verb is Verb.SEND)
    for operation in operations:
        action = operation.action
        number = planned[action.chunk, action.kind]
        if operation.verb is Verb.RUN and sent[action] != number:
            raise PlanDefect(f"stage {stage.stage_index}: {operation} sends {sent[action]} of its {number} messages")


def _needed(operation: Operation, chunk: ChunkPlan) -> Iterable[Operation]:
    """What the same stage must have done before."""
    action, message = operation.action, operation.message
    received = chunk.received[action.kind]
    if message is None:
        yield from _needed_by_run(operation, chunk)
    elif operation.verb is Verb.AWAIT:
        yield Operation(Verb.RECEIVE, action, message)
    elif operation.verb is Verb.SEND:
        yield from (Operation(Verb.AWAIT, action, other) for other in parts_of(message, received))
        if (made_by := _made_by(operation)) is not None:
            yield made_by


def _needed_by_run(run: Operation, chunk: ChunkPlan) -> Iterable[Operation]:
    action, planned = run.action, stops(chunk, run.action.kind)
    before = planned[: planned.index(run.until)] if run.until in planned else planned
    yield from (
        Operation(Verb.AWAIT, action, message)
        for message in chunk.received[action.kind]
        if message.needed in ("before", *before)
    )
    yield from (Operation(Verb.RUN, action, until=stop) for stop in before)
    if action.kind is Kind.BACKWARD:
        forward = Action(kind=Kind.FORWARD, chunk=action.chunk, microbatch_index=action.microbatch_index)
        yield Operation(Verb.RUN, forward, until="behind")
