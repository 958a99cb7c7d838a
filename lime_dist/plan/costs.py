"""What a plan's operations cost in seconds, and the rates of a machine from which that follows for any plan. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Protocol

from lime_dist.config import Config
from lime_dist.plan.flops import BACKWARD_FACTOR, ChunkFlops
from lime_dist.plan.memory import FP32
from lime_dist.plan.messages import Point
from lime_dist.plan.operations import Verb
from lime_dist.plan.parameters import padded_vocab_size, plan_parameters
from lime_dist.plan.run_plan import RunPlan
from lime_dist.plan.schedule import Kind
from lime_dist.plan.shape import DTYPE_BYTES, BundleShape
from lime_dist.plan.stages import ChunkPlan, StagePlan
from lime_dist.plan.transfer import ChunkTransfer


@dataclass(frozen=True, kw_only=True)
class LinkSpeed:
    """One way between two ranks' cards. burst_bytes: what passes at once when the way has been idle, of a limit with a bucket."""

    bytes_per_second: float
    latency_seconds: float = 0.0
    burst_bytes: float = 0.0

    def seconds(self, num_bytes: float) -> float:
        return self.latency_seconds + num_bytes / self.bytes_per_second


@dataclass(frozen=True, kw_only=True)
class MoveCost:
    """Time of the host for one message: a fixed part and one for each byte."""

    seconds: float = 0.0
    seconds_per_byte: float = 0.0

    def of(self, num_bytes: int) -> float:
        return self.seconds + self.seconds_per_byte * num_bytes


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Of one plan, in seconds of one tensor rank of each stage.

    runs: by (chunk, kind), of each RUN of `ChunkPlan.operations[kind]` in order, tensor collectives included.
    moves: what SEND, RECEIVE and AWAIT themselves take of the host; nothing where a verb is missing.
    links: by (from stage, to stage), both ways of each boundary; with virtual stages around the ring too.
    data_seconds, end_seconds: by stage, before its first operation, and behind the last one of all stages: gradient
    reduction, norm, optimiser.
    cores: of a processor that all stages share; None where each stage has a device of its own.
    variation: what RUNs take over their mean, one as likely as the other; none: all take as long as the mean.
    """

    runs: Mapping[tuple[int, Kind], tuple[float, ...]]
    links: Mapping[tuple[int, int], LinkSpeed]
    data_seconds: tuple[float, ...]
    end_seconds: tuple[float, ...]
    moves: Mapping[Verb, MoveCost] = field(default_factory=dict)
    cores: float | None = None
    variation: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of a machine, with which `costs_of` prices any plan of a model.

    seconds_per_flop: of layers and head, on one tensor rank, by the FLOPs of its 1/tp share of a pass; a backward pass has
    twice those of a forward one, and with `recompute` three times those of its layers. seconds_per_routing_flop: the same of routing.
    run_seconds: fixed, of each RUN. data_seconds: of each stage.
    end_seconds: fixed, and for each parameter of a rank end_seconds_per_parameter.
    within_node, between_nodes: between ranks of one node, of which each has `node_size`, and of two.
    links: between two stages, where they are known better than that. Collectives of the tensor group and the reduction over
    replicas come on top, by their bytes over within_node or between_nodes.
    cores: that all ranks of all replicas share; None where each has a device of its own.
    """

    seconds_per_flop: Mapping[Kind, float]
    seconds_per_routing_flop: Mapping[Kind, float]
    within_node: LinkSpeed
    between_nodes: LinkSpeed
    node_size: int = 8
    links: Mapping[tuple[int, int], LinkSpeed] = field(default_factory=dict)
    run_seconds: float = 0.0
    moves: Mapping[Verb, MoveCost] = field(default_factory=dict)
    data_seconds: float = 0.0
    end_seconds: float = 0.0
    end_seconds_per_parameter: float = 0.0
    cores: float | None = None
    variation: tuple[float, ...] = ()

    def link(self, distance: int) -> LinkSpeed:
        """Between two of the ranks whose first and last are `distance` apart."""
        return self.within_node if distance < self.node_size else self.between_nodes


def costs_of(plan: RunPlan, rates: Rates) -> Costs:
    return Costs(
        runs={(chunk.chunk, kind): _runs(plan, rates, chunk, kind) for chunk in plan.chunks for kind in Kind},
        links=_links(plan, rates),
        data_seconds=(rates.data_seconds,) * len(plan.stages),
        end_seconds=tuple(_end(plan, rates, stage) for stage in plan.stages),
        moves=rates.moves,
        cores=None if rates.cores is None else rates.cores / (plan.layout.tp * plan.layout.dp),
        variation=rates.variation,
    )


# ---- passes


class Work(Protocol):
    """Of a chunk: what its passes compute."""

    @property
    def layers(self) -> range: ...
    @property
    def transfer(self) -> ChunkTransfer: ...
    @property
    def shape(self) -> BundleShape: ...
    @property
    def flops(self) -> ChunkFlops: ...


def pass_seconds(config: Config, rates: Rates, work: Work, kind: Kind) -> tuple[float, float]:
    """Of the chunk's layers, and of the head."""
    flops = work.flops
    tokens = config.microbatch_size * config.data.seq_length / config.parallel.tp
    recomputed = config.parallel.recompute == "layer"
    head_factor = 1 if kind is Kind.FORWARD else BACKWARD_FACTOR
    factor = head_factor if kind is Kind.FORWARD else head_factor + recomputed
    seconds = flops.layers * rates.seconds_per_flop[kind] + flops.routing * rates.seconds_per_routing_flop[kind]
    collectives = collective_seconds(config.parallel.tp, rates, work) * (1 + (recomputed and kind is Kind.BACKWARD))
    return factor * tokens * seconds + collectives, head_factor * tokens * flops.head * rates.seconds_per_flop[kind]


def _runs(plan: RunPlan, rates: Rates, chunk: ChunkPlan, kind: Kind) -> tuple[float, ...]:
    """Routing is taken to be spread over the layers evenly. The head is at the end of a forward and the beginning of a backward."""
    until = [operation.until for operation in chunk.operations[kind] if operation.verb is Verb.RUN]
    layers, head = pass_seconds(plan.config, rates, chunk, kind)
    done = [0.0, *(_share_done(point, chunk.layers, kind) for point in until)]
    seconds = [layers * (end - begin) + rates.run_seconds for begin, end in zip(done, done[1:])]
    seconds[-1 if kind is Kind.FORWARD else 0] += head
    return tuple(seconds)


def _share_done(point: Point | None, layers: range, kind: Kind) -> float:
    """Of the pass where it is at `point`: in the middle of a layer, or at its end."""
    if not isinstance(point, int):
        return 1.0
    before = point - layers.start if kind is Kind.FORWARD else layers.stop - 1 - point
    return (before + 0.5) / len(layers)


def collective_seconds(tp: int, rates: Rates, work: Work) -> float:
    """Of a pass either way: two all-reduces of the residual a layer, or the reduce-scatters and all-gathers that come to the
    same bytes; for each entry one all-to-all from heads to tokens, for each reader one back."""
    if tp == 1:
        return 0.0
    layers, transfer, shape, link = work.layers, work.transfer, work.shape, rates.link(tp - 1)
    num_exchanges = len(transfer.own_entries(layers)) + sum(reader in layers for reader in transfer.reads)
    reduced = link.seconds(2 * (tp - 1) / tp * shape.residual_bytes * tp)
    return 2 * len(layers) * reduced + num_exchanges * link.seconds((tp - 1) / tp * shape.entry_bytes)


# ---- links, and the end of a step


def _links(plan: RunPlan, rates: Rates) -> dict[tuple[int, int], LinkSpeed]:
    """Ranks of a stage are neighbours (`layout.py`): each talks to the one tp x dp ranks on, of the next stage."""
    num_stages = len(plan.stages)
    boundaries = num_stages if plan.virtual_stages > 1 else num_stages - 1
    ways = [(stage, (stage + 1) % num_stages) for stage in range(boundaries)]
    return {
        way: rates.links.get(way) or _slowest_link(plan, rates, way)
        for way in (*ways, *((behind, before) for before, behind in ways))
    }


def _slowest_link(plan: RunPlan, rates: Rates, way: tuple[int, int]) -> LinkSpeed:
    """Of the replicas' and tensor ranks', as all of a stage's go on together."""
    size, ends = plan.layout.tp * plan.layout.dp, sorted(way)
    nodes = [[(stage * size + rank) // rates.node_size for rank in range(size)] for stage in ends]
    return rates.within_node if nodes[0] == nodes[1] else rates.between_nodes


def _end(plan: RunPlan, rates: Rates, stage: StagePlan) -> float:
    count = parameter_count(plan, stage)
    seconds = rates.end_seconds + count * rates.end_seconds_per_parameter
    return seconds + reduction_seconds(plan, rates, stage)


def reduction_seconds(plan: RunPlan, rates: Rates, stage: StagePlan) -> float:
    """Of the stage's gradients over the replicas, by a ring's bytes."""
    tp, dp = plan.layout.tp, plan.layout.dp
    if dp == 1:
        return 0.0
    count = parameter_count(plan, stage)
    num_bytes = count * DTYPE_BYTES.get(str(plan.config.deepspeed.get("communication_data_type")), FP32)
    return rates.link(dp * tp - 1).seconds(2 * (dp - 1) / dp * num_bytes)


def parameter_count(plan: RunPlan, stage: StagePlan) -> int:
    """Elements on one tensor rank, with padding and tied copies: what is reduced and updated."""
    model, tp = plan.config.model, plan.layout.tp
    rows = padded_vocab_size(model.vocab_size, tp)
    return sum(
        prod(spec.shape)
        for chunk in stage.chunks
        for spec in plan_parameters(model, chunk.transfer, chunk.layers, tp=tp, tp_rank=0, vocab_rows=rows)
    )
