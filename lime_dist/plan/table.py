"""The stage table: what the plan says, as text and as JSON. Pure data.

Bytes are those of one microbatch on one tensor rank, forward, unless a name says otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

from lime_dist.config import Config, ModelConfig
from lime_dist.depth.pattern import Pattern
from lime_dist.formats import format_bytes
from lime_dist.plan.memory import StageMemory
from lime_dist.plan.parameters import (
    ROUTER_ROLES,
    count_parameters,
    logical_tensors,
    padded_vocab_size,
    plan_parameters,
)
from lime_dist.plan.run_plan import RunPlan, plan_run
from lime_dist.plan.shape import plan_shape
from lime_dist.plan.stages import ChunkPlan, StagePlan, plan_transfer_of

POLICIES = ("least", "relay")
COMPARED_PATTERNS = (
    "full",
    "first:2",
    "first:4",
    "last:2",
    "last:4",
    "first:2+last:2",
    "stride:2",
    "stride:4",
    "within_stage",
    "within_stage+first:2",
)


def plan_report(config: Config) -> dict[str, Any]:
    """Stages, hops and totals of a checked config.

    totals: entries and partial sums over all hops, under each policy. proven_minimum: what no plan can go below; without
    virtual stages by the matchings of all boundaries, with them by the minimum cut.
    """
    plan = plan_run(config)
    transfers = {policy: plan_transfer_of(config, policy) for policy in POLICIES}
    fewest = _fewest(plan)
    return {
        "layout": {"tp": config.layout.tp, "pp": config.layout.pp, "dp": config.layout.dp},
        "virtual_stages": plan.virtual_stages,
        "pattern": plan.transfer.pattern.name,
        "policy": config.depth.policy,
        "stages": [_stage_report(config, stage, memory) for stage, memory in zip(plan.stages, plan.memory)],
        "hops": [_hop_report(plan, chunk, least) for chunk, least in zip(plan.chunks, fewest)],
        "totals": {policy: transfer.num_crossings for policy, transfer in transfers.items()},
        "proven_minimum": transfers["least"].num_crossings if plan.virtual_stages > 1 else sum(filter(None, fewest)),
    }


def _fewest(plan: RunPlan) -> list[int | None]:
    """Of each hop. With virtual stages what a hop must carry depends on the others, and only the sum has a minimum."""
    if plan.virtual_stages > 1:
        return [None] * (len(plan.chunks) - 1)
    return [least_crossings(plan.transfer.pattern, following.layers.start) for following in plan.chunks[1:]]


def _stage_report(config: Config, stage: StagePlan, memory: StageMemory) -> dict[str, Any]:
    return {
        "stage_index": stage.stage_index,
        "layers": list(stage.layers),
        "chunks": [chunk.chunk for chunk in stage.chunks],
        "parameters_per_tp_rank": _parameters_per_tp_rank(config, stage),
        "routing_flops_per_token": stage.routing_flops_per_token,
        "received_bytes": stage.received_bytes,
        "microbatches_in_flight": stage.peak_in_flight,
        "entries_in_flight_bytes": stage.peak_held_bytes,
        "memory_bytes": memory.report(),
    }


def _parameters_per_tp_rank(config: Config, stage: StagePlan) -> int:
    tp = config.parallel.tp
    vocab_rows = padded_vocab_size(config.model.vocab_size, tp)
    return sum(
        count_parameters(
            plan_parameters(config.model, chunk.transfer, chunk.layers, tp=tp, tp_rank=0, vocab_rows=vocab_rows)
        )
        for chunk in stage.chunks
    )


def least_crossings(pattern: Pattern, first_layer: int) -> int:
    """Entries and partial sums that any plan must take over the boundary before `first_layer`.

    Without partial sums these are the entries that are read behind it. With them, of every edge that spans it, the raw entry or the partial sum crosses: a vertex cover of the bipartite graph
    of these edges, and the smallest has as many vertices as the largest matching has edges (König), which is a flow.
    """
    import networkx  # slow to import

    spanning = Counter(
        frozenset(source for source in pattern.sources[reader] if source < first_layer)
        for reader in range(first_layer, pattern.num_layers)
    )
    entries = frozenset().union(*spanning)
    if not pattern.routing.presummable:
        return len(entries)
    graph = networkx.DiGraph()  # readers with the same sources are one node
    graph.add_edges_from((("start", source) for source in entries), capacity=1)
    for sources, count in spanning.items():
        graph.add_edge(sources, "end", capacity=count)
        graph.add_edges_from((source, sources) for source in sources)
    return networkx.maximum_flow_value(graph, "start", "end") if entries else 0


def _hop_report(plan: RunPlan, chunk: ChunkPlan, fewest: int | None) -> dict[str, Any]:
    """tensors, fewest_tensors: with the residual."""
    shape, sent, num_stages = chunk.shape, chunk.transfer.sent, len(plan.stages)
    return {
        "hop": chunk.chunk,
        "boundary": chunk.chunk % num_stages,
        "raw_entries": list(sent.raw_entries),
        "partial_sums": list(sent.partial_sums),
        "tensors": 1 + len(sent.raw_entries) + len(sent.partial_sums),
        "fewest_tensors": None if fewest is None else 1 + fewest,
        "entry_bytes": shape.entry_bytes,
        "residual_bytes": shape.residual_bytes,
        "bundle_bytes": chunk.sent_bytes,
        "bytes_per_step": chunk.sent_bytes * plan.num_microbatches,
        "ratio_to_residual": chunk.sent_bytes / shape.residual_bytes,
    }


# ---- other patterns, side by side


def compare_report(config: Config) -> list[dict[str, Any]]:
    """What each pattern would cost on the same model and layout under each policy; the config's own pattern too."""
    own = config.depth.pattern
    known = own in COMPARED_PATTERNS or config.depth.router == "none"
    patterns = COMPARED_PATTERNS if known else (*COMPARED_PATTERNS, own)
    return [_cost_report(_with_depth(config, pattern, policy)) for pattern in patterns for policy in POLICIES]


def _with_depth(config: Config, pattern: Any, policy: str) -> Config:
    router = "static" if config.depth.router == "none" else config.depth.router
    return replace(config, depth=replace(config.depth, router=router, pattern=pattern, policy=policy))


def _cost_report(config: Config) -> dict[str, Any]:
    transfer, shape = plan_transfer_of(config), plan_shape(config)
    bundles_bytes = [shape.bundle_bytes(hop) for hop in transfer.hops]
    largest = max(bundles_bytes, default=0)
    return {
        "pattern": transfer.pattern.name,
        "policy": config.depth.policy,
        "crossings": transfer.num_crossings,
        "largest_bundle_bytes": largest,
        "ratio_to_residual": largest / shape.residual_bytes,
        "bytes_per_microbatch": sum(bundles_bytes),
        "router_parameters": _router_parameters(config.model, transfer.pattern),
    }


def _router_parameters(model: ModelConfig, pattern: Pattern) -> int:
    tensors = logical_tensors(model, pattern).values()
    return sum(prod(tensor.shape) for tensor in tensors if tensor.role in ROUTER_ROLES)


# ---- text


def stage_table(config: Config) -> str:
    """For people: a line a stage, a line a boundary."""
    report = plan_report(config)
    lines = [
        f"{_layout(config)}, pattern {report['pattern']}, policy {config.depth.policy}, schedule {config.pipeline.schedule}, "
        f"{config.pipeline.num_microbatches} microbatches of {config.microbatch_size} x {config.data.seq_length} tokens; "
        "bytes are of one microbatch on one tensor rank, forward",
        "",
        *_stage_lines(report["stages"]),
    ]
    if report["hops"]:
        lines += ["", *_hop_lines(report)]
    return "\n".join([*lines, "", _totals_line(report)])


def _layout(config: Config) -> str:
    virtual = config.parallel.virtual_stages
    return f"layout {config.layout}" + (f", {virtual} virtual stages" if virtual > 1 else "")


def _stage_lines(stages: Sequence[dict[str, Any]]) -> list[str]:
    head = (
        "stage",
        "layers",
        "parameters/rank",
        "routing FLOPs/token",
        "in flight",
        "received",
        "entries held at peak",
        "memory/rank",
    )
    rows = [
        (
            str(stage["stage_index"]),
            format_layers(stage["layers"]),
            f"{stage['parameters_per_tp_rank']:,}",
            f"{stage['routing_flops_per_token']:,}",
            str(stage["microbatches_in_flight"]),
            format_bytes(stage["received_bytes"]),
            format_bytes(stage["entries_in_flight_bytes"]),
            format_bytes(stage["memory_bytes"]["total"]),
        )
        for stage in stages
    ]
    return align_columns(head, rows)


def _hop_lines(report: dict[str, Any]) -> list[str]:
    head = (
        "boundary" if report["virtual_stages"] == 1 else "chunks",
        "raw entries of layers",
        "partial sums for layers",
        "tensors",
        "fewest",
        "residual",
        "an entry",
        "bundle",
        "x residual",
        "a step",
    )
    rows = [
        (
            f"{hop['hop']} > {hop['hop'] + 1}",
            format_layers(hop["raw_entries"]),
            format_layers(hop["partial_sums"]),
            str(hop["tensors"]),
            "-" if hop["fewest_tensors"] is None else str(hop["fewest_tensors"]),
            format_bytes(hop["residual_bytes"]),
            format_bytes(hop["entry_bytes"]),
            format_bytes(hop["bundle_bytes"]),
            f"{hop['ratio_to_residual']:.2f}",
            format_bytes(hop["bytes_per_step"]),
        )
        for hop in report["hops"]
    ]
    return align_columns(head, rows)


def _totals_line(report: dict[str, Any]) -> str:
    totals, minimum = report["totals"], report["proven_minimum"]
    counts = ", ".join(f"{policy} {totals[policy]}" for policy in POLICIES)
    reached = ", which least reaches" if totals["least"] == minimum else ""
    where = "boundaries" if report["virtual_stages"] == 1 else "hops"
    return f"entries and partial sums over all {where}: {counts}; proven minimum {minimum}{reached}"


def compare_table(config: Config) -> str:
    """For people: a line for each pattern and policy."""
    head = "pattern", "policy", "crossings", "largest bundle", "x residual", "a microbatch", "router parameters"
    rows = [
        (
            cost["pattern"],
            cost["policy"],
            str(cost["crossings"]),
            format_bytes(cost["largest_bundle_bytes"]),
            f"{cost['ratio_to_residual']:.2f}",
            format_bytes(cost["bytes_per_microbatch"]),
            f"{cost['router_parameters']:,}",
        )
        for cost in compare_report(config)
    ]
    return "\n".join(align_columns(head, rows))


def align_columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]


def format_layers(layers: Sequence[int]) -> str:
    """0-3, 7 for neighbours and single ones."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or "none"
