"""Who holds up the others: a judgement of all ranks' heartbeats. Pure: reads no file and no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lime_dist.layout import Coordinate, Layout
from lime_dist.lifecycle.heartbeat import Heartbeat
from lime_dist.lifecycle.pulse import Pass


@dataclass(frozen=True, kw_only=True)
class Cause:
    """What made all of them stand still. rank: the one to name where only one can be."""

    rank: int
    text: str


def find_cause(layout: Layout, heartbeats: Sequence[Heartbeat | None], now: float, stale_after: float) -> Cause:
    """The rank, the boundary or the group of ranks that fell silent, as far as heartbeats can tell.

    Where a stage awaits what its neighbour has sent, neither rank is at fault but what lies between them. Ranks that have
    done equally much and are all alive wait for each other: clocks would name one of them at random.
    """
    rank = first_silent(heartbeats, now, stale_after)
    first = heartbeats[rank]
    if first is not None and not is_stale(first, now, stale_after):
        if (link := _silent_link(layout, heartbeats)) is not None:
            return Cause(rank=link[1].global_rank, text=f"silent: {_describe_link(*link)}")
        equals = [beat for beat in heartbeats if beat is not None and _is_level(beat, first, now, stale_after)]
        if len(equals) > 1:
            return Cause(rank=rank, text=f"silent: {_describe_equals(layout, equals)}")
    return Cause(rank=rank, text=f"first silent: {describe_silence(layout, heartbeats, rank, now, stale_after)}")


def _silent_link(layout: Layout, heartbeats: Sequence[Heartbeat | None]) -> tuple[Heartbeat, Heartbeat] | None:
    """(sender, receiver) of a message that was sent and has not come."""
    for receiver in filter(None, heartbeats):
        if receiver.awaits is None or receiver.awaited is None:
            continue
        chunk = receiver.awaited.chunk
        sends = chunk + {"forward": -1, "backward": 1}[receiver.awaits]
        sender = heartbeats[_global_rank(layout, sends, receiver.coordinate)]
        if sender is not None and _passes(sender, receiver.awaits, sends) > _passes(receiver, receiver.awaits, chunk):
            return sender, receiver
    return None


def _global_rank(layout: Layout, chunk: int, place: Coordinate) -> int:
    """That has the chunk, in the replica and with the tensor share of `place`; with virtual stages chunks go round."""
    holder = Coordinate(pp_rank=chunk % layout.pp, dp_rank=place.dp_rank, tp_rank=place.tp_rank)
    return layout.global_rank(holder)


def _passes(heartbeat: Heartbeat, kind: str, chunk: int) -> int:
    return heartbeat.passes.get(kind, {}).get(chunk, 0)


def _describe_link(sender: Heartbeat, receiver: Heartbeat) -> str:
    assert receiver.awaits is not None and receiver.awaited is not None  # it awaits what the sender has sent
    ends = sorted((sender, receiver), key=lambda beat: beat.coordinate.pp_rank)
    where = " and ".join(f"stage {beat.coordinate.pp_rank} on {beat.host}" for beat in ends)
    ranks = " and ".join(str(beat.global_rank) for beat in ends)
    awaited = f"{receiver.awaits} of {_named(receiver, receiver.awaits, receiver.awaited)}"
    return f"between {where} ({awaited}, step {receiver.step}, ranks {ranks}); sent, and it has not come"


def _named(heartbeat: Heartbeat, kind: str, which: Pass) -> str:
    """The pass; of which chunk where the rank has several."""
    has_several = len(heartbeat.passes.get(kind, {})) > 1
    return f"microbatch {which.microbatch}" + (f" in chunk {which.chunk}" if has_several else "")


def _is_level(one: Heartbeat, other: Heartbeat, now: float, stale_after: float) -> bool:
    return _order(one, now, stale_after)[:-1] == _order(other, now, stale_after)[:-1]


def _describe_equals(layout: Layout, equals: Sequence[Heartbeat]) -> str:
    hosts = ", ".join(dict.fromkeys(beat.host for beat in equals))
    first = min(equals, key=lambda beat: beat.moved)
    state = "inside of it" if first.busy else "behind it"
    return (
        f"{_who_of(layout, equals)} on {hosts}, since {_doing(first)}; all alive and {state}: "
        "one of them hangs there, or a link between them is down"
    )


def _who_of(layout: Layout, equals: Sequence[Heartbeat]) -> str:
    if len(equals) == layout.world_size:
        return "all ranks"
    stages = {beat.coordinate.pp_rank for beat in equals}
    replicas = {beat.coordinate.dp_rank for beat in equals}
    ranks = ", ".join(str(beat.global_rank) for beat in equals)
    if len(stages) > 1:
        return f"among ranks {ranks}"
    group = "tensor ranks" if len(replicas) == 1 else "ranks"
    return f"among the {group} of stage {min(stages)} ({ranks})"


def first_silent(heartbeats: Sequence[Heartbeat | None], now: float, stale_after: float) -> int:
    """The global rank that most likely made all of them stand still.

    heartbeats: by global rank, None for one that never wrote. First come those that write no more (for
    `stale_after` seconds before `now`), then those that await no neighbour, and of these the one that has finished the least
    work; of equals the one inside of a piece, as the others have finished theirs and wait. Clocks decide last, since those
    of hosts differ.
    """
    return min(range(len(heartbeats)), key=lambda rank: _order(heartbeats[rank], now, stale_after))


def _order(heartbeat: Heartbeat | None, now: float, stale_after: float) -> tuple[bool, bool, int, bool, float]:
    if heartbeat is None:
        return False, False, -1, False, 0.0
    if heartbeat.ended and heartbeat.phase == "leave":  # as one does behind all work
        return True, False, heartbeat.done + 1, True, heartbeat.moved
    if is_stale(heartbeat, now, stale_after):
        return False, False, heartbeat.done, not heartbeat.busy, heartbeat.moved
    return True, heartbeat.awaits is not None, heartbeat.done, not heartbeat.busy, heartbeat.moved


def is_stale(heartbeat: Heartbeat, now: float, stale_after: float) -> bool:
    """Whether the rank shows no sign of life: it has left, is stopped, or its host is gone."""
    return heartbeat.ended or now - heartbeat.alive > stale_after


def find_died(before: Sequence[Heartbeat | None], after: Sequence[Heartbeat | None]) -> Heartbeat | None:
    """Of two readings some heartbeats apart: a rank that wrote none in between and has not left. No clock is asked."""
    pairs = zip(before, after, strict=True)
    return next((new for old, new in pairs if old and new and not new.ended and old.alive == new.alive), None)


def who(layout: Layout, rank: int) -> str:
    return f"rank {rank} ({layout.coordinate(rank)})"


def last_known(heartbeat: Heartbeat) -> str:
    """Where the rank is and what it last did: `on n2, stage 1, since step 41 forward microbatch 2`."""
    return f"on {heartbeat.host}, stage {heartbeat.coordinate.pp_rank}, since {_doing(heartbeat)}"


def _doing(heartbeat: Heartbeat) -> str:
    which = "" if heartbeat.at is None else f" {_named(heartbeat, heartbeat.phase, heartbeat.at)}"
    return f"step {heartbeat.step} {heartbeat.phase}{which}"


def describe_silence(
    layout: Layout, heartbeats: Sequence[Heartbeat | None], rank: int, now: float, stale_after: float
) -> str:
    """`rank` and what can be told of its silence, on one line."""
    heartbeat = heartbeats[rank]
    if heartbeat is None:
        return f"{who(layout, rank)}, stage {layout.coordinate(rank).pp_rank}, which never began"
    return f"{who(layout, rank)} {last_known(heartbeat)}; {_state(heartbeat, now, stale_after)}"


def _state(heartbeat: Heartbeat, now: float, stale_after: float) -> str:
    if heartbeat.ended:
        return "it has left"
    if is_stale(heartbeat, now, stale_after):
        return f"no sign of life for {now - heartbeat.alive:.0f} s: stopped, or its host is gone"
    return "alive, and inside of it" if heartbeat.busy else "alive, and waits behind it"
