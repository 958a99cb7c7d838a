"""Training samples from token files: packed, shuffled, blended by weight.

Sample `index` depends on the files, the seed, the split and `index` alone: not on the number of steps, the
layout or the process. It owns the order of samples; which rank reads which index is the caller's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lime_dist.data.indexed import check_files, open_tokens
from lime_dist.data.split import WHOLE, Split, cut_documents, num_samples, require_vocabulary
from lime_dist.errors import DataError

# Blend weights are rounded to multiples of one part in this many, which is also the period of the blend.
BLEND_PERIOD = 100_000
_EPOCHS_KEPT = 2


class TokenSamples:
    """One split of a weighted blend of token files.

    A source is a prefix of token files and its weight, relative to the other weights. `split` is the range
    of every source's documents that is used.
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
        vocab_size: int | None = None,
        key: str = "data.train",
        between: Callable[[], None] = lambda: None,
    ) -> None:
        if not 0 <= split[0] < split[1] <= 1:
            raise DataError(f"{key}: the split {split} is not a range within 0 and 1; give two ascending fractions")
        self._blend = Blend(sources, key=key)
        self._sources: list[PackedSource] = []
        for position, (prefix, _) in enumerate(sources):
            source = PackedSource(
                prefix,
                seq_length=seq_length,
                split=split,
                entropy=(seed, position),
                vocab_size=vocab_size,
                key=key,
            )
            self._sources.append(source)
            between()

    @property
    def num_tokens(self) -> int:
        """Tokens of all sources within the split."""
        return sum(source.num_tokens for source in self._sources)

    @property
    def tokens_per_epoch(self) -> tuple[int, ...]:
        """For each source, the tokens that one epoch reads: those of the split less a tail shorter than a sample."""
        return tuple(source.samples_per_epoch * source.seq_length for source in self._sources)

    @property
    def samples_per_epoch(self) -> tuple[int, ...]:
        """For each source, its number of samples before it starts again in another order."""
        return tuple(source.samples_per_epoch for source in self._sources)

    def sample(self, index: int) -> np.ndarray:
        """int64 [seq_length + 1]: `seq_length` inputs, and the targets one token on.

        Raises: DataError on a token id that the model lacks.
        """
        source_position, source_index = self._blend.locate(index)
        return self._sources[source_position].sample(source_index)

    def num_targets(self, start: int, count: int) -> int:
        """The targets that count in the loss, of samples `start` to `start + count`."""
        return count * self._sources[0].seq_length

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


@dataclass(frozen=True)
class _Epoch:
    """The order of `documents` in its stream, where each `ends`, and the order of `samples`."""

    documents: np.ndarray
    ends: np.ndarray
    samples: np.ndarray


class PackedSource:
    """One token file: in each epoch its documents are joined in a new order, cut into samples, and these shuffled.

    Sample k of the stream is tokens k * seq_length to (k + 1) * seq_length, the last one included: neighbours share
    a token, and every token is an input once an epoch, up to the tail. The orders come from the raw bits of
    PCG64(SeedSequence([*entropy, epoch])), which all NumPy versions agree on (not so `Generator.permutation`).
    """

    def __init__(
        self,
        prefix: str,
        *,
        seq_length: int,
        split: Split,
        entropy: tuple[int, ...],
        vocab_size: int | None,
        key: str,
    ) -> None:
        files = check_files(prefix, key=key)
        if vocab_size is not None:
            require_vocabulary(files, vocab_size, key=key)
        self.seq_length = seq_length
        self._prefix, self._key, self._entropy = prefix, key, entropy
        self._vocab_size = sys.maxsize if vocab_size is None else vocab_size
        self._tokens = open_tokens(files)
        bounds = cut_documents(files, split, seq_length=seq_length, key=key)
        self._starts, self._lengths = bounds[:-1], np.diff(bounds)
        self.num_tokens = int(bounds[-1] - bounds[0])
        self.samples_per_epoch = num_samples(bounds, seq_length)
        self._epochs: dict[int, _Epoch] = {}

    def prepare(self, index: int) -> None:
        """Make the order of the epoch that sample `index` lies in."""
        self._epoch(index // self.samples_per_epoch)

    def sample(self, index: int) -> np.ndarray:
        """int64 [seq_length + 1], sample `index` of this source. Raises: DataError on an id outside the vocabulary."""
        epoch_index, place = divmod(index, self.samples_per_epoch)
        epoch = self._epoch(epoch_index)
        tokens = self._read(epoch, int(epoch.samples[place]) * self.seq_length, self.seq_length + 1)
        for token_id in (tokens.min(), tokens.max()):
            if not 0 <= token_id < self._vocab_size:  # an embedding would crash, or give 0 where tensor ranks share it
                raise DataError(
                    f"{self._key}: {self._prefix} has the token id {token_id}, the model a vocabulary of "
                    f"{self._vocab_size}; tokenize again with the model's tokenizer"
                )
        return tokens

    def _read(self, epoch: _Epoch, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the epoch's stream, which may cross documents."""
        tokens = np.empty(count, dtype=np.int64)
        place = int(np.searchsorted(epoch.ends, start, side="right"))
        filled = 0
        while filled < count:
            document = epoch.documents[place]
            left = int(epoch.ends[place]) - start - filled
            stop = int(self._starts[document] + self._lengths[document])
            taken = min(left, count - filled)
            tokens[filled : filled + taken] = self._tokens[stop - left : stop - left + taken]
            filled += taken
            place += 1
        return tokens

    def _epoch(self, epoch_index: int) -> _Epoch:
        if epoch_index not in self._epochs:
            if len(self._epochs) == _EPOCHS_KEPT:
                del self._epochs[next(iter(self._epochs))]
            bits = np.random.PCG64(np.random.SeedSequence([*self._entropy, epoch_index]))
            documents = _shuffled(len(self._lengths), bits)
            samples = _shuffled(self.samples_per_epoch, bits)
            self._epochs[epoch_index] = _Epoch(documents, np.cumsum(self._lengths[documents]), samples)
        return self._epochs[epoch_index]


def _shuffled(count: int, bits: np.random.PCG64) -> np.ndarray:
    return np.argsort(bits.random_raw(count), kind="stable")
