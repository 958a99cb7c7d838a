"""What makes a comparison of runs unfair or rough, a line each. Knows no figure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from lime_dist.comparison.variants import Variant, show_setting

_TEXT_KEYS = ("data.train", "data.valid", "data.valid_fraction", "data.seq_length", "data.samples")
MIN_EVALUATIONS = 10  # with fewer, straight lines between them lie far above a curve that falls ever more slowly
_START_KEY = "checkpoint.weights_from"
_SCHEDULE_KEYS = ("run.steps", "optim.lr_schedule", "optim.warmup_steps", "optim.min_lr")


def find_unfairness(variants: Sequence[Variant], metric: str) -> list[str]:
    """Warnings; none where all variants saw the same text, as many tokens a step and steps, seed for seed, and are well known."""
    warnings = [*_other_settings(variants, metric), *_other_seeds(variants), *_unfinished(variants)]
    return [*warnings, *(_few_evaluations(variants) if metric == "eval_loss" else [])]


def _other_settings(variants: Sequence[Variant], metric: str) -> Iterator[str]:
    for key in _TEXT_KEYS:
        if values := _differing(variants, partial(_setting, key)):
            yield f"{key}: the variants were not given the same text ({values})"
    if values := _differing(variants, lambda variant: variant.config.tokens_per_step):
        yield f"data.global_batch_size: the variants take different numbers of tokens a step ({values})"
    if values := _differing(variants, partial(_setting, _START_KEY)):
        yield f"{_START_KEY}: the variants begin with other weights, whose training is not in these FLOPs ({values})"
    for key in _SCHEDULE_KEYS:
        if values := _differing(variants, partial(_setting, key)):
            yield f"{key}: the learning rates of the variants follow different schedules ({values})"
    held_out = _differing(variants, lambda variant: variant.config.eval.batches * variant.config.tokens_per_step)
    if metric == "eval_loss" and held_out:
        yield f"eval.batches: the variants were evaluated on different numbers of tokens ({held_out})"


def _setting(key: str, variant: Variant) -> str:
    return show_setting(key, variant.settings[key])


def _differing(variants: Sequence[Variant], value: Callable[[Variant], Any]) -> str | None:
    """Each variant's value in words, where they are not all one."""
    values = [value(variant) for variant in variants]
    if all(one == values[0] for one in values):
        return None
    return "; ".join(f"{variant.name}: {one}" for variant, one in zip(variants, values))


def _other_seeds(variants: Sequence[Variant]) -> Iterator[str]:
    if values := _differing(variants, lambda variant: " ".join(map(str, variant.runs))):
        unequal = len({len(variant.runs) for variant in variants}) > 1
        yield f"run.seed: the variants have {'unequal numbers of' if unequal else 'other'} seeds ({values})"


def _unfinished(variants: Sequence[Variant]) -> Iterator[str]:
    for run in (run for variant in variants for run in variant.runs.values()):
        if not run.is_finished:
            yield f"{run.folder}: has not finished: {run.num_steps} of {run.config.run.steps} steps"


def _few_evaluations(variants: Sequence[Variant]) -> Iterator[str]:
    fewest = min((run for variant in variants for run in variant.runs.values()), key=lambda run: len(run.evaluations))
    if len(fewest.evaluations) < MIN_EVALUATIONS:
        yield (
            f"{fewest.folder}: has {len(fewest.evaluations)} evaluations, between which losses are only guessed; for loss at equal "
            "FLOPs and FLOPs to a loss compare by --metric loss, or train with a lower eval.every"
        )
