"""Each message of a step on its way: when it could go, when it went, when it was there, when it was needed. Pure data.

Messages of one channel, which is one way between two ranks, travel one by one in the order given, each from when it is handed
over and its receive is posted. A rank's card sends and receives at once; messages of two channels that are on one card's way out,
or in, share it: of that time each has its share for itself, which is its *transfer*, and the rest is *queue*.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from lime_dist.plan.messages import Message
from lime_dist.plan.schedule import Action


class Share(NamedTuple):
    """From `begin` to `end` a message had `part` of its link."""

    begin: float
    end: float
    part: float


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """Moments in seconds since the step began, on one clock.

    action: the pass of the receiver. ready: made. handed: given to the transport. posted: its receive. started: on the link.
    needed: the receiver came to where it waits for it. taken: it went on from there. shares: from `started` to `arrived`.
    """

    message: Message
    action: Action
    sender: int  # global ranks
    receiver: int
    boundary: int
    ready: float
    handed: float
    posted: float
    started: float
    arrived: float
    needed: float
    taken: float
    shares: tuple[Share, ...] = field(repr=False)

    @property
    def transfer_seconds(self) -> float:
        """What it would have taken alone."""
        return sum((share.end - share.begin) * share.part for share in self.shares)

    def transfer_behind(self, moment: float) -> float:
        """Of `transfer_seconds` what comes after `moment`."""
        return sum(max(0.0, share.end - max(share.begin, moment)) * share.part for share in self.shares)

    @property
    def exposed_seconds(self) -> float:
        """For which the receiver waited, the sender having done its part: queue and transfer."""
        return max(0.0, self.arrived - max(self.needed, self.handed))

    def __str__(self) -> str:
        what = {"residual": "residual", "entries": "entries", "sums": "partial sums"}[self.message.cargo.value]
        gradient = "gradient of " if self.message.is_gradient else ""
        return f"{gradient}{what} of microbatch {self.action.microbatch_index}"


@dataclass(frozen=True, kw_only=True)
class Sent:
    """One end of a delivery."""

    message: Message
    ready: float
    handed: float


@dataclass(frozen=True, kw_only=True)
class Received:
    """The other end. order: by which the rank's deliveries are found again."""

    order: int
    action: Action
    posted: float
    arrived: float
    needed: float
    taken: float


@dataclass(frozen=True, kw_only=True)
class Channel:
    """One way between two ranks; `sent` and `received` in the order of the channel."""

    sender: int
    receiver: int
    boundary: int
    sent: Sequence[Sent]
    received: Sequence[Received]


def deliver(channels: Iterable[Channel]) -> dict[tuple[int, int], Delivery]:
    """By (receiver, `Received.order`)."""
    channels = list(channels)
    on_links = [list(_on_link(channel)) for channel in channels]
    out, into = _Cards(), _Cards()
    for channel, spans in zip(channels, on_links):
        out.add(channel.sender, spans)
        into.add(channel.receiver, spans)
    return {
        (channel.receiver, received.order): Delivery(
            message=sent.message,
            action=received.action,
            sender=channel.sender,
            receiver=channel.receiver,
            boundary=channel.boundary,
            ready=sent.ready,
            handed=sent.handed,
            posted=received.posted,
            started=span[0],
            arrived=span[1],
            needed=received.needed,
            taken=received.taken,
            shares=tuple(_shares(span, out.of(channel.sender), into.of(channel.receiver))),
        )
        for channel, spans in zip(channels, on_links)
        for sent, received, span in zip(channel.sent, channel.received, spans, strict=True)
    }


def _on_link(channel: Channel) -> Iterator[tuple[float, float]]:
    """From when to when each message was on its link. A clock's error may let one arrive before it was handed over."""
    free = 0.0
    for sent, received in zip(channel.sent, channel.received, strict=True):
        started = max(sent.handed, received.posted, free)
        free = max(received.arrived, started)
        yield started, free


class _Steps(NamedTuple):
    """A count that changes: from each moment on."""

    moments: list[float]
    counts: list[int]

    def at(self, moment: float) -> int:
        return self.counts[bisect_right(self.moments, moment) - 1]


class _Cards:
    """How many messages were on one side of each rank's card."""

    def __init__(self) -> None:
        self._changes: dict[int, list[tuple[float, int]]] = {}
        self._steps: dict[int, _Steps] = {}

    def add(self, rank: int, spans: Iterable[tuple[float, float]]) -> None:
        changes = self._changes.setdefault(rank, [(float("-inf"), 0)])
        changes += [change for begin, end in spans for change in ((begin, 1), (end, -1))]

    def of(self, rank: int) -> _Steps:
        if rank not in self._steps:
            self._steps[rank] = _count(self._changes[rank])
        return self._steps[rank]


def _count(changes: Sequence[tuple[float, int]]) -> _Steps:
    steps, count = _Steps([], []), 0
    for moment, change in sorted(changes):
        count += change
        if steps.moments and steps.moments[-1] == moment:
            steps.counts[-1] = count
        else:
            steps.moments.append(moment)
            steps.counts.append(count)
    return steps


def _shares(span: tuple[float, float], out: _Steps, into: _Steps) -> Iterator[Share]:
    begin, end = span
    moments = sorted({begin, end, *_between(out.moments, begin, end), *_between(into.moments, begin, end)})
    for one, following in pairwise(moments):
        yield Share(one, following, 1 / max(1, out.at(one), into.at(one)))


def _between(moments: Sequence[float], begin: float, end: float) -> Sequence[float]:
    return moments[bisect_right(moments, begin) : bisect_right(moments, end)]
