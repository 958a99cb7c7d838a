"""Who holds up the others: a judgement of all ranks' heartbeats. Pure: reads no file and no clock."""

from __future__ import annotations

from collections.abc import Sequence

from lime_dist.layout import Layout
from lime_dist.watch.heartbeat import Heartbeat


def first_silent(heartbeats: Sequence[Heartbeat | None], now: float, stale_after: float) -> int:
    """The global rank that most likely made all of them stand still.

    heartbeats: by global rank, None for one that never wrote. First come those that write no more (for
    `stale_after` seconds before `now`), then the one that has finished the least work; of equals the one inside of a piece,
    as the others have finished theirs and wait. Clocks decide last, since those of hosts differ. Of tensor ranks
    that wait for each other inside of a layer it is one that is named: they are of one stage and mostly of one host.
    """
    return min(range(len(heartbeats)), key=lambda rank: _order(heartbeats[rank], now, stale_after))


def _order(heartbeat: Heartbeat | None, now: float, stale_after: float) -> tuple[bool, int, bool, float]:
    if heartbeat is None:
        return False, -1, False, 0.0
    return not is_stale(heartbeat, now, stale_after), heartbeat.done, not heartbeat.busy, heartbeat.moved


def is_stale(heartbeat: Heartbeat, now: float, stale_after: float) -> bool:
    """Whether the rank shows no sign of life: it has left, is stopped, or its host is gone."""
    return heartbeat.ended or now - heartbeat.alive > stale_after


def who(layout: Layout, rank: int) -> str:
    return f"rank {rank} ({layout.coordinate(rank)})"


def last_known(heartbeat: Heartbeat) -> str:
    """Where the rank is and what it last did: `on n2, stage 1, since step 41 forward microbatch 2`."""
    microbatch = "" if heartbeat.microbatch is None else f" microbatch {heartbeat.microbatch}"
    stage = heartbeat.coordinate.pp_rank
    return f"on {heartbeat.host}, stage {stage}, since step {heartbeat.step} {heartbeat.phase}{microbatch}"


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
