"""What each way of each boundary carries alone, before steps are recorded, to have something to compare them with."""

from __future__ import annotations

import torch
import torch.distributed as dist

from lime_dist.backends.megatron import Groups
from lime_dist.plan.run_plan import RunPlan
from lime_dist.preflight.fabric import time_crossings
from lime_dist.profiling.profile_files import MeasuredLink


def measure_links(groups: Groups, plan: RunPlan, device: torch.device) -> tuple[MeasuredLink, ...]:
    """Of the slowest pair of ranks each. Collective: world."""
    num_boundaries, num_stages = len(plan.boundary_bytes), len(plan.stages)
    slowest = torch.full((2, num_boundaries), float("inf"), dtype=torch.float64, device=device)
    for crossing in time_crossings(groups, plan, device):
        slowest[int(crossing.direction == "backward"), crossing.boundary] = crossing.bytes_per_second
    dist.all_reduce(slowest, op=dist.ReduceOp.MIN)
    forward, backward = slowest.tolist()
    ways = [(boundary, (boundary + 1) % num_stages) for boundary in range(num_boundaries)]
    return tuple(
        MeasuredLink(from_stage=sender, to_stage=receiver, bytes_per_second=speed)
        for (one, other), *speeds in zip(ways, forward, backward, strict=True)
        for (sender, receiver), speed in zip(((one, other), (other, one)), speeds, strict=True)
    )
