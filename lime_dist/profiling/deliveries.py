"""Each message of a step on its way: when it could go, when it went, when it was there, when it was needed. Pure data.

Messages of one channel, which is one way between two ranks, travel one by one in the order given, each from when it is handed
over and its receive is posted. What a message takes when no other is on the cards of its two ranks is its *transfer*. What it
takes longer beside others is *queue*: they share the way, and even what goes the other way delays it, as a receiver's
answers wait behind that.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from lime_dist.plan.messages import Message
from lime_dist.plan.schedule import Action


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """Moments in seconds since the step began, on one clock.

    action: the pass of the receiver. ready: made. handed: given to the transport. posted: its receive. started: on the link.
    needed: the receiver came to where it waits for it. taken: it went on from there. transfer_seconds: of its time on the link,
    what it would have taken alone. quiet: the share of that time in which it was alone.
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
    transfer_seconds: float
    quiet: float

    @property
    def link_seconds(self) -> float:
        return self.arrived - self.started

    def transfer_behind(self, moment: float) -> float:
        """Of `transfer_seconds` what comes after `moment`, as if it were spread evenly."""
        if moment <= self.started:
            return self.transfer_seconds
        return self.transfer_seconds * max(0.0, self.arrived - moment) / self.link_seconds if self.link_seconds else 0.0

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
    """By (receiver, `Received.order`); each message is taken to have had an equal share of the link beside others."""
    channels = list(channels)
    on_links = [list(_on_link(channel)) for channel in channels]
    out, into = _Cards(), _Cards()
    for channel, spans in zip(channels, on_links):
        out.add(channel.sender, spans)
        into.add(channel.receiver, spans)
    deliveries = {}
    for channel, spans in zip(channels, on_links):
        sides = _Sides(
            (out.of(channel.sender), into.of(channel.receiver)), (out.of(channel.receiver), into.of(channel.sender))
        )
        for sent, received, (started, arrived) in zip(channel.sent, channel.received, spans, strict=True):
            transfer, quiet = sides.shares(started, arrived)
            deliveries[channel.receiver, received.order] = Delivery(
                message=sent.message,
                action=received.action,
                sender=channel.sender,
                receiver=channel.receiver,
                boundary=channel.boundary,
                ready=sent.ready,
                handed=sent.handed,
                posted=received.posted,
                started=started,
                arrived=arrived,
                needed=received.needed,
                taken=received.taken,
                transfer_seconds=transfer,
                quiet=quiet,
            )
    return deliveries


ALONE = 0.95  # of its time on the link: what takes longer then is the link's own doing
_FEWEST = 3


def times_alone(deliveries: Iterable[Delivery]) -> dict[tuple[int, int, int], float]:
    """By (sender, receiver, bytes), of all steps: what messages take alone, by the quarter of them that were most so."""
    alike: dict[tuple[int, int, int], list[Delivery]] = defaultdict(list)
    for delivery in deliveries:
        alike[_alike(delivery)].append(delivery)
    return {
        place: median(one.transfer_seconds for one in _quietest(found, max(_FEWEST, len(found) // 4)))
        for place, found in alike.items()
    }


def _quietest(deliveries: Sequence[Delivery], number: int) -> list[Delivery]:
    return sorted(deliveries, key=lambda one: -one.quiet)[:number]


def told_apart(delivery: Delivery, alone: Mapping[tuple[int, int, int], float]) -> Delivery:
    """With what `times_alone` says of its transfer, where it was not alone itself."""
    own = delivery.link_seconds if delivery.quiet >= ALONE else alone[_alike(delivery)]
    return replace(delivery, transfer_seconds=min(own, delivery.link_seconds))


def _alike(delivery: Delivery) -> tuple[int, int, int]:
    return delivery.sender, delivery.receiver, delivery.message.num_bytes


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
        self._changes: dict[int, list[tuple[float, int]]] = defaultdict(lambda: [(float("-inf"), 0)])
        self._steps: dict[int, _Steps] = {}

    def add(self, rank: int, spans: Iterable[tuple[float, float]]) -> None:
        self._changes[rank] += [change for begin, end in spans for change in ((begin, 1), (end, -1))]

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


class _Sides(NamedTuple):
    """Of the two cards of a channel: those that it goes through, and those that go the other way."""

    own: tuple[_Steps, _Steps]
    other: tuple[_Steps, _Steps]

    def shares(self, begin: float, end: float) -> tuple[float, float]:
        """Of a message that was on the link from `begin` to `end`: the time that it had for itself, and the share in which it
        was alone."""
        sides = (*self.own, *self.other)
        moments = sorted({begin, end, *(moment for side in sides for moment in _between(side.moments, begin, end))})
        transfer = quiet = 0.0
        for one, following in pairwise(moments):
            beside = max(1, *(side.at(one) for side in self.own))
            transfer += (following - one) / beside
            if beside == 1 and not any(side.at(one) for side in self.other):
                quiet += following - one
        return transfer, quiet / (end - begin) if end > begin else 1.0


def _between(moments: Sequence[float], begin: float, end: float) -> Sequence[float]:
    return moments[bisect_right(moments, begin) : bisect_right(moments, end)]
