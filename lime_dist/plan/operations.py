"""The order in which a stage posts receives, waits, runs and sends. Pure data: the executor carries it out, the checker proves it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from lime_dist.plan.messages import Message, Point, points
from lime_dist.plan.schedule import Action, Kind


class Verb(Enum):
    RECEIVE = "receive"  # post it: nothing waits
    AWAIT = "await"  # until it is here
    RUN = "run"
    SEND = "send"


@dataclass(frozen=True, slots=True)
class Operation:
    """message: none where `verb` is RUN. until: the point of its pass to which RUN goes on."""

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


def plan_operations(
    messages_of: Mapping[int, Messages], actions: Sequence[Action], receives_ahead: int
) -> Iterator[Operation]:
    """Of one stage. messages_of: by chunk. receives_ahead: of how many actions ahead of the running one receives are posted."""
    posted = 0
    for position, action in enumerate(actions):
        last = min(position + receives_ahead, len(actions) - 1)
        for ahead in actions[posted : last + 1]:
            yield from (
                Operation(Verb.RECEIVE, ahead, message) for message in messages_of[ahead.chunk].received[ahead.kind]
            )
        posted = last + 1
        yield from _one(messages_of[action.chunk], action)


def _one(messages: Messages, action: Action) -> Iterator[Operation]:
    received, sent = messages.received[action.kind], messages.sent[action.kind]
    awaited: set[Message] = set()
    for point in ("before", *stops(messages, action.kind)):
        if point != "before":
            yield Operation(Verb.RUN, action, until=point)
        for message in sent:
            if message.leaves == point:
                yield from _await(action, parts_of(message, received), awaited)
                yield Operation(Verb.SEND, action, message)
        yield from _await(action, [message for message in received if message.needed == point], awaited)


def _await(action: Action, messages: Sequence[Message], awaited: set[Message]) -> Iterator[Operation]:
    yield from (Operation(Verb.AWAIT, action, message) for message in messages if message not in awaited)
    awaited.update(messages)


def stops(messages: Messages, kind: Kind) -> tuple[Point, ...]:
    """The points of a pass, in order, to which it runs: where messages leave or are needed, and its end."""
    busy = {message.leaves for message in messages.sent[kind]} | {message.needed for message in messages.received[kind]}
    return tuple(point for point in points(messages.layers, kind)[1:] if point in busy or point == "behind")


def parts_of(message: Message, received: Sequence[Message]) -> list[Message]:
    """Those of the same pass that must be here before `message` leaves, which sends them on, some with a share added."""
    return [other for other in received if other.cargo is message.cargo and set(other.layers) & set(message.layers)]
