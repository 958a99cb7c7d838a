"""What all sources of samples have in common: a token file, its loss mask, and an order anew in each epoch.

Orders come from the raw bits of PCG64(SeedSequence([*entropy, epoch])), which all NumPy versions agree on (not so
`Generator.permutation`). Needs no torch.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from lime_dist.data.indexed import TokenFiles, open_mask, open_tokens
from lime_dist.data.marks import NOT_TARGET
from lime_dist.data.split import Split, require_vocabulary
from lime_dist.errors import DataError

_EPOCHS_KEPT = 2
Range = tuple[int, int]  # tokens of the file, the second not included
Order = TypeVar("Order")


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """vocab_size: the model's, None for any. key: what errors name."""

    seq_length: int
    split: Split
    entropy: tuple[int, ...]
    vocab_size: int | None
    key: str


class SampleSource(ABC, Generic[Order]):
    """Samples of one checked token file, in an order for each epoch.

    num_tokens: of the split. samples_per_epoch: before it starts again. is_marked: whether values may have marks.
    Raises: DataError for files that do not fit the vocabulary or hold no sample.
    """

    num_tokens: int
    samples_per_epoch: int
    is_marked: bool

    def __init__(self, files: TokenFiles, options: SourceOptions) -> None:
        if options.vocab_size is not None:
            require_vocabulary(files, options.vocab_size, key=options.key)
        self.seq_length = options.seq_length
        self._prefix, self._options = files.prefix, options
        self._vocab_size = sys.maxsize if options.vocab_size is None else options.vocab_size
        self._tokens = np.asarray(open_tokens(files))
        self._mask = np.asarray(open_mask(files)) if files.has_mask else None
        self._orders: dict[int, Order] = {}

    @abstractmethod
    def _draw_order(self, bits: np.random.PCG64) -> Order:
        """The order of one epoch."""

    @abstractmethod
    def _sample(self, order: Order, place: int) -> np.ndarray:
        """int64 [seq_length + 1], the sample at `place` of an epoch."""

    def prepare(self, index: int) -> None:
        """Draw the order of the epoch that sample `index` lies in."""
        self._order(index // self.samples_per_epoch)

    def sample(self, index: int) -> np.ndarray:
        """int64 [seq_length + 1], sample `index` of this source. Raises: DataError on an id outside the vocabulary."""
        epoch, place = divmod(index, self.samples_per_epoch)
        return self._sample(self._order(epoch), place)

    def _order(self, epoch: int) -> Order:
        if epoch not in self._orders:
            if len(self._orders) == _EPOCHS_KEPT:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = self._draw_order(self._bits(epoch))
        return self._orders[epoch]

    def _bits(self, epoch: int) -> np.random.PCG64:
        return np.random.PCG64(np.random.SeedSequence([*self._options.entropy, epoch]))

    def _read(self, ranges: Sequence[Range]) -> np.ndarray:
        """int64, the tokens of `ranges` one after the other, with the mask's marks. Raises: DataError as `sample`."""
        tokens = np.concatenate([self._tokens[start:stop] for start, stop in ranges])
        for token_id in (tokens.min(), tokens.max()):
            if not 0 <= token_id < self._vocab_size:  # an embedding would crash, or give 0 where tensor ranks share it
                raise DataError(
                    f"{self._options.key}: {self._prefix} has the token id {token_id}, the model a vocabulary of "
                    f"{self._vocab_size}; tokenize again with the model's tokenizer"
                )
        values = tokens.astype(np.int64)
        if self._mask is not None:
            mask = np.concatenate([self._mask[start:stop] for start, stop in ranges])
            values[mask == 0] |= NOT_TARGET
        return values


def shuffled(count: int, bits: np.random.PCG64) -> np.ndarray:
    return np.argsort(bits.random_raw(count), kind="stable")
