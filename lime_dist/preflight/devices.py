"""The devices of this machine against the ranks that are to start on it. No collective."""

from __future__ import annotations

import torch

from lime_dist.config import Config
from lime_dist.errors import LayoutError


def check_devices(config: Config) -> None:
    """For ranks started on this machine. Raises: LayoutError."""
    available = torch.cuda.device_count()
    wanted = config.layout.world_size
    if config.run.device == "cuda" and available < wanted:
        raise LayoutError(
            f"run.device: cuda, {wanted} ranks, but {available} GPUs here; set run.device=cpu or a smaller layout"
        )
    if config.run.device == "auto" and 0 < available < wanted:
        raise LayoutError(
            f"run.device: auto, {wanted} ranks, but {available} GPUs here; set run.device=cpu or a smaller layout"
        )
