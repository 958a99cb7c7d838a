"""What routing costs in operations. Pure data."""

from __future__ import annotations

from lime_dist.config import ModelConfig
from lime_dist.depth.routing import Routing
from lime_dist.plan.transfer import ChunkTransfer


def routing_flops_per_token(model: ModelConfig, transfer: ChunkTransfer) -> int:
    """Forward, over the whole tensor group: what a chunk adds to its own readers' sums and to partial sums.

    n sources of one reader are a product [H_kv, n * source heads] x [n * source heads, elements of each] a token
    (arXiv 2502.09245v2, eq. 3), two operations for each of its multiply-adds. A dynamic router's weights are a
    product of their own.
    """
    routing = transfer.pattern.routing
    source_heads, elements = routing.entry_shape(
        rows=1, hidden_size=model.hidden_size, num_kv_heads=model.kv_heads, head_dim=model.head_dim
    )
    if routing is Routing.HIDDEN_DYNAMIC:
        elements += model.hidden_size
    num_reads = sum(len(sources) for sources in transfer.reads.values())
    return 2 * num_reads * model.kv_heads * source_heads * elements
