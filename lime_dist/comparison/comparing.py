"""The figures of a comparison: each variant against the first one, the reference. Pure data; seeds are paired."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from lime_dist.comparison.curves import Curve, find_flops_share
from lime_dist.comparison.estimates import Estimate, estimate, paired_difference
from lime_dist.comparison.fairness import find_unfairness
from lime_dist.comparison.run_folders import METRICS, RecordedRun
from lime_dist.comparison.variants import Variant, group_runs

MAX_WINDOW, WINDOW_SHARE = 100, 20  # steps; the window is no more than 1/20 of the shortest run


@dataclass(frozen=True, kw_only=True)
class ReachedLoss:
    """shares: by seed, FLOPs to the other's final loss over the FLOPs that the other took; None where never reached."""

    shares: Mapping[int, float | None]

    @property
    def num_reached(self) -> int:
        return sum(share is not None for share in self.shares.values())

    @property
    def saving(self) -> Estimate | None:
        """The part of the FLOPs that is saved, a fraction of 1; None unless all seeds got there: those that did are no fair sample."""
        savings = [1 - share for share in self.shares.values() if share is not None]
        return estimate(savings) if savings and len(savings) == len(self.shares) else None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """curves: by variant, then by seed. window: steps that each train loss is the mean of; 1 for evaluations."""

    metric: str
    window: int
    variants: tuple[Variant, ...]
    curves: tuple[Mapping[int, Curve], ...]

    @property
    def reference(self) -> Variant:
        return self.variants[0]

    @cached_property
    def equal_flops(self) -> int:
        """The most that all runs reached."""
        return min(curve.total_flops for curves in self.curves for curve in curves.values())

    @property
    def warnings(self) -> list[str]:
        return find_unfairness(self.variants, self.metric)

    def final_loss(self, index: int) -> Estimate:
        return estimate(list(self._final(index).values()))

    def final_difference(self, index: int) -> Estimate | None:
        """To the reference, of the seeds that both have; None where there are none."""
        return paired_difference(self._final(index), self._final(0))

    def equal_flops_loss(self, index: int) -> Estimate | None:
        """None where no run's first loss was taken by then."""
        losses = self._at_equal_flops(index)
        return estimate(list(losses.values())) if losses else None

    def equal_flops_difference(self, index: int) -> Estimate | None:
        return paired_difference(self._at_equal_flops(index), self._at_equal_flops(0))

    def reached(self, index: int, other: int) -> ReachedLoss:
        """How soon a variant reached another's final loss."""
        curves, others = self.curves[index], self.curves[other]
        seeds = sorted(curves.keys() & others.keys())
        return ReachedLoss(shares={seed: find_flops_share(curves[seed], others[seed]) for seed in seeds})

    def is_better(self, index: int, other: int) -> bool:
        """By final loss, of the seeds that both have if there are any; a draw counts."""
        difference = paired_difference(self._final(index), self._final(other))
        ours, theirs = self.final_loss(index).mean, self.final_loss(other).mean
        return (ours - theirs if difference is None else difference.mean) <= 0

    def _final(self, index: int) -> dict[int, float]:
        return self._read(index, lambda curve: curve.final_loss)

    def _at_equal_flops(self, index: int) -> dict[int, float]:
        return self._read(index, lambda curve: curve.find_loss_at(self.equal_flops))

    def _read(self, index: int, read: Callable[[Curve], float | None]) -> dict[int, float]:
        values = {seed: read(curve) for seed, curve in self.curves[index].items()}
        return {seed: value for seed, value in values.items() if value is not None}


def compare_runs(runs: Sequence[RecordedRun], metric: str | None = None) -> Comparison:
    """metric: of METRICS; None for eval_loss where all runs have two evaluations, else loss.

    Raises: RunFolderError for runs without the metric, and for two runs of a variant with one seed.
    """
    if metric is None:
        metric = "eval_loss" if all(run.has_evaluations for run in runs) else "loss"
    assert metric in METRICS
    shortest = min(run.num_steps for run in runs)
    window = max(1, min(MAX_WINDOW, shortest // WINDOW_SHARE)) if metric == "loss" else 1
    variants = group_runs(runs)
    curves = tuple({seed: run.curve(metric, window) for seed, run in variant.runs.items()} for variant in variants)
    return Comparison(metric=metric, window=window, variants=variants, curves=curves)
