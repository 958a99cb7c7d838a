"""The critical path of a step: the chain of work and messages, over ranks, that its time follows from. Pure data.

Found from the end of the step backwards: where a rank computed, so far it is on the path; where it waited for a message, the
path comes over that message from whom it waited for; where it waited in a collective, from the rank that came last.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lime_dist.plan.operations import Operation
from lime_dist.plan.schedule import Kind
from lime_dist.profiling.deliveries import Delivery
from lime_dist.profiling.timeline import Cause, Piece, StepTimeline


class Segment(NamedTuple):
    """Part of the path, in seconds of the step. rank: where it is; of a message the receiver's. text: for people."""

    begin: float
    end: float
    rank: int
    kind: str  # compute | message | collective | wait | host
    text: str
    stage: int
    boundary: int | None = None  # of a message

    @property
    def seconds(self) -> float:
        return self.end - self.begin


def critical_path(timeline: StepTimeline) -> tuple[Segment, ...]:
    """In the order of time, without gaps, from the step's beginning to its end."""
    return tuple(_joined(reversed([*_Walk(timeline).back()])))


class _Walk:
    def __init__(self, timeline: StepTimeline):
        self._timeline = timeline
        self._ends = {rank: [piece.end for piece in pieces] for rank, pieces in timeline.pieces.items()}
        self._before = _messages_before(timeline.deliveries)
        # A jump goes to another rank at the same time, or before; clocks' errors must not make a circle of them.
        self._jumps_left = 0

    def back(self) -> Iterator[Segment]:
        rank = max(self._timeline.pieces, key=lambda each: self._ends[each][-1])
        moment = self._timeline.seconds
        while (piece := self._piece(rank, moment)) is not None:
            segments, rank, following = self._step_back(rank, moment, piece)
            yield from segments
            self._jumps_left = self._jumps_left - 1 if following >= moment else len(self._ends)
            moment = min(moment, following)
        if moment > 0:
            yield self._segment(0.0, moment, rank, "wait", "waits for the step before to end")

    def _piece(self, rank: int, moment: float) -> Piece | None:
        """That which ends at `moment` or holds it."""
        place = bisect_left(self._ends[rank], moment)
        pieces = self._timeline.pieces[rank]
        piece = pieces[min(place, len(pieces) - 1)]
        return piece if piece.begin < moment else None

    def _step_back(self, rank: int, moment: float, piece: Piece) -> tuple[list[Segment], int, float]:
        """What is on the path here, and from which rank and moment it goes on."""
        if piece.delivery is not None and self._jumps_left >= 0:
            return self._over_message(piece.delivery, moment)
        collective = piece.collective
        if collective is not None and collective.last_rank != rank and self._jumps_left >= 0:
            complete = min(moment, collective.complete)
            name = f"{_COLLECTIVES[collective.cause]} of {len(collective.ranks)} ranks"
            return [self._segment(complete, moment, rank, "collective", name)], collective.last_rank, complete
        kind = "compute" if piece.cause is Cause.COMPUTE else "host"
        kind = "collective" if collective is not None else kind
        return [self._segment(piece.begin, moment, rank, kind, _text(piece))], rank, piece.begin

    def _over_message(self, delivery: Delivery, moment: float) -> tuple[list[Segment], int, float]:
        """Back over the message, and over those that it had to let go first."""
        segments, until = [], moment
        while True:
            begin = min(until, delivery.started)
            text = f"{delivery} over {self._way(delivery)}"
            segments.append(self._segment(begin, until, delivery.receiver, "message", text, delivery.boundary))
            until, earlier = begin, self._before.get(id(delivery))
            if earlier is None or delivery.started > max(delivery.handed, delivery.posted, earlier.arrived):
                break
            if earlier.arrived < max(delivery.handed, delivery.posted):
                break
            delivery = earlier
        if delivery.posted > delivery.handed:
            return segments, delivery.receiver, min(until, delivery.posted)
        return segments, delivery.sender, min(until, delivery.handed)

    def _way(self, delivery: Delivery) -> str:
        return f"{self._timeline.stage_of(delivery.sender)}>{self._timeline.stage_of(delivery.receiver)}"

    def _segment(
        self, begin: float, end: float, rank: int, kind: str, text: str, boundary: int | None = None
    ) -> Segment:
        return Segment(begin, end, rank, kind, text, self._timeline.stage_of(rank), boundary)


_COLLECTIVES = {
    Cause.TENSOR: "tensor collective",
    Cause.DATA_PARALLEL: "data-parallel collective",
    Cause.AGREEMENT: "agreement",
    Cause.EMBEDDING: "sum of the tied embedding",
}


def _messages_before(deliveries: Sequence[Delivery]) -> dict[int, Delivery]:
    """The one before each on its channel, by identity."""
    last: dict[tuple[int, int, Kind], Delivery] = {}
    before = {}
    for delivery in sorted(deliveries, key=lambda each: each.started):
        channel = delivery.sender, delivery.receiver, delivery.action.kind
        if channel in last:
            before[id(delivery)] = last[channel]
        last[channel] = delivery
    return before


def _text(piece: Piece) -> str:
    if not isinstance(piece.about, Operation):
        return piece.about
    action = piece.about.action
    if piece.cause is Cause.COMPUTE:
        return f"{action.kind.name.lower()} of microbatch {action.microbatch_index} through chunk {action.chunk}"
    return f"{piece.about.verb.value} for microbatch {action.microbatch_index} of chunk {action.chunk}"


def _joined(segments: Iterator[Segment]) -> Iterator[Segment]:
    """Neighbours of one text on one rank as one."""
    last: Segment | None = None
    for segment in segments:
        if segment.end <= segment.begin:
            continue
        if last is not None and (last.rank, last.kind, last.text) == (segment.rank, segment.kind, segment.text):
            last = last._replace(end=segment.end)
            continue
        if last is not None:
            yield last
        last = segment
    if last is not None:
        yield last
