"""Training samples from token files: cut or whole, shuffled, blended by weight.

Sample `index` depends on the files, the seed, the split and `index` alone: not on the number of steps, the
layout or the process. It owns the order of samples; which rank reads which index is the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lime_dist.data.indexed import check_files
from lime_dist.data.marks import is_target
from lime_dist.data.sample_kinds import SOURCES
from lime_dist.data.sample_source import SampleSource, SourceOptions
from lime_dist.data.split import WHOLE, Split
from lime_dist.errors import DataError

# Blend weights are rounded to multiples of one part in this many, which is also the period of the blend.
BLEND_PERIOD = 100_000


class TokenSamples:
    """One split of a weighted blend of token files.

    A source is a prefix of token files and its weight, relative to the other weights. `split` is the range
    of every source's documents that is used. `samples` is how they become samples, a key of `SOURCES`.
    `vocab_size`, where given, is the model's: files and samples with larger ids are refused. `key` is
    the configuration key that errors name; `seed` is 0 or more; `between` is called after each source is open.

    Raises: DataError for files that are not whole, do not fit the vocabulary or hold less than one sample.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, float]],
        *,
        seq_length: int,
        seed: int,
        split: Split = WHOLE,
        samples: str = "stream",
        vocab_size: int | None = None,
        key: str = "data.train",
        between: Callable[[], None] = lambda: None,
    ) -> None:
        if not 0 <= split[0] < split[1] <= 1:
            raise DataError(f"{key}: the split {split} is not a range within 0 and 1; give two ascending fractions")
        self._blend = Blend(sources, key=key)
        self._seq_length = seq_length
        self._sources: list[SampleSource[Any]] = []
        for position, (prefix, _) in enumerate(sources):
            options = SourceOptions(
                seq_length=seq_length, split=split, entropy=(seed, position), vocab_size=vocab_size, key=key
            )
            self._sources.append(SOURCES[samples](check_files(prefix, key=key), options))
            between()

    @property
    def num_tokens(self) -> int:
        """Tokens of all sources within the split."""
        return sum(source.num_tokens for source in self._sources)

    @property
    def tokens_per_epoch(self) -> tuple[int, ...]:
        """For each source, the inputs of one epoch: of a stream the split's tokens less a tail shorter than a sample."""
        return tuple(source.samples_per_epoch * source.seq_length for source in self._sources)

    @property
    def samples_per_epoch(self) -> tuple[int, ...]:
        """For each source, its number of samples before it starts again in another order."""
        return tuple(source.samples_per_epoch for source in self._sources)

    @property
    def is_marked(self) -> bool:
        """Whether values may carry marks (`marks.py`), so that they are not the ids alone."""
        return any(source.is_marked for source in self._sources)

    def num_targets(self, start: int, count: int) -> int | None:
        """Of samples `start` to `start + count`, the targets that count in the loss; None: all, as nothing is marked.

        Reads no sample of a source without marks.
        """
        if not self.is_marked:
            return None
        return sum(self._num_targets_of(index) for index in range(start, start + count))

    def _num_targets_of(self, index: int) -> int:
        position, source_index = self._blend.locate(index)
        source = self._sources[position]
        if not source.is_marked:
            return self._seq_length
        return int(np.count_nonzero(is_target(source.sample(source_index)[1:])))

    def sample(self, index: int) -> np.ndarray:
        """int64 [seq_length + 1]: `seq_length` inputs, and the targets one token on; with marks where `is_marked`.

        Raises: DataError on a token id that the model lacks.
        """
        source_position, source_index = self._blend.locate(index)
        return self._sources[source_position].sample(source_index)

    def prepare(self, index: int, between: Callable[[], None]) -> None:
        """Shuffle what the samples from `index` on need, which may take long; `between` is called after each source."""
        for position, source in enumerate(self._sources):
            source.prepare(self._blend.count_before(index, position))
            between()

    def batch(self, start: int, count: int) -> torch.Tensor:
        """Samples `start` to `start + count`: int64 [count, seq_length + 1]."""
        return torch.from_numpy(np.stack([self.sample(index) for index in range(start, start + count)]))


class Blend:
    """Assigns a sample index to a source by weight, with the position within the source, for indices without end.

    The samples of each source are spread evenly over a period of `BLEND_PERIOD`, which then repeats: finding
    sample n needs no walk over the n samples before it, and no table that grows with the run.
    """

    def __init__(self, sources: Sequence[tuple[str, float]], *, key: str = "data.train") -> None:
        if not sources:
            raise DataError(f"{key}: no source is given; name at least one token file")
        for prefix, weight in sources:
            if not (weight > 0 and math.isfinite(weight)):
                raise DataError(f"{key}: the weight of {prefix} is {weight}; give a number above 0")
        self._counts = _apportion(np.array([weight for _, weight in sources]))
        for (prefix, weight), count in zip(sources, self._counts, strict=True):
            if count == 0:
                raise DataError(f"{key}: the weight {weight} of {prefix} is below 1/{BLEND_PERIOD} of all; raise it")
        source = np.repeat(np.arange(len(sources)), self._counts)
        rank = np.concatenate([np.arange(count) for count in self._counts])
        order = np.argsort((rank + 0.5) / self._counts[source], kind="stable")
        self._source_at, self._rank_at = source[order], rank[order]

    def locate(self, index: int) -> tuple[int, int]:
        """(position of the source, sample index within that source) of the blend's sample `index`."""
        period, place = divmod(index, BLEND_PERIOD)
        source = int(self._source_at[place])
        return source, period * int(self._counts[source]) + int(self._rank_at[place])

    def count_before(self, index: int, source: int) -> int:
        """The samples of `source` among the first `index` of the blend, hence its next one."""
        period, place = divmod(index, BLEND_PERIOD)
        return period * int(self._counts[source]) + int(np.count_nonzero(self._source_at[:place] == source))


def _apportion(weights: np.ndarray) -> np.ndarray:
    """Whole numbers in proportion to `weights` with the sum `BLEND_PERIOD` (largest remainders)."""
    shares = weights / weights.sum() * BLEND_PERIOD
    counts = np.floor(shares).astype(np.int64)
    missing = BLEND_PERIOD - counts.sum()
    counts[np.argsort(counts - shares, kind="stable")[:missing]] += 1
    return counts
