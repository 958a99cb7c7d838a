"""What torch.profiler sees of one rank's recorded steps: each operator, each kernel."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from lime_dist.profiling.profile_files import kernels_file


class KernelTrace:
    """Records from when it is made."""

    def __init__(self, device: torch.device):
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities += [ProfilerActivity.CUDA]
        self._profile = profile(activities=activities)
        self._profile.start()

    def stop(self) -> None:
        self._profile.stop()

    def write(self, folder: Path, rank: int) -> None:
        path = kernels_file(folder, rank)
        unfinished = path.with_name(f"unfinished_{path.name}")  # torch compresses what ends with .gz
        self._profile.export_chrome_trace(str(unfinished))
        os.replace(unfinished, path)
