"""Whether the passes of all stages come to an end, each stage's in its own order. Pure data.

Posting a send or a receive holds up nobody, and a stage posts the receives of a pass before the pass. Each way of each boundary
has a communicator, whose sends and receives meet in the order in which they are posted. Where that order is the same at both
ends, a message is there as soon as it is sent, and a step leaves nothing behind for the next. Then a stage waits only in a
pass, for what the pass of the same microbatch through the chunk before (going back, the one behind) sends: of a forward pass
always for the stage before, of a backward pass always for the stage behind. Three things are checked:

1. On every stage a microbatch goes forward through the stage's chunks in their order, and then back.
2. On every way passes send in the order in which passes receive. `checker.py` shows the same of the messages of a pass.
3. Of stages s and s + 1, s sends before its m-th receipt from s + 1 as many forwards at least as s + 1 waits for
   before its m-th sending to s.

Then no stages wait for each other. Else each of them would wait for a neighbour that waits, too, so somewhere two for each
other, or all around in one direction. Two: s in its m-th backward from s + 1, which has not come to it and is in its k-th
forward from s, which s has not come to: s sends fewer than k forwards before, s + 1 waits for k, against 3. All around in
forward passes: by 2 all stages have the same order of passes but for the chunks' numbers, and by 1 a pass of the first stage
waits for one of the last that is earlier in it. So the k-th pass of a stage waits for k-th ones of stages before it and for
earlier ones, and of those none waits for a later one. Going back it is the same.

What breaks one of the three hangs or mistakes messages: the residual, which every hop has, is sent when a pass ends and is waited
for before the next one runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from operator import attrgetter

from lime_dist.plan.schedule import Action, Kind


class PlanDefect(RuntimeError):
    """A plan by which stages would hang or take one message for another. The mistake is ours: no user can mend it."""


def check_order(
    actions: Sequence[Sequence[Action]], *, kinds: Sequence[Kind], num_chunks: int, num_microbatches: int
) -> None:
    """Of passes of these kinds. actions: by stage.

    Raises: PlanDefect.
    """
    num_stages = len(actions)
    for stage, own in enumerate(actions):
        chunks = range(stage, num_chunks, num_stages)
        way = [(kind, chunk) for kind in kinds for chunk in (chunks if kind is Kind.FORWARD else chunks[::-1])]
        _check_microbatches(
            stage, own, [(kind, chunk, index) for index in range(num_microbatches) for kind, chunk in way]
        )
    for stage in range(num_stages):
        behind = (stage + 1) % num_stages
        before_hop = [action for action in actions[stage] if action.chunk != num_chunks - 1]
        after_hop = [action for action in actions[behind] if action.chunk != 0]
        _check_ways((stage, behind), before_hop, after_hop)
        _check_waits((stage, behind), before_hop, after_hop)


def _check_microbatches(stage: int, actions: Sequence[Action], due: Sequence[tuple[Kind, int, int]]) -> None:
    """due: what is to come of one microbatch after another, as plain tuples, which are made faster."""
    found = sorted(actions, key=attrgetter("microbatch_index"))
    if found != due:
        wrong = next(pair for pair in zip_longest(found, due) if pair[0] != pair[1])
        one, other = (Action(*each) if each else "nothing" for each in wrong)
        raise PlanDefect(f"stage {stage}: {one} is planned where {other} is due")


def _check_ways(stages: tuple[int, int], before_hop: Sequence[Action], after_hop: Sequence[Action]) -> None:
    """What crosses the hops between two stages, there and back."""
    for kind, (sender, receiver), sends, receives in (
        (Kind.FORWARD, stages, before_hop, after_hop),
        (Kind.BACKWARD, stages[::-1], after_hop, before_hop),
    ):
        step = 1 if kind is Kind.FORWARD else -1
        sent = [(chunk + step, index) for of, chunk, index in sends if of is kind]
        received = [(chunk, index) for of, chunk, index in receives if of is kind]
        if sent != received:
            one, other = next((one, other) for one, other in zip(sent, received) if one != other)
            raise PlanDefect(
                f"stage {sender} sends for {Action(kind, *one)} where stage {receiver} receives for {Action(kind, *other)}"
            )


def _check_waits(stages: tuple[int, int], before_hop: Sequence[Action], after_hop: Sequence[Action]) -> None:
    """The ways' orders are the same on both sides."""
    sent, waited_for = _forwards_before_backwards(before_hop), _forwards_before_backwards(after_hop)
    for place, (has, needs) in enumerate(zip(sent, waited_for)):
        if needs > has:
            backwards, forwards = (
                [[action for action in side if action.kind is kind][at] for side in (before_hop, after_hop)]
                for kind, at in ((Kind.BACKWARD, place), (Kind.FORWARD, has))
            )
            raise PlanDefect(
                f"deadlock: stage {stages[0]} hangs in {backwards[0]}, which waits for {backwards[1]} of stage {stages[1]}; "
                f"stage {stages[1]} hangs in {forwards[1]}, which waits for {forwards[0]} of stage {stages[0]}"
            )


def _forwards_before_backwards(actions: Sequence[Action]) -> list[int]:
    """By backward."""
    is_forward, number, numbers = Kind.FORWARD, 0, []
    for kind, _, _ in actions:
        if kind is is_forward:
            number += 1
        else:
            numbers.append(number)
    return numbers
