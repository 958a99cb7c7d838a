"""Sizes of what crosses a hop. Pure data."""

from __future__ import annotations

from dataclasses import dataclass

from lime_dist.config import Config
from lime_dist.depth.routing import Routing
from lime_dist.plan.transfer import HopPlan

DTYPE_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class BundleShape:
    """Sizes of one microbatch's tensors on one tensor rank, which holds 1/tp of the tokens (rounded up)."""

    rows: int
    hidden_size: int
    num_kv_heads: int
    head_dim: int
    element_bytes: int
    sum_element_bytes: int
    routing: Routing = Routing.KEY_VALUE

    @property
    def entry_elements(self) -> int:
        """K and V of all KV heads, or the normalised hidden state."""
        heads, row_size = self.routing.entry_shape(
            rows=self.rows, hidden_size=self.hidden_size, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim
        )
        return heads * row_size

    @property
    def residual_bytes(self) -> int:
        return self.rows * self.hidden_size * self.element_bytes

    @property
    def entry_bytes(self) -> int:
        return self.entry_elements * self.element_bytes

    @property
    def sum_bytes(self) -> int:
        return self.entry_elements * self.sum_element_bytes

    def bundle_bytes(self, hop: HopPlan) -> int:
        return self.residual_bytes + len(hop.raw_entries) * self.entry_bytes + len(hop.partial_sums) * self.sum_bytes


def plan_shape(config: Config) -> BundleShape:
    tokens, tp = config.microbatch_size * config.data.seq_length, config.parallel.tp
    return BundleShape(
        rows=(tokens + tp - 1) // tp,
        hidden_size=config.model.hidden_size,
        num_kv_heads=config.model.kv_heads,
        head_dim=config.model.head_dim,
        element_bytes=DTYPE_BYTES[config.run.dtype],
        sum_element_bytes=DTYPE_BYTES[config.partial_sum_dtype],
        routing=config.depth.routing,
    )
