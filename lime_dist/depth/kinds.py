"""The kinds of depth routing that there are, by the config's keys that select them. Pure data."""

from __future__ import annotations

from dataclasses import fields

from lime_dist.depth.hidden import HIDDEN_AVERAGE, HIDDEN_DYNAMIC, HIDDEN_STATIC
from lime_dist.depth.key_value import KEY_VALUE, KEY_VALUE_AVERAGE
from lime_dist.depth.routing import Routing

ROUTINGS: dict[tuple[str, str], Routing] = {  # (depth.entry, depth.router); an entry's first router is its usual one
    ("kv", "static"): KEY_VALUE,
    ("hidden", "static"): HIDDEN_STATIC,
    ("hidden", "dynamic"): HIDDEN_DYNAMIC,
    ("kv", "average"): KEY_VALUE_AVERAGE,
    ("hidden", "average"): HIDDEN_AVERAGE,
}


def entries_with(router: str | None = None) -> tuple[str, ...]:
    """The values of `depth.entry`, or those that `router` goes with."""
    return tuple(dict.fromkeys(entry for entry, other in ROUTINGS if router in (None, other)))


def routers_of(entry: str | None = None) -> tuple[str, ...]:
    """The values of `depth.router` besides none, or those that go with `entry`."""
    return tuple(dict.fromkeys(router for other, router in ROUTINGS if entry in (None, other)))


OPTIONS = ("router_init", "heads", "head_top_p")  # the keys of `depth` that only some kinds take


def options_of(kind: Routing) -> tuple[str, ...]:
    """Those of `OPTIONS` that `kind` takes."""
    return tuple(field.name for field in fields(kind))
