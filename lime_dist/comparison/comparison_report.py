"""A comparison as JSON, as rows of tables and in sentences. The text and the page are made of the same cells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from textwrap import wrap
from typing import Any

from lime_dist.comparison.comparing import Comparison, ReachedLoss
from lime_dist.comparison.estimates import Estimate
from lime_dist.comparison.variants import Variant, show_setting
from lime_dist.formats import format_si

MAX_WIDTH, NAME_WIDTH, SEEDS_WIDTH = 120, 24, 16
_PERCENT = 100


@dataclass(frozen=True, kw_only=True)
class Section:
    """A table, whose first column is the variant's name."""

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


def comparison_report(comparison: Comparison) -> dict[str, Any]:
    """Every figure; null where there is none. Errors are of the mean over seeds, null of one seed."""
    return {
        "metric": comparison.metric,
        "window_steps": comparison.window,
        "reference": comparison.reference.name,
        "equal_flops": comparison.equal_flops,
        "warnings": comparison.warnings,
        "variants": [_variant_report(comparison, index) for index in range(len(comparison.variants))],
    }


def _variant_report(comparison: Comparison, index: int) -> dict[str, Any]:
    variant = comparison.variants[index]
    figures = {
        "final_loss": comparison.final_loss(index),
        "final_difference": comparison.final_difference(index),
        "perplexity_ratio": _perplexity_ratio(comparison, index),
        "equal_flops_loss": comparison.equal_flops_loss(index),
        "equal_flops_difference": comparison.equal_flops_difference(index),
    }
    return {
        "name": variant.name,
        "is_reference": index == 0,
        "differs_from_reference": {key: pair[0] for key, pair in variant.differences(comparison.reference).items()},
        "parameters": variant.first.parameters,
        "model_flops_per_token": variant.first.flops_per_token,
        "runs": [
            {
                "folder": str(run.folder),
                "seed": seed,
                "steps": run.num_steps,
                "tokens": run.tokens[-1],
                "model_flops": run.flops[-1],
                "final_loss": comparison.curves[index][seed].final_loss,
            }
            for seed, run in variant.runs.items()
        ],
        **{name: value and asdict(value) for name, value in figures.items()},
        "flops_to_final_loss_of_reference": _reached_report(comparison.reached(index, 0)),
        "reference_flops_to_final_loss": _reached_report(comparison.reached(0, index)),
    }


def _perplexity_ratio(comparison: Comparison, index: int) -> Estimate | None:
    difference = comparison.final_difference(index)
    return difference and difference.exponential()


def _reached_report(reached: ReachedLoss) -> dict[str, Any]:
    return {"shares": dict(reached.shares), "saving": reached.saving and asdict(reached.saving)}


# ---- cells


def size_section(comparison: Comparison) -> Section:
    head = "variant", "parameters", "FLOPs a token", "tokens", "steps", "seeds"
    return Section(head=head, rows=[_size_row(variant) for variant in comparison.variants])


def _size_row(variant: Variant) -> tuple[str, ...]:
    """Of the run that went on longest."""
    longest = max(variant.runs.values(), key=lambda run: run.num_steps)
    sizes = variant.first.parameters, variant.first.flops_per_token, longest.tokens[-1]
    seeds = " ".join(map(str, variant.runs))
    seeds = seeds if len(seeds) <= SEEDS_WIDTH else _seeds(len(variant.runs))
    return variant.name, *map(format_si, sizes), f"{longest.num_steps:,}", seeds


def loss_section(comparison: Comparison) -> Section:
    equal = f"at {format_si(comparison.equal_flops)} FLOPs"
    head = "variant", "final loss", "difference", "perplexity ratio", equal, "difference"
    return Section(head=head, rows=[_loss_row(comparison, index) for index in range(len(comparison.variants))])


def _loss_row(comparison: Comparison, index: int) -> tuple[str, ...]:
    differences = ["reference"] * 3
    if index > 0:
        ratio = _perplexity_ratio(comparison, index)
        final, equal = comparison.final_difference(index), comparison.equal_flops_difference(index)
        differences = [_cell(final, "+"), _cell(ratio), _cell(equal, "+")]
    final_loss, equal_loss = _cell(comparison.final_loss(index)), _cell(comparison.equal_flops_loss(index))
    return comparison.variants[index].name, final_loss, *differences[:2], equal_loss, differences[2]


def _cell(value: Estimate | None, sign: str = "") -> str:
    """With its error, or of how few values it is; none where no seed has it, of a difference no seed in common."""
    if value is None:
        return "none"
    error = ", one seed" if value.standard_error is None else f" ± {value.standard_error:.4f}"
    return f"{value.mean:{sign}.4f}{error}"


# ---- sentences


def how_it_was_read(comparison: Comparison) -> str:
    runs = sum(len(variant.runs) for variant in comparison.variants)
    loss = {
        "eval_loss": "Held-out loss (eval_loss), each evaluation as it is",
        "loss": f"Train loss, the mean of the last {comparison.window} steps",
    }[comparison.metric]
    return (
        f"{loss}; {runs} {'run' if runs == 1 else 'runs'}; the reference is {comparison.reference.name}. Differences are to it, "
        "paired by seed; ± is the standard error of the mean over seeds."
    )


def savings(comparison: Comparison) -> list[str]:
    """Of each variant and the reference: what the better one saves to the other's final loss."""
    return [_saving(comparison, index) for index in range(1, len(comparison.variants))]


def _saving(comparison: Comparison, index: int) -> str:
    better, other = (index, 0) if comparison.is_better(index, 0) else (0, index)
    reached = comparison.reached(better, other)
    subject, target = comparison.variants[better].name, f"the final loss of [{comparison.variants[other].name}]"
    if not reached.shares:
        return f"[{subject}] and [{comparison.variants[other].name}] have no seed in common: FLOPs to a loss are not compared"
    if reached.saving is None:
        count = len(reached.shares)
        by = "" if reached.num_reached == 0 else f" by {count - reached.num_reached} of {count} seeds"
        return f"[{subject}]: {target} was not reached{by}"
    return f"[{subject}] takes {_percent(reached.saving)} FLOPs to {target} ({_seeds(reached.saving.count)})"


def _percent(saving: Estimate) -> str:
    word = "more" if saving.mean < 0 else "fewer"
    error = "" if saving.standard_error is None else f" ± {_PERCENT * saving.standard_error:.1f}"
    return f"{_PERCENT * abs(saving.mean):.1f}{error} % {word}"


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def differences(comparison: Comparison) -> Iterator[str]:
    """What each variant was given, and in brackets what the reference was."""
    for variant in comparison.variants[1:]:
        keys = [
            f"{key} {show_setting(key, ours)} ({show_setting(key, theirs)})"
            for key, (ours, theirs) in variant.differences(comparison.reference).items()
        ]
        yield f"[{variant.name}] differs from the reference in {', '.join(keys)}"


# ---- text


def comparison_table(comparison: Comparison) -> str:
    """For people: at most MAX_WIDTH columns."""
    sentences = [*savings(comparison), *differences(comparison)]
    parts = [
        _fill(how_it_was_read(comparison)),
        _aligned(size_section(comparison)),
        _aligned(loss_section(comparison)),
        "\n".join(map(_fill, sentences)),
    ]
    return "\n\n".join(part for part in parts if part)


def _fill(text: str) -> str:
    return "\n".join(wrap(text, MAX_WIDTH, subsequent_indent="  "))


def _aligned(section: Section) -> str:
    """Names to the left, over several lines where they are long; all else to the right."""
    lines = [line for row in (section.head, *section.rows) for line in _lines(row)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]
        ).rstrip()
        for line in lines
    )


def _lines(row: tuple[str, ...]) -> list[tuple[str, ...]]:
    first, *more = wrap(row[0], NAME_WIDTH, subsequent_indent="  ")
    return [(first, *row[1:]), *((text, *[""] * (len(row) - 1)) for text in more)]
