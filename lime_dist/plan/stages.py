"""What one stage does and what crosses its boundaries, with sizes. Pure data: the one place that knows them.

The executor, the transport, the stage table and the tests read it; nobody computes it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lime_dist.config import Config
from lime_dist.depth.routing import Routing
from lime_dist.plan.schedule import Action, peak_in_flight, plan_schedule
from lime_dist.plan.transfer import ChunkTransfer, HopPlan, TransferPlan, plan_transfer

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

    def bundle_bytes(self, boundary: HopPlan) -> int:
        return (
            self.residual_bytes
            + len(boundary.raw_entries) * self.entry_bytes
            + len(boundary.partial_sums) * self.sum_bytes
        )


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Everything that one stage of the pipeline is to do."""

    stage_index: int
    num_stages: int
    layers: range
    transfer: ChunkTransfer
    previous_layers_start: int  # first layer of the stage before; 0 on the first stage
    actions: tuple[Action, ...]
    shape: BundleShape

    @property
    def is_first_stage(self) -> bool:
        return self.stage_index == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage_index == self.num_stages - 1

    @property
    def received_entries(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Entries that the stage before passes on, and those that it makes: a message each."""
        return _split(self.transfer.received.raw_entries, self.previous_layers_start)

    @property
    def sent_entries(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Entries that this stage passes on, which leave before it computes, and those that it makes."""
        return _split(self.transfer.sent.raw_entries, self.layers.start)

    @cached_property
    def peak_in_flight(self) -> int:
        return peak_in_flight(list(self.actions))

    @property
    def held_bytes(self) -> int:
        """Entries that one microbatch keeps on this stage between its forward and its backward pass."""
        own = len(self.transfer.own_entries(self.layers)) + len(self.transfer.own_blocks(self.layers))
        return (len(self.transfer.received.raw_entries) + own) * self.shape.entry_bytes

    @property
    def received_bytes(self) -> int:
        """Of one microbatch, forward."""
        return 0 if self.is_first_stage else self.shape.bundle_bytes(self.transfer.received)

    @property
    def sent_bytes(self) -> int:
        """Of one microbatch, forward; as many come back as gradients."""
        return 0 if self.is_last_stage else self.shape.bundle_bytes(self.transfer.sent)


def _split(layers: tuple[int, ...], first_own: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(layer for layer in layers if layer < first_own), tuple(layer for layer in layers if layer >= first_own)


def plan_run_transfer(config: Config, policy: str | None = None) -> TransferPlan:
    """The transfer plan of a checked config, by its own policy or another."""
    return plan_transfer(
        config.pattern,
        config.stages,
        policy=policy or config.depth.policy,
        boundary_cost=config.pipeline.boundary_cost,
        sum_cost=DTYPE_BYTES[config.partial_sum_dtype] // DTYPE_BYTES[config.run.dtype],
    )


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


def plan_stages(config: Config) -> tuple[StagePlan, ...]:
    """The plan of every stage of a checked config."""
    stages, transfer, shape = config.stages, plan_run_transfer(config), plan_shape(config)
    return tuple(
        StagePlan(
            stage_index=index,
            num_stages=len(stages),
            layers=layers,
            transfer=transfer.chunk(index),
            previous_layers_start=stages[index - 1].start if index else 0,
            actions=tuple(
                plan_schedule(
                    config.pipeline.schedule,
                    stage_index=index,
                    num_stages=len(stages),
                    num_microbatches=config.pipeline.num_microbatches,
                )
            ),
            shape=shape,
        )
        for index, layers in enumerate(stages)
    )
