"""A profile as the page's script reads it: names once, and of each step arrays of numbers in whole µs. Pure data."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from datetime import datetime, timezone
from statistics import fmean
from typing import Any

from lime_dist.plan.messages import Message
from lime_dist.plan.operations import Operation
from lime_dist.plan.schedule import Kind
from lime_dist.profiling.accounting import Account, BoundaryAccount, RankAccount
from lime_dist.profiling.critical_path import critical_path
from lime_dist.profiling.deliveries import Delivery
from lime_dist.profiling.profile_files import Profile
from lime_dist.profiling.timeline import Cause, Collective, Piece, StepTimeline

CAUSE_NAMES = {
    Cause.COMPUTE: "compute",
    Cause.DEPENDENCY: "waiting for another stage (bubble)",
    Cause.QUEUE: "link busy with other messages",
    Cause.TRANSFER: "waiting for a transfer",
    Cause.TENSOR: "tensor parallel collectives",
    Cause.DATA_PARALLEL: "data parallel collectives",
    Cause.EMBEDDING: "sum over the tied embedding",
    Cause.AGREEMENT: "norm and agreement of all ranks",
    Cause.OPTIMIZER: "optimizer",
    Cause.DATA: "data",
    Cause.HOST: "host (posting, sending, taking in)",
}
_CAUSES = {cause: place for place, cause in enumerate(Cause)}


def page_data(
    profile: Profile, timelines: Sequence[StepTimeline], account: Account, findings: Sequence[str]
) -> dict[str, Any]:
    """All that the page shows, as JSON."""
    names = _Names()
    steps = [_step(timeline, names) for timeline in timelines]
    return {
        "folder": str(profile.folder),
        "findings": list(findings),
        "circumstances": list(_circumstances(profile)),
        "figures": {
            "step": _us(account.step_seconds),
            "bubble": round(account.bubble_share, 5),
            "exposed": _us(account.exposed_seconds),
            "compute": round(account.share_of(Cause.COMPUTE), 5),
        },
        "causes": [[cause.value, CAUSE_NAMES[cause]] for cause in _CAUSES],
        "chunks": [[chunk.layers[0], chunk.layers[-1]] for chunk in profile.plan.chunks],
        "stages": len(profile.plan.stages),
        "ranks": [_rank(profile, timelines, rank) for rank in account.ranks],
        "boundaries": [_boundary(boundary) for boundary in account.boundaries],
        "operations": [_operation(about, names) for about in list(names.abouts)],
        "messages": [_message(message) for message in names.messages],
        "texts": list(names.texts),
        "steps": steps,
    }


class _Index(dict[Hashable, int]):
    """Numbers what it is asked for, in the order of the first asking."""

    def __missing__(self, key: Hashable) -> int:
        self[key] = len(self)
        return self[key]


class _Names:
    def __init__(self) -> None:
        self.abouts: dict[Any, int] = _Index()  # operations and phases
        self.messages: dict[Any, int] = _Index()
        self.texts: dict[Any, int] = _Index()  # of critical paths


def _us(seconds: float) -> int:
    return round(1e6 * seconds)


# ---- steps


def _step(timeline: StepTimeline, names: _Names) -> dict[str, Any]:
    deliveries = {id(delivery): place for place, delivery in enumerate(timeline.deliveries)}
    collectives = _Index()
    pieces = [
        list(_pieces(timeline, rank, names, deliveries, collectives)) for rank in range(timeline.layout.world_size)
    ]
    return {
        "step": timeline.step,
        "pieces": pieces,
        "deliveries": [_delivery(delivery, names) for delivery in timeline.deliveries],
        "collectives": [_collective(each) for each in collectives],  # type: ignore[arg-type]
        "path": [
            [_us(one.begin), _us(one.end), one.rank, one.kind, names.texts[one.text]] for one in critical_path(timeline)
        ],
    }


def _pieces(
    timeline: StepTimeline, rank: int, names: _Names, deliveries: dict[int, int], collectives: dict[Hashable, int]
) -> Iterator[int]:
    """The beginning; then of each piece its duration, cause, what it is about, and what was waited for: a delivery from 1
    on, a collective from -1 down, or 0. Shorter pieces than the unit go; no moment moves by more than half of it."""
    now = _us(timeline.begin_of(rank))
    yield now
    for piece in timeline.pieces[rank]:
        end = _us(piece.end)
        if end <= now:
            continue
        awaited = 0
        if piece.delivery is not None:
            awaited = 1 + deliveries[id(piece.delivery)]
        elif piece.collective is not None:
            awaited = -1 - collectives[piece.collective]
        yield from (end - now, _CAUSES[piece.cause], names.abouts[piece.about], awaited)
        now = end


def _delivery(one: Delivery, names: _Names) -> list[int]:
    """Moments behind the first are counted from it."""
    ready = _us(one.ready)
    moments = one.handed, one.posted, one.started, one.arrived, one.needed, one.taken
    return [
        names.messages[one.message],
        one.action.microbatch_index,
        one.sender,
        one.receiver,
        ready,
        *(_us(moment) - ready for moment in moments),
        _us(one.transfer_seconds),
        _us(one.exposed_seconds),
    ]


def _collective(collective: Collective) -> list[Any]:
    moments = collective.entered, collective.wait_begun, collective.complete, collective.wait_ended
    return [list(collective.ranks), collective.last_rank, *map(_us, moments)]


def _operation(about: Operation | str, names: _Names) -> list[Any] | str:
    if isinstance(about, str):
        return about
    action = about.action
    message = -1 if about.message is None else names.messages[about.message]
    return [about.verb.value, action.kind.value, action.chunk, action.microbatch_index, about.until, message]


def _message(message: Message) -> list[Any]:
    return [
        message.cargo.value,
        int(message.is_gradient),
        message.from_chunk,
        message.to_chunk,
        list(message.layers),
        message.num_bytes,
    ]


# ---- tables


def _rank(profile: Profile, timelines: Sequence[StepTimeline], rank: RankAccount) -> dict[str, Any]:
    return {
        "rank": rank.rank,
        "stage": rank.stage,
        "place": str(profile.plan.layout.coordinate(rank.rank)),
        "host": rank.host,
        "step": _us(rank.step_seconds),
        "seconds": [_us(rank.seconds[cause]) for cause in _CAUSES],
        "backward": _us(_backward_seconds(timelines, rank.rank)),  # of computing
        "without_core": _us(rank.without_core),
    }


def _backward_seconds(timelines: Sequence[StepTimeline], rank: int) -> float:
    return fmean(sum(piece.seconds for piece in timeline.pieces[rank] if _is_backward(piece)) for timeline in timelines)


def _is_backward(piece: Piece) -> bool:
    if piece.cause is not Cause.COMPUTE or not isinstance(piece.about, Operation):
        return False
    return piece.about.action.kind is Kind.BACKWARD


def _boundary(boundary: BoundaryAccount) -> dict[str, Any]:
    return {
        "name": boundary.name,
        "direction": boundary.direction,
        "planned": boundary.planned_bytes,
        "sent": boundary.sent_bytes,
        "busy": _us(boundary.busy),
        "transfer": _us(boundary.transfer),
        "exposed": _us(boundary.exposed),
        "hidden": round(boundary.hidden_share, 4),
        "rate": round(boundary.bytes_per_second),
        "measured": None if boundary.measured is None else round(boundary.measured.bytes_per_second),
        "exposed_by": sorted(((_us(seconds), what) for what, seconds in boundary.exposed_by.items()), reverse=True),
    }


def _circumstances(profile: Profile) -> Iterator[tuple[str, str]]:
    plan, config = profile.plan, profile.plan.config
    model = config.model
    yield "layout", f"{plan.layout}, {plan.virtual_stages} {'chunks' if plan.virtual_stages > 1 else 'chunk'} a stage"
    yield "model", f"{model.num_layers} layers, hidden size {model.hidden_size}, {model.num_heads} heads"
    yield "pattern", plan.transfer.pattern.name
    yield "policy", config.depth.policy
    yield "schedule", f"{plan.schedule}, {plan.num_microbatches} microbatches"
    yield "warm-up", "the schedule's own" if plan.warmup is None else f"{plan.warmup} forwards on the first stage"
    yield (
        "sequences",
        f"{config.data.global_batch_size} a step of {config.data.seq_length:,} tokens, {config.run.dtype}",
    )
    yield "steps", f"{profile.steps[0]} to {profile.steps[-1]}, {_recorded(profile)}"
    yield "devices", "; ".join(_devices(profile))
    error, drift = 1e6 * profile.clock_error_seconds, 1e6 * profile.largest_drift
    yield (
        "clocks",
        f"off by {error:,.1f} µs at most, drifting by {drift:,.2f} µs a second" if error else "one for all ranks",
    )


def _recorded(profile: Profile) -> str:
    first = profile.ranks[0]
    began = datetime.fromtimestamp((first.steps[0].marks[0] + first.epoch_ns) / 1e9, timezone.utc)
    return began.strftime("%Y-%m-%d %H:%M:%S UTC")


def _devices(profile: Profile) -> Iterator[str]:
    """By kind of device, and where it is the CPU what a host has for its ranks."""
    counts: dict[tuple[str, int | None, int], set[str]] = {}
    for record in profile.ranks:
        counts.setdefault((record.device, record.cores, record.threads), set()).add(record.host)
    for (device, cores, threads), hosts in counts.items():
        on = f"{len(hosts)} hosts" if len(hosts) > 1 else f"host {next(iter(hosts))}"
        of_cpu = "" if cores is None else f" with {cores} cores, {threads} thread{'s' if threads > 1 else ''} a rank"
        yield f"{device} on {on}{of_cpu}"
