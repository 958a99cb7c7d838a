"""Sizes of what crosses a hop. Pure data."""

from __future__ import annotations

from dataclasses import dataclass

from lime_dist.config import Config
from lime_dist.depth.routing import Routing
from lime_dist.plan.transfer import HopPlan

DTYPE_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class BundleShape:
    """Sizes of one microbatch's tensors on one tensor rank, which holds 1/tp of the tokens (rounded up).

    min_message_bytes: what a message must have to leave without waiting for the next.
    """

    rows: int
    hidden_size: int
    routing: Routing
    entry_elements: int
    element_bytes: int
    sum_element_bytes: int
    min_message_bytes: int

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
    rows = (tokens + tp - 1) // tp
    heads, row_size = config.depth.routing.entry_shape(config.model, rows)
    return BundleShape(
        rows=rows,
        hidden_size=config.model.hidden_size,
        routing=config.depth.routing,
        entry_elements=heads * row_size,
        element_bytes=DTYPE_BYTES[config.run.dtype],
        sum_element_bytes=DTYPE_BYTES[config.partial_sum_dtype],
        min_message_bytes=config.pipeline.min_message_bytes or 0,
    )
