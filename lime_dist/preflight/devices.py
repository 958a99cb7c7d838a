"""The devices of this machine against the ranks that are to start on it. No collective. Leaves CUDA as it is where it can."""

from __future__ import annotations

import torch

from lime_dist.config import Config
from lime_dist.errors import LayoutError


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
