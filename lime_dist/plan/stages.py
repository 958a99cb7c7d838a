"""What each stage and each of its chunks does, and what crosses the hops, with sizes. Pure data.

With virtual stages, stage r of P holds chunks r, r + P, ...; hop c leads from chunk c to chunk c + 1, over boundary
c mod P, and the last boundary leads from the last stage back to the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from lime_dist.config import Config, ModelConfig
from lime_dist.depth.routing import Routing
from lime_dist.plan.flops import routing_flops_per_token
from lime_dist.plan.schedule import Action, in_flight_counts, plan_forward_only, plan_schedule
from lime_dist.plan.transfer import ChunkTransfer, HopPlan, TransferPlan, plan_transfer

DTYPE_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class BundleShape:
    """Sizes of one microbatch's tensors on one tensor rank, which holds 1/tp of the tokens (rounded up)."""

    rows: int
    hidden_size: int
    routing: Routing
    entry_elements: int
    element_bytes: int
    sum_element_bytes: int

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


@dataclass(frozen=True, kw_only=True)
class ChunkPlan:
    """What one chunk does to each microbatch.

    passed_on, made: layers of the raw entries that it sends, a message each; those passed on leave before it computes.
    received_passed_on, received_made: the same of the chunk before.
    last_use: the last chunk of this stage that reads entries kept here; itself where none does.
    routing_flops_per_token: see `flops.py`.
    """

    chunk: int
    num_chunks: int
    layers: range
    transfer: ChunkTransfer
    shape: BundleShape
    received_passed_on: tuple[int, ...]
    received_made: tuple[int, ...]
    passed_on: tuple[int, ...]
    made: tuple[int, ...]
    last_use: int
    routing_flops_per_token: int

    @property
    def is_first(self) -> bool:
        return self.chunk == 0

    @property
    def is_last(self) -> bool:
        return self.chunk == self.num_chunks - 1

    @property
    def held_bytes(self) -> int:
        """Entries that one microbatch keeps here between its forward and its backward pass."""
        own = len(self.transfer.own_entries(self.layers)) + len(self.transfer.own_blocks(self.layers))
        return (len(self.transfer.received.raw_entries) + own) * self.shape.entry_bytes

    @property
    def received_bytes(self) -> int:
        """Of one microbatch, forward."""
        return 0 if self.is_first else self.shape.bundle_bytes(self.transfer.received)

    @property
    def sent_bytes(self) -> int:
        """Of one microbatch, forward; as many come back as gradients."""
        return 0 if self.is_last else self.shape.bundle_bytes(self.transfer.sent)


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Everything that one stage of the pipeline is to do. chunks: ascending."""

    stage_index: int
    num_stages: int
    chunks: tuple[ChunkPlan, ...]
    actions: tuple[Action, ...]
    evaluation: tuple[Action, ...]

    @property
    def num_layers(self) -> int:
        return sum(len(chunk.layers) for chunk in self.chunks)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(layer for chunk in self.chunks for layer in chunk.layers)

    @property
    def is_first_stage(self) -> bool:
        return self.stage_index == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether the last chunk is here, and with it the head and the loss."""
        return self.stage_index == self.num_stages - 1

    @property
    def routing_flops_per_token(self) -> int:
        return sum(chunk.routing_flops_per_token for chunk in self.chunks)

    @cached_property
    def moments(self) -> tuple[dict[int, int], ...]:
        """The different numbers of microbatches that the chunks hold between two actions of a step, by chunk.

        Moments are left out at which no chunk holds more than at another one.
        """
        return _largest([dict(counts) for counts in in_flight_counts(self.actions)])

    @cached_property
    def peak_in_flight(self) -> int:
        """The largest number of passes whose activations the stage holds at once."""
        return max(sum(counts.values()) for counts in self.moments)

    @property
    def peak_held_bytes(self) -> int:
        """Entries of all microbatches in flight, when they are most."""
        return max(
            sum(counts.get(chunk.chunk, 0) * chunk.held_bytes for chunk in self.chunks) for counts in self.moments
        )

    @property
    def received_bytes(self) -> int:
        """Of one microbatch, forward, by all chunks."""
        return sum(chunk.received_bytes for chunk in self.chunks)

    @property
    def sent_bytes(self) -> int:
        """Of one microbatch, forward, by all chunks; as many come back as gradients."""
        return sum(chunk.sent_bytes for chunk in self.chunks)


def _largest(moments: Sequence[dict[int, int]]) -> tuple[dict[int, int], ...]:
    different = list({tuple(sorted(counts.items())): counts for counts in moments}.values())
    return tuple(one for one in different if not any(other is not one and _covers(other, one) for other in different))


def _covers(larger: dict[int, int], smaller: dict[int, int]) -> bool:
    return all(larger.get(chunk, 0) >= count for chunk, count in smaller.items())


def plan_transfer_of(config: Config, policy: str | None = None) -> TransferPlan:
    """The transfer plan of a checked config, by its own policy or another."""
    return plan_transfer(
        config.pattern,
        config.chunks,
        num_stages=config.parallel.pp,
        policy=policy or config.depth.policy,
        boundary_cost=config.pipeline.boundary_cost,
        sum_cost=DTYPE_BYTES[config.partial_sum_dtype] // DTYPE_BYTES[config.run.dtype],
    )


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
    )


def plan_stages(config: Config, transfer: TransferPlan) -> tuple[StagePlan, ...]:
    """By pipeline rank, of a checked config."""
    shape = plan_shape(config)
    return tuple(_plan_stage(config, transfer, shape, index) for index in range(config.parallel.pp))


def _plan_stage(config: Config, transfer: TransferPlan, shape: BundleShape, stage_index: int) -> StagePlan:
    place = {
        "stage_index": stage_index,
        "num_stages": config.parallel.pp,
        "virtual_stages": config.parallel.virtual_stages,
    }
    pipeline = config.pipeline
    actions = plan_schedule(
        pipeline.schedule, num_microbatches=pipeline.num_microbatches, warmup=pipeline.warmup, **place
    )
    chunks = range(stage_index, len(transfer.chunks), config.parallel.pp)
    return StagePlan(
        stage_index=stage_index,
        num_stages=config.parallel.pp,
        chunks=tuple(_plan_chunk(config.model, transfer, shape, chunk, chunks) for chunk in chunks),
        actions=tuple(actions),
        evaluation=tuple(plan_forward_only(pipeline.num_microbatches, **place)),
    )


def _plan_chunk(
    model: ModelConfig, transfer: TransferPlan, shape: BundleShape, chunk: int, of_stage: range
) -> ChunkPlan:
    own, layers = transfer.chunk(chunk), transfer.chunks[chunk]
    before = transfer.chunks[chunk - 1].start if chunk else 0
    received_passed_on, received_made = _split(own.received.raw_entries, before)
    passed_on, made = _split(own.sent.raw_entries, layers.start)
    return ChunkPlan(
        chunk=chunk,
        num_chunks=len(transfer.chunks),
        layers=layers,
        transfer=own,
        shape=shape,
        received_passed_on=received_passed_on,
        received_made=received_made,
        passed_on=passed_on,
        made=made,
        last_use=max(later for later in of_stage if later == chunk or chunk in transfer.chunk(later).kept),
        routing_flops_per_token=routing_flops_per_token(model, own),
    )


def _split(layers: tuple[int, ...], first_own: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(layer for layer in layers if layer < first_own), tuple(layer for layer in layers if layer >= first_own)
