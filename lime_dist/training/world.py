"""The ranks of a run: their device, their process groups. Apart from the step that they make. Collective: world."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from lime_dist.backends.megatron import Groups, create_groups
from lime_dist.config import Config
from lime_dist.errors import LayoutError
from lime_dist.lifecycle.launcher import Place
from lime_dist.lifecycle.network import choose_interfaces
from lime_dist.lifecycle.rendezvous import open_store

WATCHDOG_MARGIN = timedelta(seconds=60)  # the groups' timeouts are longer by this: the watchdog names the cause


def join_world(
    config: Config,
    place: Place,
    store: dist.Store | None = None,
    compare: Callable[[Config, torch.device], None] = lambda config, device: None,
) -> tuple[Groups, torch.device]:
    """Take this process's place among the ranks. Collective: world.

    store: where they have met already. compare: called as soon as ranks can talk, before they make groups by a layout
    that may not be the same on all of them.
    """
    device = pick_device(config, place.local_rank)
    timeout = _timeout(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    choose_interfaces(place)
    if store is None:
        store = open_store(place, timeout, wait_for_all=True)
    store.set_timeout(timeout)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("groups", store),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timeout,
    )
    compare(config, device)
    ring = config.parallel.virtual_stages > 1
    return create_groups(config.layout, device, timeout, ring=ring), device


def open_writers_group(config: Config) -> dist.ProcessGroup:
    """For what threads beside training tell one another: on the CPU, and away from what the ranks do meanwhile. Collective: world."""
    return dist.new_group(backend="gloo", timeout=_timeout(config))


def _timeout(config: Config) -> timedelta:
    return timedelta(seconds=config.run.timeout_seconds) + WATCHDOG_MARGIN


def pick_device(config: Config, local_rank: int) -> torch.device:
    """Raises: LayoutError when run.device asks for GPUs that are not there."""
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.run.device == "cpu" or (config.run.device == "auto" and not available):
        return torch.device("cpu")
    index = pick_gpu(local_rank, available)
    if index >= available:
        raise LayoutError(
            f"run.device: {config.run.device} with {available} GPUs here, this is local rank {local_rank}; "
            "start as many ranks as there are GPUs, or set run.device=cpu"
        )
    return torch.device("cuda", index)


def pick_gpu(local_rank: int, visible: int, environment: Mapping[str, str] = os.environ) -> int:
    """The index of this rank's GPU among those that it sees.

    SLURM may show each task its own one only (--gpus-per-task, --gpu-bind): then the job has more GPUs on this host.
    """
    is_own = visible == 1 and int(environment.get("SLURM_GPUS_ON_NODE") or 0) > 1
    return 0 if is_own else local_rank
