"""What came of it: a record for each way and limit, as JSON and as a Markdown table. Pure data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from lime_dist.bench.pipeline.ways import Way
from lime_dist.formats import format_rate


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One step of one way. cpu_seconds: of all hosts' processes together. sent, received: by host, None on loopback."""

    seconds: float
    cpu_seconds: float
    sent: list[int] | None
    received: list[int] | None


@dataclass(frozen=True, kw_only=True)
class Record:
    """One way under one limit; figures of the busiest card are those of the host for which the plan has most bytes.

    share: of LLaMA's step without limits, in which the busiest card carries the full pattern's; None: no limit.
    ratio: to the step of LLaMA under the same schedule in the same round, the median and the extremes of the rounds.
    sent_bytes, received_bytes: of the busiest card in a step as its own counters have it; None without hosts.
    peak_bytes: tensors of a step, weights left out, on the host that holds most.
    """

    model: str
    schedule: str
    share: float | None
    bytes_per_second: float | None
    llama_seconds: float
    seconds: list[float]
    cpu_seconds: float
    ratio: float
    ratio_range: tuple[float, float]
    planned_bytes: int
    sent_bytes: int | None
    received_bytes: int | None
    peak_bytes: int
    first_loss: float

    @property
    def counted_over_planned(self) -> float | None:
        """Of the two directions the one that is farther from the plan."""
        if self.sent_bytes is None or self.received_bytes is None:
            return None
        ratios = (self.sent_bytes / self.planned_bytes, self.received_bytes / self.planned_bytes)
        return max(ratios, key=lambda ratio: abs(ratio - 1))


def make_record(
    way: Way,
    turns: Sequence[Turn],
    twin: Sequence[Turn],
    *,
    share: float | None,
    bytes_per_second: float | None,
    llama_seconds: float,
    peak_bytes: int,
    first_loss: float,
) -> Record:
    """turns, twin: of the same rounds."""
    ratios = [turn.seconds / other.seconds for turn, other in zip(turns, twin, strict=True)]
    planned = way.card_bytes
    busiest = planned.index(max(planned))
    return Record(
        model=way.model,
        schedule=way.schedule,
        share=share,
        bytes_per_second=bytes_per_second,
        llama_seconds=llama_seconds,
        seconds=[turn.seconds for turn in turns],
        cpu_seconds=median(turn.cpu_seconds for turn in turns),
        ratio=median(ratios),
        ratio_range=(min(ratios), max(ratios)),
        planned_bytes=planned[busiest],
        sent_bytes=_median_of([turn.sent for turn in turns], busiest),
        received_bytes=_median_of([turn.received for turn in turns], busiest),
        peak_bytes=peak_bytes,
        first_loss=first_loss,
    )


def _median_of(counts: Sequence[list[int] | None], host: int) -> int | None:
    counted = [count[host] for count in counts if count is not None]
    return round(median(counted)) if counted else None


@dataclass(frozen=True, kw_only=True)
class Report:
    """circumstances: of the machine and the model, as in the JSON."""

    circumstances: dict[str, Any]
    records: list[Record]

    def to_json(self) -> dict[str, Any]:
        return {"circumstances": self.circumstances, "records": [asdict(record) for record in self.records]}

    def to_markdown(self) -> str:
        """A row for each way; for each limit the ratio to LLaMA's step and the seconds."""
        shares = list(dict.fromkeys(record.share for record in self.records))
        head = [
            "way",
            "schedule",
            *map(_share_head, shares),
            "CPU s",
            "MiB of the busiest card",
            "counted / planned",
            "peak MiB",
        ]
        by_way: dict[tuple[str, str], list[Record]] = {}
        for record in self.records:
            by_way.setdefault((record.model, record.schedule), []).append(record)
        rows = [[*way, *map(_ratio_cell, records), *_common_cells(records)] for way, records in by_way.items()]
        table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
        return f"{table}\n\n{self._legend()}"

    def _legend(self) -> str:
        limits = [
            f"{record.share:g}: {format_rate(record.bytes_per_second)} each way"
            for record in self.records[: len({record.share for record in self.records})]
            if record.share is not None and record.bytes_per_second is not None
        ]
        return (
            "Bold: the step over LLaMA's under the same schedule (torch and DeepSpeed, the growing tuple: over 1F1B's) in the "
            "same round, median (lowest to highest). A share of a step on the wire: the busiest card carries the bytes of "
            f"`least` under 1F1B in that share of an unlimited LLaMA step ({'; '.join(limits) or 'none: loopback'}). "
            "CPU s: of all hosts in a step without limits. Counted: with headers, by the card, the limit farthest from the plan."
        )


def _share_head(share: float | None) -> str:
    return "no limit" if share is None else f"{share:g} of a step on the wire"


def _ratio_cell(record: Record) -> str:
    lowest, highest = record.ratio_range
    return f"**{record.ratio:.2f}** ({lowest:.2f} to {highest:.2f}), {median(record.seconds):.2f} s"


def _common_cells(records: Sequence[Record]) -> list[str]:
    counted = [ratio for record in records if (ratio := record.counted_over_planned) is not None]
    farthest = f"{max(counted, key=lambda ratio: abs(ratio - 1)):.3f}" if counted else "-"
    first = records[0]
    return [
        f"{first.cpu_seconds:.2f}",
        f"{first.planned_bytes / 2**20:.1f}",
        farthest,
        f"{first.peak_bytes / 2**20:.0f}",
    ]
