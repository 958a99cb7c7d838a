"""A model of the queues of all ranks, in which operations of stages are run one by one: what `plan.checker` proves, tried out.

A posted send or receive takes its place in its communicator's queue on that rank, and the program goes on. Nothing is buffered,
as under NCCL: an operation is done when it and its partner on the other rank both are first in their queues. A program waits for
what it has received before it reads it, and at the end of a step for all that it has sent. No orders of events need to be
tried: each program is fixed, and two operations that can meet still can after others have met. A step that ends leaves nothing
in a queue, so the steps after it end, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

from lime_dist.plan.deadlock import PlanDefect
from lime_dist.plan.messages import Message
from lime_dist.plan.operations import Operation, Verb
from lime_dist.plan.schedule import Action, Kind


class Channel(NamedTuple):
    """One direction of one boundary. group: its process group, as in `backends.megatron.Groups`."""

    group: str
    from_stage: int
    to_stage: int

    def __str__(self) -> str:
        return f"{self.group} from stage {self.from_stage} to {self.to_stage}"


def _channel(operation: Operation, stage_index: int, num_stages: int) -> Channel:
    """On which the stage sends or receives."""
    sends, forward = operation.verb is Verb.SEND, operation.action.kind is Kind.FORWARD
    to_next = sends == forward
    wraps = stage_index == (num_stages - 1 if to_next else 0)
    peer = (stage_index + (1 if to_next else -1)) % num_stages
    group = f"{'wrap' if wraps else 'pp'}_{'forward' if forward else 'backward'}"
    return Channel(group, stage_index, peer) if sends else Channel(group, peer, stage_index)


_Place = tuple[int, int]  # of an operation: its stage, its index there
_QUEUED = (Verb.SEND, Verb.RECEIVE)


def check_operations(operations: Sequence[Sequence[Operation]], *, by_pair: bool = True) -> None:
    """By stage: the k-th send of a channel has the k-th receive's message, and all of them end.

    by_pair: each two ranks of a process group have a communicator; else the group has one, as for batched messages.
    Raises: PlanDefect.
    """
    _Ranks(operations, _pair_up(operations), by_pair).run()


def _pair_up(operations: Sequence[Sequence[Operation]]) -> dict[_Place, tuple[Channel, _Place]]:
    """The channel and the partner of each send and receive."""
    sends: dict[Channel, list[_Place]] = {}
    receives: dict[Channel, list[_Place]] = {}
    for stage, own in enumerate(operations):
        for index, operation in enumerate(own):
            if operation.verb in _QUEUED:
                ends = sends if operation.verb is Verb.SEND else receives
                ends.setdefault(_channel(operation, stage, len(operations)), []).append((stage, index))
    pairs: dict[_Place, tuple[Channel, _Place]] = {}
    for channel in {**sends, **receives}:
        pair = sends.get(channel, []), receives.get(channel, [])
        _check_pairs(channel, *([operations[stage][index] for stage, index in places] for places in pair))
        for sent, received in zip(*pair):
            pairs[sent], pairs[received] = (channel, received), (channel, sent)
    return pairs


def _check_pairs(channel: Channel, sent: Sequence[Operation], received: Sequence[Operation]) -> None:
    for one, other in zip(sent, received):
        if (one.action.microbatch_index, one.message) != (other.action.microbatch_index, other.message):
            raise PlanDefect(f"{channel}: {_sized(one)} meets {_sized(other)}")
    if len(sent) != len(received):
        lacking, alone = ("receive", sent) if len(sent) > len(received) else ("send", received)
        raise PlanDefect(f"{channel}: {alone[min(len(sent), len(received))]} has no {lacking} on the other side")


def _sized(operation: Operation) -> str:
    assert operation.message is not None
    return f"{operation} ({operation.message.num_bytes} bytes)"


class _Ranks:
    """Each stage's program and queues, run as far as they go."""

    def __init__(
        self,
        operations: Sequence[Sequence[Operation]],
        pairs: Mapping[_Place, tuple[Channel, _Place]],
        by_pair: bool,
    ):
        self._operations = operations
        self._partner = {place: partner for place, (_, partner) in pairs.items()}
        self._queue_of: dict[_Place, deque[int]] = {}
        queues: dict[tuple[int, Hashable], deque[int]] = {}
        for place, (channel, _) in pairs.items():
            self._queue_of[place] = queues.setdefault((place[0], channel if by_pair else channel.group), deque())
        self._awaited = [_awaited(own) for own in operations]  # by the index of an AWAIT, that of its RECEIVE
        self._next = [0] * len(operations)
        self._done: set[_Place] = set()
        self._ready = deque(range(len(operations)))  # stages whose program may go on

    def run(self) -> None:
        while self._ready:
            self._advance(self._ready.popleft())
        if any(self._waits_for(stage) for stage in range(len(self._operations))):
            raise PlanDefect(self._story())

    def _advance(self, stage: int) -> None:
        own = self._operations[stage]
        while self._next[stage] < len(own):
            index = self._next[stage]
            verb = own[index].verb
            if verb is Verb.AWAIT and (stage, self._awaited[stage][index]) not in self._done:
                return
            self._next[stage] += 1
            if verb in _QUEUED:
                self._queue_of[stage, index].append(index)
                self._meet((stage, index))

    def _meet(self, place: _Place) -> None:
        """What is first in its queue and whose partner is, too, is done, and then perhaps what stood behind them."""
        waiting = [place]
        while waiting:
            place = waiting.pop()
            ends = place, self._partner[place]
            if not all(self._is_first(end) for end in ends):
                continue
            for end in ends:
                queue = self._queue_of[end]
                self._done.add((end[0], queue.popleft()))
                self._ready.append(end[0])
                waiting += [(end[0], queue[0])] if queue else []

    def _is_first(self, place: _Place) -> bool:
        queue = self._queue_of[place]
        return bool(queue) and queue[0] == place[1]

    # ---- telling why

    def _waits_for(self, stage: int) -> _Place | None:
        """The operation that its program waits for: a receive, or at the end a send; None where it has ended."""
        index = self._next[stage]
        if index < len(self._operations[stage]):
            return stage, self._awaited[stage][index]
        sends = (index for index, own in enumerate(self._operations[stage]) if own.verb is Verb.SEND)
        return next(((stage, index) for index in sends if (stage, index) not in self._done), None)

    def _story(self) -> str:
        """The circle of stages that wait for each other."""
        stage = next(stage for stage in range(len(self._operations)) if self._waits_for(stage))
        visited: list[int] = []
        while stage not in visited:
            visited.append(stage)
            stage = self._held_up_by(stage)[0][0]
        return "deadlock: " + "; ".join(self._sentence(stage) for stage in visited[visited.index(stage) :])

    def _held_up_by(self, stage: int) -> tuple[_Place, list[_Place]]:
        """The operation that another stage's program has not come to, and what stands first in queues on the way to it."""
        place = self._waits_for(stage)
        assert place is not None
        firsts: list[_Place] = []
        while True:
            first = place[0], self._queue_of[place][0]
            firsts += [] if first == place else [first]
            place = self._partner[first]
            if place[1] >= self._next[place[0]]:
                return place, firsts

    def _sentence(self, stage: int) -> str:
        (other, index), firsts = self._held_up_by(stage)
        behind = "".join(f" behind {self._operations[at][first]} of stage {at}" for at, first in firsts)
        return f"stage {stage} hangs in {self._stand(stage)}{behind}, which waits for {self._operations[other][index]} of stage {other}"

    def _stand(self, stage: int) -> str:
        place = self._waits_for(stage)
        assert place is not None
        is_at_the_end = self._next[stage] == len(self._operations[stage])
        return str(self._operations[stage][place[1] if is_at_the_end else self._next[stage]])


def _awaited(operations: Sequence[Operation]) -> dict[int, int]:
    posted: dict[tuple[Action, Message | None], int] = {}
    awaited = {}
    for index, operation in enumerate(operations):
        if operation.verb is Verb.RECEIVE:
            posted[operation.action, operation.message] = index
        elif operation.verb is Verb.AWAIT:
            awaited[index] = posted[operation.action, operation.message]
    return awaited
