"""The rows of global batches that a replica trains on, read while the step before runs. Knows no device and no ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

ReadSamples = Callable[[int, int], Tensor]  # first sample, count -> int64 [count, seq + 1]
CountTargets = Callable[[int, int], int | None]  # first sample, count -> those that count in the loss; None: all


class BatchAhead:
    """A global batch of which a thread reads the rows that will be asked for."""

    def __init__(self, reading: dict[tuple[int, int], Future[Tensor]], counting: Future[int | None]):
        self._reading, self._counting = reading, counting

    def __getitem__(self, rows: slice) -> Tensor:
        """int64 [rows, seq + 1]. Raises: what the reading raised."""
        return self._reading[rows.start, rows.stop].result()

    @property
    def num_targets(self) -> int | None:
        """Those of the whole global batch that count in the loss; None: all. Raises: what the reading raised."""
        return self._counting.result()


class BatchReader:
    """Global batches of consecutive samples, one ahead, for the time of a `with`.

    rows: those that will be asked for, in this order. stop: the sample before which reading ahead ends, which may be moved.
    The samples are read by one thread alone, in the order in which they are used.
    """

    def __init__(
        self,
        read: ReadSamples,
        rows: Sequence[slice],
        batch_size: int,
        stop: int,
        count_targets: CountTargets = lambda start, count: None,
    ):
        self._read, self._rows, self._batch_size, self.stop = read, rows, batch_size, stop
        self._count_targets = count_targets
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._ahead: dict[int, BatchAhead] = {}  # by first sample

    def __enter__(self) -> BatchReader:
        return self

    def __exit__(self, *_: object) -> None:
        """No longer than one microbatch's reading is waited for, and that at the end of the process only."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def batch(self, start: int) -> BatchAhead:
        """The global batch whose first sample is `start`; the next one begins to be read."""
        batch = self._ahead.pop(start, None) or self._begin(start)
        following = start + self._batch_size
        self._ahead = {following: self._begin(following)} if following < self.stop else {}
        return batch

    def _begin(self, start: int) -> BatchAhead:
        counting = self._thread.submit(self._count_targets, start, self._batch_size)
        reading = {
            (rows.start, rows.stop): self._thread.submit(self._read, start + rows.start, rows.stop - rows.start)
            for rows in self._rows
        }
        return BatchAhead(reading, counting)
