"""The loss on held-out text. Collective: world."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from lime_dist.data.dataset import TokenSamples
from lime_dist.training.joint_stop import JointStop
from lime_dist.training.rank import Rank


def evaluate_batches(rank: Rank, held_out: TokenSamples, stop: JointStop) -> float | None:
    """Mean loss over the first `eval.batches` global batches of the held-out text; None when stopped. Collective: world."""
    size = rank.config.data.global_batch_size
    batches = [SampleBatch(held_out, index * size, size) for index in range(rank.config.eval.batches)]
    return rank.evaluate(batches, stop.agreed)


class SampleBatch:
    """`size` consecutive samples, read when sliced, so that each rank reads only its own rows."""

    def __init__(self, samples: TokenSamples, start: int, size: int):
        self._samples, self._start, self._size = samples, start, size

    def __getitem__(self, rows: slice) -> Tensor:
        """int64 [rows, seq + 1]."""
        return self._samples.batch(self._start + rows.start, rows.stop - rows.start)

    @cached_property
    def num_targets(self) -> int | None:
        """Those that count in the loss; None: all."""
        return self._samples.num_targets(self._start, self._size)
