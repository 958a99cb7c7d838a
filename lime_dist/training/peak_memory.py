"""The most memory that this process has had so far, as its device counts it."""

from __future__ import annotations

import resource

import torch

# Of a GPU what torch's allocator gave to tensors; of the CPU all that the process had resident, its code too.
_NAMES = {"cuda": "peak_allocated_bytes", "cpu": "peak_resident_bytes"}
PEAKS = tuple(_NAMES.values())


def peak_name(device: torch.device) -> str:
    """What `peak_bytes` counts, in a word."""
    return _NAMES[device.type]


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
