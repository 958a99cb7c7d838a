"""A config's ranks on this machine: how many, what each is called, and how they have to begin for its device."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from lime_dist.lifecycle.launcher import launch_kernels_in_order, warn
from lime_dist.lifecycle.local import run_local
from lime_dist.plan.run_plan import RunPlan
from lime_dist.preflight import devices


def run_local_ranks(
    function: Callable[..., Any],
    plan: RunPlan,
    *args: Any,
    shared_import: str | None = None,
    timeout: timedelta | None = None,
) -> list[Any]:
    """`function(plan.config, *args)` on every rank of the layout; results by rank.

    function: a module's own, which plans again, as a plan cannot go to another interpreter; arguments and results are what `wire` can pack. shared_import: a module that
    `function` imports slowly; forks get it from this process. Raises: LayoutError, and as `run_local`.
    """
    config = plan.config
    devices.check_devices(config)
    warn(filter(None, [devices.check_memory(plan)]))
    fresh = devices.needs_fresh_interpreters(config, devices.count_gpus())
    layout = config.layout
    if fresh:
        launch_kernels_in_order(layout)
    ranks = "1 local rank" if layout.world_size == 1 else f"{layout.world_size} local ranks"
    print(f"starting {ranks}: {layout}", file=sys.stderr, flush=True)
    if shared_import is not None and not fresh:
        importlib.import_module(shared_import)
    return run_local(
        function,
        layout.world_size,
        config,
        *args,
        timeout=timeout,
        describe=lambda rank: str(layout.coordinate(rank)),
        fresh=fresh,
    )
