"""The kinds of depth routing that there are, by the config's keys that select them. Pure data."""

from __future__ import annotations

from lime_dist.depth.hidden import HIDDEN_DYNAMIC, HIDDEN_STATIC
from lime_dist.depth.key_value import KEY_VALUE
from lime_dist.depth.routing import Routing

ROUTINGS: dict[tuple[str, str], Routing] = {  # (depth.entry, depth.router); an entry's first router is its usual one
    ("kv", "static"): KEY_VALUE,
    ("hidden", "static"): HIDDEN_STATIC,
    ("hidden", "dynamic"): HIDDEN_DYNAMIC,
}


def entries_with(router: str | None = None) -> tuple[str, ...]:
    """The values of `depth.entry`, or those that `router` goes with."""
    return tuple(dict.fromkeys(entry for entry, other in ROUTINGS if router in (None, other)))


def routers_of(entry: str | None = None) -> tuple[str, ...]:
    """The values of `depth.router` besides none, or those that go with `entry`."""
    return tuple(dict.fromkeys(router for other, router in ROUTINGS if entry in (None, other)))
