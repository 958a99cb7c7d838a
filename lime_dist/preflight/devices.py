"""The devices of this machine against the ranks that are to start on it. No collective. Leaves CUDA as it is where it can."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import psutil
import torch

from lime_dist.config import Config
from lime_dist.errors import LayoutError
from lime_dist.formats import format_bytes
from lime_dist.plan.memory import MemoryEstimate
from lime_dist.plan.run_plan import RunPlan

_SMALLER = "lower data.seq_length or data.micro_batch_size (or raise pipeline.num_microbatches), or raise parallel.pp or parallel.tp"


def count_gpus() -> int:
    """torch asks the driver's management library first; only where that fails it initialises CUDA in this process."""
    return torch.cuda.device_count()


def needs_fresh_interpreters(config: Config, num_gpus: int) -> bool:
    """Whether local ranks may use CUDA, which a fork of a process that has asked for it cannot."""
    return config.run.device == "cuda" or (config.run.device == "auto" and num_gpus > 0)


def check_devices(config: Config) -> None:
    """For ranks started on this machine. Raises: LayoutError."""
    if config.run.device == "cpu":
        return
    available = count_gpus()
    wanted = config.layout.world_size
    if config.run.device == "cuda" and available < wanted:
        raise LayoutError(
            f"run.device: cuda, {wanted} ranks, but {available} GPUs here; set run.device=cpu or a smaller layout"
        )
    if config.run.device == "auto" and 0 < available < wanted:
        raise LayoutError(
            f"run.device: auto, {wanted} ranks, but {available} GPUs here; set run.device=cpu or a smaller layout"
        )


def check_memory(plan: RunPlan) -> str | None:
    """A warning where the ranks that are to start here may not fit its memory. An evaluation needs no more than training.

    Raises: LayoutError where they cannot.
    """
    if plan.config.run.device == "cpu" or torch.cuda.device_count() == 0:
        memory = psutil.virtual_memory()
        return compare_memory(
            [all_ranks_bytes(plan)], memory.total, memory.available, "all ranks need", "this machine has"
        )
    sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(torch.cuda.device_count())]
    needs = [stage.total_bytes for stage in plan.memory]
    return compare_memory(needs, min(sizes), min(sizes), "a rank needs", "its GPU has")


def all_ranks_bytes(plan: RunPlan) -> int:
    """What the tensors of all ranks take on CPUs, by the estimate."""
    on_cpu = dataclasses.replace(plan.config, run=dataclasses.replace(plan.config.run, device="cpu"))
    of_stages = MemoryEstimate(on_cpu, plan.chunks).of(plan.stages)
    return plan.layout.tp * plan.layout.dp * sum(stage.total_bytes for stage in of_stages)


def compare_memory(needs: Sequence[int], total: int, available: int, who: str, where: str) -> str | None:
    """A warning where the largest of `needs` is above `available`. Raises: LayoutError where it is above `total`."""
    need = max(needs)
    if need > total:
        raise LayoutError(f"memory: {who} about {format_bytes(need)}, {where} {format_bytes(total)}; {_SMALLER}")
    if need > available:
        return f"memory: {who} about {format_bytes(need)}, {where} {format_bytes(available)} free; {_SMALLER}"
    return None
