"""What one stage does and what crosses its boundaries, with sizes. Pure data: the one place that knows them.

The executor, the transport, the stage table and the tests read it; nobody computes it again.
"""

from __future__ import annotations

from dataclasses import dataclass

from lime_dist.config import Config
from lime_dist.depth.transfer import TransferPlan, plan_relay
from lime_dist.pipeline.schedule import Action, peak_in_flight, plan_schedule

DTYPE_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class BundleShape:
    """Sizes of one microbatch's tensors on one tensor rank, which holds 1/tp of the tokens (rounded up)."""

    rows: int
    hidden_size: int
    num_kv_heads: int
    head_dim: int
    element_bytes: int

    @property
    def row_size(self) -> int:
        """Elements of an entry behind its heads axis: K and V."""
        return 2 * self.rows * self.head_dim

    @property
    def residual_bytes(self) -> int:
        return self.rows * self.hidden_size * self.element_bytes

    @property
    def entry_bytes(self) -> int:
        return self.num_kv_heads * self.row_size * self.element_bytes

    def bundle_bytes(self, num_entries: int) -> int:
        return self.residual_bytes + num_entries * self.entry_bytes


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Everything that one stage of the pipeline is to do."""

    stage_index: int
    num_stages: int
    layers: range
    received: tuple[int, ...]
    sent: tuple[int, ...]
    memory_layers: tuple[int, ...]  # received entries and those that the stage makes, ascending
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
    def received_parts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Entries that the stage before passes on, and those that it makes: a message each."""
        return _split(self.received, self.previous_layers_start)

    @property
    def sent_parts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Entries that this stage passes on, which leave before it computes, and those that it makes."""
        return _split(self.sent, self.layers.start)

    @property
    def peak_in_flight(self) -> int:
        return peak_in_flight(list(self.actions))

    @property
    def received_bytes(self) -> int:
        """Of one microbatch, forward."""
        return 0 if self.is_first_stage else self.shape.bundle_bytes(len(self.received))

    @property
    def sent_bytes(self) -> int:
        """Of one microbatch, forward; as many come back as gradients."""
        return 0 if self.is_last_stage else self.shape.bundle_bytes(len(self.sent))


def _split(layers: tuple[int, ...], first_own: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(layer for layer in layers if layer < first_own), tuple(layer for layer in layers if layer >= first_own)


def plan_transfer(config: Config) -> TransferPlan:
    return plan_relay(config.pattern, config.stages)


def plan_shape(config: Config) -> BundleShape:
    tokens, tp = config.microbatch_size * config.data.seq_length, config.parallel.tp
    return BundleShape(
        rows=(tokens + tp - 1) // tp,
        hidden_size=config.model.hidden_size,
        num_kv_heads=config.model.kv_heads,
        head_dim=config.model.head_dim,
        element_bytes=DTYPE_BYTES[config.run.dtype],
    )


def plan_stages(config: Config) -> tuple[StagePlan, ...]:
    """The plan of every stage of a checked config."""
    stages, pattern, transfer, shape = config.stages, config.pattern, plan_transfer(config), plan_shape(config)
    return tuple(
        StagePlan(
            stage_index=index,
            num_stages=len(stages),
            layers=layers,
            received=transfer.received(index),
            sent=transfer.sent(index),
            memory_layers=transfer.received(index) + tuple(filter(pattern.is_entry, layers)),
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
