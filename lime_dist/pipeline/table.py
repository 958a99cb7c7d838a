"""The stage table: what the plan says, as text and as JSON. Pure data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lime_dist.config import Config
from lime_dist.lime.parameters import count_parameters, padded_vocab_size, plan_parameters
from lime_dist.pipeline.bundle import StagePlan, plan_run_transfer, plan_stages


def plan_report(config: Config) -> dict[str, Any]:
    """Stages, boundaries and totals of a checked config; bytes are of one microbatch on one tensor rank."""
    stages = plan_stages(config)
    return {
        "layout": {"tp": config.layout.tp, "pp": config.layout.pp, "dp": config.layout.dp},
        "pattern": config.pattern.name,
        "stages": [_stage_report(config, stage) for stage in stages],
        "boundaries": [_boundary_report(stage) for stage in stages[:-1]],
        "totals": {policy: plan_run_transfer(config, policy).num_crossings for policy in ("least", "relay")},
    }


def _stage_report(config: Config, stage: StagePlan) -> dict[str, Any]:
    return {
        "stage_index": stage.stage_index,
        "layers": list(stage.layers),
        "parameters_per_tp_rank": _parameters_per_tp_rank(config, stage),
        "received_bytes": stage.received_bytes,
        "microbatches_in_flight": stage.peak_in_flight,
        "entries_in_flight_bytes": stage.peak_in_flight * stage.held_bytes,
    }


def _parameters_per_tp_rank(config: Config, stage: StagePlan) -> int:
    tp = config.parallel.tp
    specs = plan_parameters(
        config.model,
        stage.transfer,
        stage.layers,
        tp=tp,
        tp_rank=0,
        vocab_rows=padded_vocab_size(config.model.vocab_size, tp),
    )
    return count_parameters(specs)


def _boundary_report(stage: StagePlan) -> dict[str, Any]:
    shape = stage.shape
    return {
        "boundary": stage.stage_index,
        "raw_entries": list(stage.transfer.sent.raw_entries),
        "partial_sums": list(stage.transfer.sent.partial_sums),
        "entry_bytes": shape.entry_bytes,
        "residual_bytes": shape.residual_bytes,
        "bundle_bytes": stage.sent_bytes,
        "bytes_per_step": stage.sent_bytes * len(stage.actions) // 2,
        "ratio_to_residual": stage.sent_bytes / shape.residual_bytes,
    }


def stage_table(config: Config) -> str:
    """For people: a line a stage, a line a boundary."""
    report = plan_report(config)
    stages = [
        (
            str(stage["stage_index"]),
            _layers(stage["layers"]),
            f"{stage['parameters_per_tp_rank']:,}",
            str(stage["microbatches_in_flight"]),
            _bytes(stage["received_bytes"]),
            _bytes(stage["entries_in_flight_bytes"]),
        )
        for stage in report["stages"]
    ]
    boundaries = [
        (
            f"{boundary['boundary']} > {boundary['boundary'] + 1}",
            _layers(boundary["raw_entries"]),
            _layers(boundary["partial_sums"]),
            _bytes(boundary["residual_bytes"]),
            _bytes(boundary["entry_bytes"]),
            _bytes(boundary["bundle_bytes"]),
            f"{boundary['ratio_to_residual']:.2f}",
            _bytes(boundary["bytes_per_step"]),
        )
        for boundary in report["boundaries"]
    ]
    lines = [
        f"layout {config.layout}, pattern {report['pattern']}, policy {config.depth.policy}, schedule {config.pipeline.schedule}, "
        f"{config.pipeline.num_microbatches} microbatches of {config.microbatch_size} x {config.data.seq_length} tokens; "
        "bytes are of one microbatch on one tensor rank, forward",
        "",
        *_columns(("stage", "layers", "parameters/rank", "in flight", "received", "entries held"), stages),
    ]
    if boundaries:
        head = (
            "boundary",
            "raw entries of layers",
            "partial sums for layers",
            "residual",
            "an entry",
            "bundle",
            "x residual",
            "a step",
        )
        lines += ["", *_columns(head, boundaries)]
    totals = ", ".join(f"{policy} {count}" for policy, count in report["totals"].items())
    return "\n".join([*lines, "", f"entries and partial sums over all boundaries: {totals}"])


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]


def _layers(layers: Sequence[int]) -> str:
    """0-3, 7 for neighbours and single ones."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or "none"


def _bytes(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if value == int(value) else f"{value:.1f} {unit}"
