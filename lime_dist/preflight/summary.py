"""What a preflight found, as JSON and as text: the map of ranks, bad hosts, bandwidths. Pure data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from lime_dist.formats import RECENT_STEPS, format_bytes, format_rate
from lime_dist.layout import Layout
from lime_dist.plan.run_plan import RunPlan
from lime_dist.plan.table import align_columns, format_layers
from lime_dist.preflight.fabric import Crossing
from lime_dist.training.records import RECENT_BYTES, read_records

SLOW_SHARE = 0.25  # of the median boundary's bandwidth; below it a boundary is worth a warning


def rank_report(layout: Layout, hosts: Mapping[int, str]) -> list[dict[str, Any]]:
    """Each rank's host and place; `hosts`: of the ranks that came."""
    places = ((rank, layout.coordinate(rank)) for rank in sorted(hosts))
    return [
        {"rank": rank, "host": hosts[rank], "pp": place.pp_rank, "dp": place.dp_rank, "tp": place.tp_rank}
        for rank, place in places
    ]


def boundary_reports(plan: RunPlan, crossings: Sequence[Crossing], step_seconds: float | None) -> list[dict[str, Any]]:
    """For each boundary its bandwidths, what the plan needs of it in a step, and the slowest pair's ranks.

    Bandwidths are bytes a second of one pair. bytes_per_step: of one tensor rank, forward; as many come back.
    share_of_step: None without a measured step.
    """
    reports = []
    for boundary, boundary_bytes in enumerate(plan.boundary_bytes):
        own = [crossing for crossing in crossings if crossing.boundary == boundary]
        speeds = {name: [c.bytes_per_second for c in own if c.direction == name] for name in ("forward", "backward")}
        slowest = min(own, key=lambda crossing: crossing.bytes_per_second)
        bytes_per_step = boundary_bytes * plan.num_microbatches
        seconds = sum(bytes_per_step / min(speed) for speed in speeds.values())
        reports.append(
            {
                "boundary": boundary,
                "message_bytes": slowest.message_bytes,
                "bytes_sent": sum(crossing.bytes_sent for crossing in own),
                **{name: {"min": min(speed), "median": median(speed)} for name, speed in speeds.items()},
                "slowest": [slowest.rank, slowest.peer],
                "bytes_per_step": bytes_per_step,
                "seconds_per_step": seconds,
                "share_of_step": seconds / step_seconds if step_seconds else None,
            }
        )
    return reports


def slow_boundaries(boundaries: Sequence[Mapping[str, Any]], hosts: Mapping[int, str]) -> list[str]:
    """A warning for each boundary that is much slower than the others; it may be so by design."""
    speeds = [min(report["forward"]["min"], report["backward"]["min"]) for report in boundaries]
    warnings = []
    for report, speed in zip(boundaries, speeds):
        if speed < SLOW_SHARE * median(speeds):
            index, (first, second) = report["boundary"], report["slowest"]
            warnings.append(
                f"boundary {index}>{index + 1} is slow: {format_rate(speed)} from host {hosts[first]} (rank {first}) "
                f"to host {hosts[second]} (rank {second}), {format_rate(median(speeds))} over the median boundary"
            )
    return warnings


def measured_step_seconds(run_dir: Path) -> float | None:
    """The median of the run's last steps; None before its first."""
    records = read_records(run_dir / "metrics.jsonl", RECENT_BYTES)
    steps = [record["step_seconds"] for record in records if "step_seconds" in record]
    return median(steps[-RECENT_STEPS:]) if steps else None


# ---- text


def report_text(report: Mapping[str, Any]) -> str:
    """For people: the map, a line a host; then, of good hosts, a line a boundary."""
    lines = host_lines(report["ranks"])
    if report["all_reduce_seconds"] is not None:
        lines += [
            "",
            f"all-reduce of 1 MiB over {len(report['ranks'])} ranks: {report['all_reduce_seconds'] * 1e3:.1f} ms",
        ]
    if report["boundaries"]:
        lines += ["", *_boundary_table(report["boundaries"])]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in report["warnings"])])


def host_lines(ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    """`n1: ranks 0-1, stage 0`; replicas and tensor ranks where there are several."""
    return [_host_line(host, [place for place in ranks if place["host"] == host], ranks) for host in _hosts(ranks)]


def _hosts(ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(place["host"] for place in ranks))


def _host_line(host: str, own: Sequence[Mapping[str, Any]], ranks: Sequence[Mapping[str, Any]]) -> str:
    parts = [_numbers("rank", "rank", own), _numbers("stage", "pp", own)]
    for name, key in (("replica", "dp"), ("tensor rank", "tp")):
        if any(place[key] for place in ranks):
            parts.append(_numbers(name, key, own))
    return f"{host}: {', '.join(parts)}"


def _numbers(name: str, key: str, places: Sequence[Mapping[str, Any]]) -> str:
    numbers = sorted({place[key] for place in places})
    return f"{name}{'s' if len(numbers) > 1 else ''} {format_layers(numbers)}"


def _boundary_table(boundaries: Sequence[Mapping[str, Any]]) -> list[str]:
    head = (
        "boundary",
        "message",
        "forward: slowest",
        "median",
        "backward: slowest",
        "median",
        "bytes a step",
        "transfer",
        "of a step",
    )
    return align_columns(head, [_boundary_row(report) for report in boundaries])


def _boundary_row(report: Mapping[str, Any]) -> tuple[str, ...]:
    share = report["share_of_step"]
    return (
        f"{report['boundary']}>{report['boundary'] + 1}",
        format_bytes(report["message_bytes"]),
        *(format_rate(report[name][which]) for name in ("forward", "backward") for which in ("min", "median")),
        f"2 x {format_bytes(report['bytes_per_step'])}",
        f"{report['seconds_per_step'] * 1e3:.2f} ms",
        "-" if share is None else f"{share:.1%}",
    )


def bad_lines(bad: Mapping[str, Sequence[str]]) -> list[str]:
    """A line a host, the last of what is printed; of ranks whose host is unknown, what is known."""
    return [
        f"host {host} is bad: {'; '.join(problems)}" if host else f"{'; '.join(problems)} (their host is unknown)"
        for host, problems in bad.items()
    ]
