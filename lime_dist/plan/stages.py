"""What each stage and each of its chunks does, and what crosses the hops, with sizes. Pure data.

With virtual stages, stage r of P holds chunks r, r + P, ...; hop c leads from chunk c to chunk c + 1, over boundary
c mod P, and the last boundary leads from the last stage back to the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from lime_dist.config import Config
from lime_dist.plan.flops import ChunkFlops, chunk_flops
from lime_dist.plan.messages import HopEnd, Message, backward_messages, forward_messages
from lime_dist.plan.operations import Operation, PassOperation, plan_operations, plan_pass
from lime_dist.plan.schedule import Action, Kind, plan_forward_only, plan_schedule
from lime_dist.plan.shape import DTYPE_BYTES, BundleShape, plan_shape
from lime_dist.plan.transfer import ChunkTransfer, TransferPlan, plan_transfer


@dataclass(frozen=True, kw_only=True)
class ChunkPlan:
    """What one chunk does to each microbatch.

    received, sent: the messages of each kind of pass, from and to the chunk before or behind, in the order in which they leave.
    last_use: the last chunk of this stage that reads entries kept here; itself where none does.
    flops: see `flops.py`.
    """

    chunk: int
    num_chunks: int
    layers: range
    transfer: ChunkTransfer
    shape: BundleShape
    received: Mapping[Kind, tuple[Message, ...]]
    sent: Mapping[Kind, tuple[Message, ...]]
    last_use: int
    flops: ChunkFlops

    @property
    def is_first(self) -> bool:
        return self.chunk == 0

    @property
    def is_last(self) -> bool:
        return self.chunk == self.num_chunks - 1

    @cached_property
    def operations(self) -> Mapping[Kind, tuple[PassOperation, ...]]:
        """Of each kind of pass, but for its receives."""
        return {kind: tuple(plan_pass(self, kind)) for kind in Kind}

    @property
    def held_bytes(self) -> int:
        """Entries that one microbatch keeps here between its forward and its backward pass."""
        own = len(self.transfer.own_entries(self.layers)) + len(self.transfer.own_blocks(self.layers))
        return (len(self.transfer.received.raw_entries) + own) * self.shape.entry_bytes

    @property
    def received_bytes(self) -> int:
        """Of one microbatch, forward."""
        return sum(message.num_bytes for message in self.received[Kind.FORWARD])

    @property
    def sent_bytes(self) -> int:
        """Of one microbatch, forward; as many come back as gradients."""
        return sum(message.num_bytes for message in self.sent[Kind.FORWARD])


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Everything that one stage of the pipeline is to do.

    chunks: ascending. actions, evaluation: of a training step and of a batch that is only evaluated. moments: the numbers of
    microbatches that the chunks hold in a step when the stage holds most, see `Step.peaks`. receives_ahead: of how many
    actions behind the running one the receives are posted already.
    """

    stage_index: int
    num_stages: int
    chunks: tuple[ChunkPlan, ...]
    actions: Sequence[Action]
    evaluation: Sequence[Action]
    moments: tuple[Mapping[int, int], ...]
    receives_ahead: int

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
        return sum(chunk.flops.routing for chunk in self.chunks)

    def sent(self, kind: Kind) -> list[Message]:
        """Of one microbatch's passes of a kind, by all chunks."""
        return [message for chunk in self.chunks for message in chunk.sent[kind]]

    def operations(self, actions: Sequence[Action]) -> Iterator[Operation]:
        """What `actions` of this stage ask of it, in order."""
        return plan_operations({chunk.chunk: chunk for chunk in self.chunks}, actions, self.receives_ahead)

    @property
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


def plan_chunks(config: Config, transfer: TransferPlan) -> tuple[ChunkPlan, ...]:
    """In model order, of a checked config."""
    shape = plan_shape(config)
    return tuple(_plan_chunk(config, transfer, shape, chunk) for chunk in range(len(transfer.chunks)))


def plan_stages(config: Config, chunks: tuple[ChunkPlan, ...], warmup: int | None) -> tuple[StagePlan, ...]:
    """By pipeline rank, of a checked config. warmup: see `plan_schedule`."""
    return tuple(_plan_stage(config, chunks, warmup, index) for index in range(config.parallel.pp))


def _plan_stage(config: Config, chunks: tuple[ChunkPlan, ...], warmup: int | None, stage_index: int) -> StagePlan:
    pipeline, num_stages, virtual_stages = config.pipeline, config.parallel.pp, config.parallel.virtual_stages
    place = {"stage_index": stage_index, "num_stages": num_stages, "virtual_stages": virtual_stages}
    step = plan_schedule(pipeline.schedule, num_microbatches=config.num_microbatches, warmup=warmup, **place)
    return StagePlan(
        stage_index=stage_index,
        num_stages=num_stages,
        chunks=chunks[stage_index::num_stages],
        actions=step,
        evaluation=plan_forward_only(config.num_microbatches, **place),
        moments=step.peaks(),
        receives_ahead=pipeline.receives_ahead or (1 if warmup is None else 2),
    )


def _plan_chunk(config: Config, transfer: TransferPlan, shape: BundleShape, chunk: int) -> ChunkPlan:
    of_stage = range(chunk % config.parallel.pp, len(transfer.chunks), config.parallel.pp)
    own, layers = transfer.chunk(chunk), transfer.chunks[chunk]
    here, before, behind = HopEnd(layers, own), _hop_end(transfer, chunk - 1), _hop_end(transfer, chunk + 1)
    return ChunkPlan(
        chunk=chunk,
        num_chunks=len(transfer.chunks),
        layers=layers,
        transfer=own,
        shape=shape,
        received={
            Kind.FORWARD: forward_messages(own.received, before, here, shape) if before else (),
            Kind.BACKWARD: backward_messages(own.sent, behind, here, shape) if behind else (),
        },
        sent={
            Kind.FORWARD: forward_messages(own.sent, here, behind, shape) if behind else (),
            Kind.BACKWARD: backward_messages(own.received, here, before, shape) if before else (),
        },
        last_use=max(later for later in of_stage if later == chunk or chunk in transfer.chunk(later).kept),
        flops=chunk_flops(config, own, layers),
    )


def _hop_end(transfer: TransferPlan, chunk: int) -> HopEnd | None:
    """None where there is no such chunk."""
    inside = 0 <= chunk < len(transfer.chunks)
    return HopEnd(transfer.chunks[chunk], transfer.chunk(chunk)) if inside else None
