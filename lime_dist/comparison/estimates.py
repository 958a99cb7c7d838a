"""Means over seeds, and their errors. Pure; knows no run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """standard_error: of the mean, by the sample's standard deviation; None of one value, which says nothing of it."""

    mean: float
    standard_error: float | None
    count: int

    def exponential(self) -> Estimate:
        """Of exp(x), with the error carried over to first order: a loss difference as a perplexity ratio."""
        mean = math.exp(self.mean)
        error = None if self.standard_error is None else mean * self.standard_error
        return Estimate(mean=mean, standard_error=error, count=self.count)


def estimate(values: Sequence[float]) -> Estimate:
    """values: at least one."""
    count = len(values)
    error = statistics.stdev(values) / math.sqrt(count) if count > 1 else None
    return Estimate(mean=statistics.fmean(values), standard_error=error, count=count)


def paired_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Estimate | None:
    """first - second, pair by pair of those that both have; None where they share none."""
    differences = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    return estimate(differences) if differences else None
