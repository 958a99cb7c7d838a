"""What ranks tell one another besides tensors: small values as JSON, over a process group.

Not `torch.distributed`'s object collectives: they unpickle what other processes send.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist


def gather(value: Any, device: torch.device, group: dist.ProcessGroup | None = None) -> list[Any]:
    """The JSON value of every rank, by global rank. group: of all ranks, other than the default one. Collective: world."""
    text = json.dumps(value).encode()
    payload = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(text)], device=device), group)
    longest = max(int(size) for size in sizes)
    payloads = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in sizes]
    dist.all_gather(payloads, torch.nn.functional.pad(payload, (0, longest - len(text))), group)
    return [json.loads(bytes(found[: int(size)].tolist())) for found, size in zip(payloads, sizes, strict=True)]


def tell_all(value: Any, device: torch.device) -> Any:
    """Rank 0's JSON value, on every rank; what the others pass does not count. Collective: world."""
    return gather(value if dist.get_rank() == 0 else None, device)[0]
