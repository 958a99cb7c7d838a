"""The stage table: what the plan says, as text and as JSON. Pure data.

Bytes are those of one microbatch on one tensor rank, forward, unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill, wrap
from typing import Any

from lime_dist.config import Config
from lime_dist.formats import format_bytes, format_si
from lime_dist.plan.choice import EdgeChoice
from lime_dist.plan.memory import StageMemory
from lime_dist.plan.parameters import (
    count_parameters,
    padded_vocab_size,
    plan_parameters,
    total_parameters,
)
from lime_dist.plan.record import plan_record
from lime_dist.plan.run_plan import RunPlan, replan_warmups
from lime_dist.plan.schedule import eager_warmup, plain_warmup
from lime_dist.plan.stages import ChunkPlan, StagePlan, plan_transfer_of
from lime_dist.plan.tensors import ParameterSpec
from lime_dist.plan.transfer import HopPlan, TransferPlan, plan_transfer

MAX_WIDTH, MAX_LAYERS_WIDTH, MAX_SOURCES_WIDTH = 120, 22, 60  # of a line; of columns, so that lines stay within it
POLICIES = ("least", "relay")


def plan_report(plan: RunPlan) -> dict[str, Any]:
    """Stages, hops and totals, and all of the plan.

    totals: entries and partial sums over all hops, under each policy. proven_minimum: what no plan can go below; without
    virtual stages by the vertex covers of all boundaries, with them by the minimum cut. warmups: what `pipeline.warmup` costs.
    model_flops_per_token, model_flops_per_step: forward and backward (`flops.py`), of a step those of all replicas.
    """
    return {"plan": plan_record(plan), **_table_report(plan)}


def _table_report(plan: RunPlan) -> dict[str, Any]:
    config = plan.config
    fewest = _fewest(plan.transfer)
    return {
        "layout": {"tp": config.layout.tp, "pp": config.layout.pp, "dp": config.layout.dp},
        "virtual_stages": plan.virtual_stages,
        "pattern": plan.transfer.pattern.name,
        "policy": config.depth.policy,
        "total_parameters": total_parameters(config.model, plan.transfer.pattern),
        "model_flops_per_token": plan.model_flops_per_token,
        "model_flops_per_step": plan.model_flops_per_step,
        "stages": [_stage_report(config, stage, memory) for stage, memory in zip(plan.stages, plan.memory)],
        "hops": [_hop_report(plan, chunk, least) for chunk, least in zip(plan.chunks, fewest.hops)],
        "totals": {policy: _transfer_by(plan, policy).num_crossings for policy in POLICIES},
        "proven_minimum": fewest.num_crossings,
        "warmups": _warmup_reports(plan),
        "chosen_edges": None if plan.choice is None else plan.choice.report(),
    }


def _fewest(transfer: TransferPlan) -> TransferPlan:
    """As few tensors as can be, whatever their bytes."""
    return plan_transfer(transfer.pattern, transfer.chunks, num_stages=transfer.num_stages, policy="least")


def _transfer_by(plan: RunPlan, policy: str) -> TransferPlan:
    return plan.transfer if policy == plan.config.depth.policy else plan_transfer_of(plan.config, policy)


def _warmup_reports(plan: RunPlan) -> list[dict[str, Any]]:
    """The plain warm-up, the eager one and the run's own, ascending; none where there is no choice to make."""
    if plan.schedule != "1f1b" or len(plan.stages) == 1 or plan.virtual_stages > 1:
        return []
    sizes = {"num_stages": len(plan.stages), "num_microbatches": plan.num_microbatches}
    plain, eager = plain_warmup(**sizes), eager_warmup(**sizes)
    own = plan.warmup or plain
    others = sorted({plain, eager} - {own})
    plans = dict(zip(others, replan_warmups(plan, [None if warmup == plain else warmup for warmup in others])))
    names = {plain: "plain", eager: "eager"}
    return [
        _warmup_report(one, warmup, names.get(warmup), warmup == own)
        for warmup, one in sorted({**plans, own: plan}.items())
    ]


def _warmup_report(plan: RunPlan, warmup: int, name: str | None, is_own: bool) -> dict[str, Any]:
    """microbatches_in_flight, memory_bytes: on the rank that has most."""
    return {
        "warmup": warmup,
        "name": name,
        "is_own": is_own,
        "microbatches_in_flight": max(stage.peak_in_flight for stage in plan.stages),
        "memory_bytes": max(memory.total_bytes for memory in plan.memory),
    }


def _stage_report(config: Config, stage: StagePlan, memory: StageMemory) -> dict[str, Any]:
    """parameters_per_tp_rank: as a rank holds them before ZeRO cuts them, with the copies of tied_copy_parameters, which
    total_parameters counts once, and with the vocabulary's padding."""
    specs = _parameters_of_first_tp_rank(config, stage)
    return {
        "stage_index": stage.stage_index,
        "layers": list(stage.layers),
        "chunks": [chunk.chunk for chunk in stage.chunks],
        "parameters_per_tp_rank": count_parameters(specs),
        "tied_copy_parameters": count_parameters(spec for spec in specs if spec.tied_copy),
        "routing_flops_per_token": stage.routing_flops_per_token,
        "received_bytes": stage.received_bytes,
        "microbatches_in_flight": stage.peak_in_flight,
        "entries_in_flight_bytes": stage.peak_held_bytes,
        "memory_bytes": memory.report(),
    }


def _parameters_of_first_tp_rank(config: Config, stage: StagePlan) -> list[ParameterSpec]:
    tp = config.parallel.tp
    rows = padded_vocab_size(config.model.vocab_size, tp)
    return [
        spec
        for chunk in stage.chunks
        for spec in plan_parameters(config.model, chunk.transfer, chunk.layers, tp=tp, tp_rank=0, vocab_rows=rows)
    ]


def _hop_report(plan: RunPlan, chunk: ChunkPlan, fewest: HopPlan) -> dict[str, Any]:
    """tensors, fewest_tensors: with the residual.

    With virtual stages what a hop must carry depends on the others, and only the sum has a minimum.
    """
    shape, sent, num_stages = chunk.shape, chunk.transfer.sent, len(plan.stages)
    return {
        "hop": chunk.chunk,
        "boundary": chunk.chunk % num_stages,
        "stages": [chunk.chunk % num_stages, (chunk.chunk + 1) % num_stages],
        "raw_entries": list(sent.raw_entries),
        "partial_sums": list(sent.partial_sums),
        "tensors": _num_tensors(sent),
        "fewest_tensors": None if plan.virtual_stages > 1 else _num_tensors(fewest),
        "entry_bytes": shape.entry_bytes,
        "sum_bytes": shape.sum_bytes,
        "residual_bytes": shape.residual_bytes,
        "bundle_bytes": chunk.sent_bytes,
        "bytes_per_step": chunk.sent_bytes * plan.num_microbatches,
        "ratio_to_residual": chunk.sent_bytes / shape.residual_bytes,
    }


def _num_tensors(hop: HopPlan) -> int:
    return 1 + len(hop.raw_entries) + len(hop.partial_sums)


# ---- text


def stage_table(plan: RunPlan) -> str:
    """For people: a line a stage, a line a hop."""
    config, report = plan.config, _table_report(plan)
    pipeline = config.pipeline
    tokens = f"{config.microbatch_size} x {config.data.seq_length} tokens"
    lines = [
        f"{_layout(config)}, pattern {report['pattern']}, policy {config.depth.policy}",
        _model_line(report),
        f"schedule {pipeline.schedule}, {config.num_microbatches} microbatches of {tokens}",
        f"bytes are of one microbatch on one tensor rank, forward{_sizes(report['hops'])}",
        "",
        *_stage_lines(report["stages"]),
        *_tied_copy_lines(report["stages"]),
    ]
    if report["hops"]:
        lines += ["", *_hop_lines(report)]
    lines += ["", _totals_line(report)]
    lines += [_warmups_line(report["warmups"])] if report["warmups"] else []
    lines += _staged_lines(plan)
    lines += ["", *_choice_lines(plan.choice)] if plan.choice is not None else []
    return "\n".join(lines)


def _layout(config: Config) -> str:
    virtual = config.parallel.virtual_stages
    return f"layout {config.layout}" + (f", {virtual} virtual stages" if virtual > 1 else "")


def _model_line(report: dict[str, Any]) -> str:
    parameters = report["total_parameters"]
    a_token, a_step = (format_si(report[f"model_flops_per_{unit}"]) for unit in ("token", "step"))
    return f"{parameters:,} parameters; model FLOPs, forward and backward: {a_token} a token, {a_step} a step"


def _sizes(hops: Sequence[dict[str, Any]]) -> str:
    """Of the tensors that may cross, which are the same for every hop."""
    names = {"residual": "residual_bytes", "raw entry": "entry_bytes", "partial sum": "sum_bytes"}
    return ": " + ", ".join(f"{name} {format_bytes(hops[0][key])}" for name, key in names.items()) if hops else ""


def _stage_lines(stages: Sequence[dict[str, Any]]) -> list[str]:
    head = (
        "stage",
        "layers",
        "parameters/rank",
        "routing FLOPs/token",
        "in flight",
        "received",
        "entries at peak",
        "memory/rank",
    )
    rows = [
        (
            str(stage["stage_index"]),
            _shortened(stage["layers"]),
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


def _tied_copy_lines(stages: Sequence[dict[str, Any]]) -> list[str]:
    copied = sum(stage["tied_copy_parameters"] for stage in stages)
    return [f"parameters/rank: the last stage's with its copy of the tied embedding, {copied:,}"] if copied else []


def _hop_lines(report: dict[str, Any]) -> list[str]:
    """Without virtual stages a hop is a boundary, and each has a fewest number of tensors of its own."""
    is_virtual = report["virtual_stages"] > 1
    head = (
        *(("chunks", "stages") if is_virtual else ("boundary",)),
        "raw entries of layers",
        "partial sums for layers",
        "tensors",
        *(() if is_virtual else ("fewest",)),
        "bundle",
        "x residual",
        "a step",
    )
    rows = [
        (
            f"{hop['hop']} > {hop['hop'] + 1}",
            *(["{} > {}".format(*hop["stages"])] if is_virtual else []),
            _shortened(hop["raw_entries"]),
            _shortened(hop["partial_sums"]),
            str(hop["tensors"]),
            *([] if is_virtual else [str(hop["fewest_tensors"])]),
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


def _staged_lines(plan: RunPlan) -> list[str]:
    most = max(memory.staged for memory in plan.memory)
    return [f"a save behind training copies up to {format_bytes(most)} a rank to host memory"] if most else []


def _warmups_line(warmups: Sequence[dict[str, Any]]) -> str:
    texts = [_warmup_text(one, " in flight", " a rank") if one is warmups[0] else _warmup_text(one) for one in warmups]
    return fill("warmup " + "; ".join(texts), width=MAX_WIDTH, subsequent_indent="  ")


def _warmup_text(one: dict[str, Any], in_flight: str = "", a_rank: str = "") -> str:
    names = {"plain": "plain", "eager": "eager, hides transfers"}
    said = ", ".join([*([names[one["name"]]] if one["name"] else []), *(["this run"] if one["is_own"] else [])])
    return f"{one['warmup']} ({said}): {one['microbatches_in_flight']}{in_flight}, {format_bytes(one['memory_bytes'])}{a_rank}"


def _choice_lines(choice: EdgeChoice) -> list[str]:
    """A line a reader; where there are many, a line for several neighbouring ones."""
    total, is_weighed = choice.total, choice.weights is not None
    said = f"edges of {choice.pattern.name}, chosen {choice.how}: {total.num_kept} of {total.num_edges} kept"
    said += f", with {_percent(total.weight_share)} of their weight" if is_weighed else ""
    head = "readers", "sources kept", "kept", "of", *(("share of weight",) if is_weighed else ())
    rows = [
        (
            format_layers(kept.readers),
            _shortened(kept.sources, MAX_SOURCES_WIDTH),
            str(kept.num_kept),
            str(kept.num_edges),
            *((_percent(kept.weight_share),) if is_weighed else ()),
        )
        for kept in choice.groups()
    ]
    return [*wrap(said, width=MAX_WIDTH, subsequent_indent="  "), *align_columns(head, rows)]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


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


def _shortened(layers: Sequence[int], most: int = MAX_LAYERS_WIDTH) -> str:
    """As `format_layers`, without runs in the middle where there are many: 0-1, 8-9, ..., 24-25."""
    text = format_layers(layers)
    if len(text) <= most:
        return text
    *first, last = text.split(", ")
    while len(first) > 1 and len(", ".join((*first, "...", last))) > most:
        first.pop()
    return ", ".join((*first, "...", last))
