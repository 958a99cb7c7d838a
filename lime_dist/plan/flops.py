"""What routing costs in operations. Pure data."""

from __future__ import annotations

from lime_dist.config import ModelConfig
from lime_dist.plan.transfer import ChunkTransfer


def routing_flops_per_token(model: ModelConfig, transfer: ChunkTransfer) -> int:
    """Forward, over the whole tensor group: what a chunk adds to its own readers' sums and to partial sums."""
    num_reads = sum(len(sources) for sources in transfer.reads.values())
    return num_reads * transfer.pattern.routing.read_flops(model)
