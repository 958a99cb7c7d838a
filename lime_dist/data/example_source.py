"""Samples of whole documents, for tasks whose documents are examples: one a sample, or as many as fit.

Values are marked (`marks.py`): documents do not see one another, and padding is no target. Padding repeats the last
token of the document before it, which is the end of that document.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from lime_dist.data.indexed import TokenFiles
from lime_dist.data.marks import BEGINS, NOT_TARGET
from lime_dist.data.sample_source import SampleSource, SourceOptions, shuffled
from lime_dist.data.split import whole_documents

# In the place of an epoch, for the order in which documents are packed: no run gets there.
_PACKING = 2**32 - 1


class ExampleSource(SampleSource[np.ndarray]):
    """A sample is a group of documents; each epoch has the groups in another order.

    Raises: DataError, beside the usual, for a document that is longer than a sample.
    """

    is_marked = True

    def __init__(self, files: TokenFiles, options: SourceOptions) -> None:
        super().__init__(files, options)
        self._starts, self._stops = whole_documents(files, options.split, seq_length=self.seq_length, key=options.key)
        self.num_tokens = int((self._stops - self._starts).sum())
        self._documents, self._groups = self._group()
        self.samples_per_epoch = len(self._groups) - 1

    @abstractmethod
    def _group(self) -> tuple[np.ndarray, np.ndarray]:
        """Documents in an order, and int64 [samples + 1]: where each sample begins within them."""

    def _draw_order(self, bits: np.random.PCG64) -> np.ndarray:
        return shuffled(self.samples_per_epoch, bits)

    def _sample(self, order: np.ndarray, place: int) -> np.ndarray:
        first, last = self._groups[order[place]], self._groups[order[place] + 1]
        documents = self._documents[first:last]
        starts, stops = self._starts[documents], self._stops[documents]
        ends = np.cumsum(stops - starts)
        values = np.empty(self.seq_length + 1, dtype=np.int64)
        values[: ends[-1]] = self._read(list(zip(starts.tolist(), stops.tolist())))
        values[[0, *ends[:-1]]] |= BEGINS | NOT_TARGET
        values[ends[-1] :] = int(self._tokens[stops[-1] - 1]) | NOT_TARGET  # behind all that counts, so it may see all
        return values


class PaddedSource(ExampleSource):
    """One document a sample."""

    def _group(self) -> tuple[np.ndarray, np.ndarray]:
        count = len(self._starts)
        return np.arange(count), np.arange(count + 1)


class PackedSource(ExampleSource):
    """As many documents a sample as fit, taken in a shuffled order, greedily.

    The groups are the same in all epochs, so that epochs have the same number of samples; documents that do not see one
    another do not mind.
    """

    def _group(self) -> tuple[np.ndarray, np.ndarray]:
        documents = shuffled(len(self._starts), self._bits(_PACKING))
        ends = np.cumsum((self._stops - self._starts)[documents])
        groups, filled = [0], 0
        while groups[-1] < len(ends):
            groups.append(int(np.searchsorted(ends, filled + self.seq_length + 1, side="right")))
            filled = ends[groups[-1] - 1]
        return documents, np.array(groups)
