"""A rank's operations, messages and collectives as events of the Trace Event Format. Pure data.

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, groupby
from typing import Any

from lime_dist.plan.messages import Message
from lime_dist.plan.operations import Operation, Verb
from lime_dist.plan.schedule import Kind
from lime_dist.profiling.deliveries import Delivery
from lime_dist.profiling.profile_files import Profile, RankRecord
from lime_dist.profiling.timeline import Cause, Collective, Piece, StepTimeline, step_origin

Event = dict[str, Any]
PIDS_OF_A_RANK = 10  # its own, and those of its torch.profiler


class TraceClock:
    """Times of a trace: whole ns since the first recorded step began, on rank 0's clock."""

    def __init__(self, profile: Profile):
        self._origins = {step: step_origin(profile, index) for index, step in enumerate(profile.steps)}
        self._zero = self._origins[profile.steps[0]]
        self.zero_epoch_ns = round(self._zero) + profile.ranks[0].epoch_ns

    def in_step(self, step: int, seconds: float) -> int:
        return round(self._origins[step] - self._zero + seconds * 1e9)

    def on_rank(self, record: RankRecord, epoch_ns: int) -> int:
        """Of what happened on a rank at `epoch_ns` by its host's time of day."""
        return round(record.on_first_clock(epoch_ns - record.epoch_ns) - self._zero)


@dataclass(frozen=True)
class Track:
    """A thread of a trace. Its events take times in ns, as the format's us have three digits behind the point."""

    pid: int
    tid: int

    def span(self, name: str, category: str, begin: int, end: int, args: Event) -> Event:
        place = {"ph": "X", "name": name, "cat": category, "pid": self.pid, "tid": self.tid}
        return place | {"ts": begin / 1000, "dur": (end - begin) / 1000, "args": args}

    def flow(self, phase: str, number: int, moment: int) -> Event:
        """phase: s where the arrow starts, f where it ends."""
        place = {"ph": phase, "name": "message", "cat": "message", "id": number, "pid": self.pid, "tid": self.tid}
        return place | {"ts": moment / 1000} | ({"bp": "e"} if phase == "f" else {})

    def named(self, name: str) -> Iterator[Event]:
        yield metadata(self.pid, "thread_name", {"name": name}, self.tid)
        yield metadata(self.pid, "thread_sort_index", {"sort_index": self.tid}, self.tid)


def metadata(pid: int, name: str, args: Event, tid: int = 0) -> Event:
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": args}


def first_pid(rank: int) -> int:
    """Of `PIDS_OF_A_RANK`; 0 is the idle process to viewers."""
    return (rank + 1) * PIDS_OF_A_RANK


def name_process(profile: Profile, rank: int, pid: int, what: str = "") -> Iterator[Event]:
    """Processes are shown by stage, then by rank."""
    stage = profile.plan.layout.coordinate(rank).pp_rank
    name = f"stage {stage} rank {rank} {profile.ranks[rank].host} {what}".strip()
    yield metadata(pid, "process_name", {"name": name})
    yield metadata(pid, "process_sort_index", {"sort_index": stage * first_pid(len(profile.ranks)) + pid})


class RankEvents:
    """What one rank did in the steps of `timelines`."""

    def __init__(self, profile: Profile, timelines: Sequence[StepTimeline], clock: TraceClock, rank: int):
        self._profile, self._timelines, self._clock, self._rank = profile, timelines, clock, rank
        self._pid = first_pid(rank)
        self._steps, self._operations, forward, backward, self._collectives = (
            Track(self._pid, tid) for tid in range(1, 6)
        )
        self._links = {Kind.FORWARD: forward, Kind.BACKWARD: backward}

    def names(self) -> Iterator[Event]:
        yield from name_process(self._profile, self._rank, self._pid)
        yield from self._steps.named("steps")
        yield from self._operations.named("operations")
        for kind, track in self._links.items():
            yield from track.named(f"link out {kind.name.lower()}")
        yield from self._collectives.named("collectives")

    def steps(self) -> Iterator[Event]:
        """Named as torch.profiler names them, by which tools find a step's events."""
        for timeline in self._timelines:
            pieces = timeline.pieces[self._rank]
            span = self._span(timeline, pieces[0].begin, pieces[-1].end)
            yield self._steps.span(f"ProfilerStep#{timeline.step}", "user_annotation", *span, {})

    def operations(self) -> Iterator[Event]:
        for timeline in self._timelines:
            for piece in timeline.pieces[self._rank]:
                span = self._span(timeline, piece.begin, piece.end)
                args = self._operation_args(piece.about) if isinstance(piece.about, Operation) else {}
                yield self._operations.span(_piece_name(piece), piece.cause.value, *span, args)

    def messages(self) -> Iterator[Event]:
        """On the links out of this rank."""
        for timeline in self._timelines:
            for delivery in timeline.deliveries:
                if delivery.sender == self._rank:
                    span = self._span(timeline, delivery.started, delivery.arrived)
                    track = self._links[delivery.action.kind]
                    yield track.span(_message_name(delivery), "link", *span, _delivery_args(delivery))

    def collectives(self) -> Iterator[Event]:
        """While this rank waited in them."""
        for timeline in self._timelines:
            for _, same in groupby(timeline.pieces[self._rank], lambda piece: id(piece.collective)):
                pieces = list(same)
                if (collective := pieces[0].collective) is not None:
                    span = self._span(timeline, pieces[0].begin, pieces[-1].end)
                    cause, args = collective.cause.value, _collective_args(collective)
                    yield self._collectives.span(f"{cause} collective", cause, *span, args)

    def flows(self) -> Iterator[Event]:
        """This rank's ends of the arrows from where messages are sent to where they are waited for."""
        numbers = count(1)
        for timeline in self._timelines:
            for delivery, number in zip(timeline.deliveries, numbers):
                if self._rank in (delivery.sender, delivery.receiver):
                    start, end = self._arrow(timeline, delivery)
                    is_start = delivery.sender == self._rank
                    yield self._operations.flow("s" if is_start else "f", number, start if is_start else end)

    def _arrow(self, timeline: StepTimeline, delivery: Delivery) -> tuple[int, int]:
        """Its end is where the message is here: as Perfetto turns arrows by what begins first, not in the wait before that.

        It does not start behind its end, as it might by a clock's error.
        """
        ready, arrived = self._span(timeline, delivery.ready, delivery.arrived)
        needed, taken = self._span(timeline, delivery.needed, delivery.taken)
        end = max(needed, min(arrived, taken))
        return min(ready, end), end

    def _span(self, timeline: StepTimeline, begin: float, end: float) -> tuple[int, int]:
        return self._clock.in_step(timeline.step, begin), self._clock.in_step(timeline.step, end)

    def _operation_args(self, operation: Operation) -> Event:
        action, message = operation.action, operation.message
        args: Event = {"microbatch": action.microbatch_index, "chunk": action.chunk}
        if message is not None:
            return args | _message_args(message)
        stage = self._profile.plan.stages[self._profile.plan.layout.coordinate(self._rank).pp_rank]
        layers = next(chunk.layers for chunk in stage.chunks if chunk.chunk == action.chunk)
        return args | {"layers": _shown(layers), "until": operation.until}


def _piece_name(piece: Piece) -> str:
    about = piece.about
    if isinstance(about, str):
        return about if piece.collective is None else f"{piece.cause.value}: {about}"
    if about.verb is not Verb.RUN:
        assert about.message is not None
        what = f"{about.verb.value} {_cargo(about.message)} {about.action.microbatch_index}"
    else:
        what = f"{about.action.kind.name.lower()} {about.action.microbatch_index}"
    return what if piece.cause in (Cause.COMPUTE, Cause.HOST) else f"{piece.cause.value}: {what}"


def _message_name(delivery: Delivery) -> str:
    return f"{_cargo(delivery.message)} {delivery.action.microbatch_index}"


def _cargo(message: Message) -> str:
    return f"gradient of {message.cargo.value}" if message.is_gradient else message.cargo.value


def _message_args(message: Message) -> Event:
    return {"layers": _shown(message.layers), "bytes": message.num_bytes}


def _delivery_args(delivery: Delivery) -> Event:
    queue = delivery.arrived - delivery.handed - delivery.transfer_seconds
    return {
        "microbatch": delivery.action.microbatch_index,
        "from_rank": delivery.sender,
        "to_rank": delivery.receiver,
        "from_chunk": delivery.message.from_chunk,
        "to_chunk": delivery.message.to_chunk,
        **_message_args(delivery.message),
        "queue_ms": _ms(max(0.0, queue)),
        "transfer_ms": _ms(delivery.transfer_seconds),
        "exposed_ms": _ms(delivery.exposed_seconds),
    }


def _collective_args(collective: Collective) -> Event:
    return {
        "ranks": _shown(collective.ranks),
        "last_rank": collective.last_rank,
        "late_ms": _ms(collective.late_seconds),
        "since_entered_ms": _ms(collective.wait_ended - collective.entered),
    }


def _shown(numbers: Sequence[int]) -> str:
    """5; 2-4; 1, 4, 7."""
    first, last = (numbers[0], numbers[-1]) if numbers else (0, -1)
    if len(numbers) > 2 and last - first == len(numbers) - 1:
        return f"{first}-{last}"
    return ", ".join(map(str, numbers))


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 6)
