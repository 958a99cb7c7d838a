"""The loss of a run over steps, tokens and model FLOPs, and what is read from it. Pure; knows no file."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Losses where they were taken, steps ascending; at least one. tokens, flops: of all steps so far, all replicas."""

    steps: tuple[int, ...]
    tokens: tuple[int, ...]
    flops: tuple[int, ...]
    losses: tuple[float, ...]

    @property
    def final_loss(self) -> float:
        return self.losses[-1]

    @property
    def total_flops(self) -> int:
        return self.flops[-1]

    def find_loss_at(self, flops: float) -> float | None:
        """By linear interpolation; None before the first loss and after the last."""
        if not self.flops[0] <= flops <= self.flops[-1]:
            return None
        after = bisect_left(self.flops, flops)
        if self.flops[after] == flops:
            return self.losses[after]
        share = (flops - self.flops[after - 1]) / (self.flops[after] - self.flops[after - 1])
        return self.losses[after - 1] + share * (self.losses[after] - self.losses[after - 1])

    def find_flops_to(self, loss: float) -> float | None:
        """Where the curve's running minimum, straight between losses, first is as low as `loss`; None where it never is."""
        lowest = list(accumulate(self.losses, min))
        after = next((index for index, value in enumerate(lowest) if value <= loss), None)
        if not after:  # at once, or never
            return None if after is None else float(self.flops[0])
        share = (lowest[after - 1] - loss) / (lowest[after - 1] - lowest[after])
        return self.flops[after - 1] + share * (self.flops[after] - self.flops[after - 1])


def find_flops_share(curve: Curve, other: Curve) -> float | None:
    """FLOPs that `curve` takes to the other's final loss over those that the other takes; None where it never gets there.

    The other's are all of its FLOPs, unless its loss has been as low before: then those until there, so that a curve whose
    last loss is not its best gains nothing on itself.
    """
    reached, taken = (one.find_flops_to(other.final_loss) for one in (curve, other))
    if reached == taken:  # both at once, perhaps, with no FLOPs at all
        return 1.0
    return None if reached is None or not taken else reached / taken


def trailing_means(values: Sequence[float], window: int) -> list[float]:
    """The mean of each `window` values that follow one another; len(values) - window + 1 of them."""
    sums = [0.0, *accumulate(values)]
    return [(end - start) / window for start, end in zip(sums, sums[window:])]
