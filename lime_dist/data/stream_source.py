"""Samples cut from a stream: in each epoch the documents are joined in a new order, cut, and the samples shuffled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lime_dist.data.indexed import TokenFiles
from lime_dist.data.sample_source import Range, SampleSource, SourceOptions, shuffled
from lime_dist.data.split import cut_documents, num_samples


@dataclass(frozen=True)
class StreamOrder:
    """The order of `documents` in the stream, where each `ends`, and the order of `samples`."""

    documents: np.ndarray
    ends: np.ndarray
    samples: np.ndarray


class StreamSource(SampleSource[StreamOrder]):
    """Sample k of the stream is tokens k * seq_length to (k + 1) * seq_length, the last one included: neighbours share
    a token, and every token is an input once an epoch, up to the tail.
    """

    def __init__(self, files: TokenFiles, options: SourceOptions) -> None:
        super().__init__(files, options)
        bounds = cut_documents(files, options.split, seq_length=self.seq_length, key=options.key)
        self._starts, self._lengths = bounds[:-1], np.diff(bounds)
        self.num_tokens = int(bounds[-1] - bounds[0])
        self.samples_per_epoch = num_samples(bounds, self.seq_length)
        self.is_marked = files.has_mask

    def _draw_order(self, bits: np.random.PCG64) -> StreamOrder:
        documents = shuffled(len(self._lengths), bits)
        samples = shuffled(self.samples_per_epoch, bits)
        return StreamOrder(documents, np.cumsum(self._lengths[documents]), samples)

    def _sample(self, order: StreamOrder, place: int) -> np.ndarray:
        return self._read(self._ranges(order, int(order.samples[place]) * self.seq_length, self.seq_length + 1))

    def _ranges(self, order: StreamOrder, start: int, count: int) -> list[Range]:
        """Where tokens [start, start + count) of the epoch's stream are, which may cross documents."""
        ranges = []
        place = int(np.searchsorted(order.ends, start, side="right"))
        filled = 0
        while filled < count:
            document = order.documents[place]
            left = int(order.ends[place]) - start - filled
            stop = int(self._starts[document] + self._lengths[document])
            taken = min(left, count - filled)
            ranges.append((stop - left, stop - left + taken))
            filled += taken
            place += 1
        return ranges
