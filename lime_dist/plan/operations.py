"""The order in which a stage posts receives, waits, runs and sends. Pure data: the executor carries it out, the checker proves it.

Every pass of one kind through a chunk does the same, whatever the microbatch: it is planned once, as `PassOperation`s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from lime_dist.plan.messages import Message, Point, points
from lime_dist.plan.schedule import Action, Kind


class Verb(Enum):
    RECEIVE = "receive"  # post it: nothing waits
    AWAIT = "await"  # until it is here
    RUN = "run"
    SEND = "send"


class PassOperation(NamedTuple):
    """Of a pass. message: none where `verb` is RUN. until: the point of the pass to which RUN goes on."""

    verb: Verb
    message: Message | None = None
    until: Point | None = None


class Operation(NamedTuple):
    """The same, of the pass that `action` names."""

    verb: Verb
    action: Action
    message: Message | None = None
    until: Point | None = None

    def __str__(self) -> str:
        if self.message is not None:
            return f"{self.verb.value} {self.message}, microbatch {self.action.microbatch_index}"
        return f"{self.verb.value} {self.action}" + (f" to layer {self.until}" if isinstance(self.until, int) else "")


class Messages(Protocol):
    """A chunk's, in the order in which they leave, and the layers of whose passes they name points."""

    @property
    def layers(self) -> range: ...

    @property
    def received(self) -> Mapping[Kind, tuple[Message, ...]]:
        """What each kind of pass reads from another chunk."""

    @property
    def sent(self) -> Mapping[Kind, tuple[Message, ...]]:
        """What each kind of pass leaves for another chunk."""


class ChunkPasses(Messages, Protocol):
    """A chunk's. Receives are posted in the order in which their messages leave."""

    @property
    def operations(self) -> Mapping[Kind, tuple[PassOperation, ...]]:
        """All but the receives."""


def plan_operations(
    chunks: Mapping[int, ChunkPasses], actions: Sequence[Action], receives_ahead: int
) -> Iterator[Operation]:
    """Of one stage. receives_ahead: of how many actions ahead of the running one receives are posted."""
    posted = 0
    for position, action in enumerate(actions):
        last = min(position + receives_ahead, len(actions) - 1)
        for ahead in actions[posted : last + 1]:
            yield from (Operation(Verb.RECEIVE, ahead, message) for message in chunks[ahead.chunk].received[ahead.kind])
        posted = last + 1
        for verb, message, until in chunks[action.chunk].operations[action.kind]:
            yield Operation(verb, action, message, until)


def plan_pass(messages: Messages, kind: Kind) -> Iterator[PassOperation]:
    """All but the receives."""
    received, sent = messages.received[kind], messages.sent[kind]
    awaited: set[Message] = set()
    for point in ("before", *stops(messages, kind)):
        if point != "before":
            yield PassOperation(Verb.RUN, until=point)
        for message in sent:
            if message.leaves == point:
                yield from _await(parts_of(message, received), awaited)
                yield PassOperation(Verb.SEND, message)
        yield from _await([message for message in received if message.needed == point], awaited)


def _await(messages: Sequence[Message], awaited: set[Message]) -> Iterator[PassOperation]:
    yield from (PassOperation(Verb.AWAIT, message) for message in messages if message not in awaited)
    awaited.update(messages)


def stops(messages: Messages, kind: Kind) -> tuple[Point, ...]:
    """The points of a pass, in order, to which it runs: where messages leave or are needed, and its end."""
    busy = {message.leaves for message in messages.sent[kind]} | {message.needed for message in messages.received[kind]}
    return tuple(point for point in points(messages.layers, kind)[1:] if point in busy or point == "behind")


def parts_of(message: Message, received: Sequence[Message]) -> list[Message]:
    """Those of the same pass that must be here before `message` leaves, which sends them on, some with a share added."""
    layers = set(message.layers)
    return [other for other in received if other.cargo is message.cargo and not layers.isdisjoint(other.layers)]
