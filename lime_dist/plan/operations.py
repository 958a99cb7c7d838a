"""The order in which a stage posts receives, waits, runs and sends. Pure data: the executor carries it out, the checker proves it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from lime_dist.plan.messages import Message
from lime_dist.plan.schedule import Action, Kind


class Verb(Enum):
    RECEIVE = "receive"  # post it: nothing waits
    AWAIT = "await"  # until it is here
    RUN = "run"
    SEND = "send"


@dataclass(frozen=True, slots=True)
class Operation:
    """message: none where `verb` is RUN."""

    verb: Verb
    action: Action
    message: Message | None = None

    def __str__(self) -> str:
        what = f" {self.message}, microbatch {self.action.microbatch_index}" if self.message else f" {self.action}"
        return f"{self.verb.value}{what}"


class Messages(Protocol):
    """A chunk's, in the order in which they leave."""

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
    passing = [message for message in sent if message.passes_by]
    layers = {layer for message in passing for layer in message.layers}
    first = [message for message in received if layers & set(message.layers)] if passing else []
    yield from (Operation(Verb.AWAIT, action, message) for message in first)
    yield from (Operation(Verb.SEND, action, message) for message in passing)
    yield from (Operation(Verb.AWAIT, action, message) for message in received if message not in first)
    yield Operation(Verb.RUN, action)
    yield from (Operation(Verb.SEND, action, message) for message in sent if not message.passes_by)
