"""Batches read ahead by a thread: those that were asked for, in order, no further than the run, errors where they are used."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from lime_dist.errors import DataError
from lime_dist.training.batches import BatchReader

ROWS = [slice(0, 2), slice(4, 6)]  # the first of two replicas, two microbatches of two rows


class Samples:
    """Sample k is the number k. bad: the first sample that cannot be read."""

    def __init__(self, bad: int = 10**9):
        self.bad, self.reads, self.threads = bad, [], set()
        self.has_read = threading.Semaphore(0)

    def read(self, start: int, count: int) -> Tensor:
        self.threads.add(threading.current_thread())
        self.reads.append(start)
        self.has_read.release()
        if start >= self.bad:
            raise DataError(f"sample {start} cannot be read")
        return torch.arange(start, start + count)

    def await_reads(self, count: int) -> None:
        for _ in range(count):
            assert self.has_read.acquire(timeout=30)


def rows_of(reader: BatchReader, start: int) -> list[list[int]]:
    batch = reader.batch(start)
    return [batch[rows].tolist() for rows in ROWS]


def test_the_rows_of_each_batch_in_order_and_none_behind_the_last() -> None:
    samples = Samples()
    with BatchReader(samples.read, ROWS, batch_size=8, stop=24) as reader:
        assert [rows_of(reader, start) for start in (0, 8, 16)] == [
            [[0, 1], [4, 5]],
            [[8, 9], [12, 13]],
            [[16, 17], [20, 21]],
        ]
    assert samples.reads == [0, 4, 8, 12, 16, 20]
    assert len(samples.threads) == 1 and threading.current_thread() not in samples.threads


def test_the_next_batch_is_read_before_it_is_asked_for() -> None:
    samples = Samples()
    with BatchReader(samples.read, ROWS, batch_size=8, stop=24) as reader:
        reader.batch(0)
        samples.await_reads(4)
        assert samples.reads == [0, 4, 8, 12]


def test_another_batch_than_the_next_one() -> None:
    with BatchReader(Samples().read, ROWS, batch_size=8, stop=1000) as reader:
        assert rows_of(reader, 0) == [[0, 1], [4, 5]]
        assert rows_of(reader, 80) == [[80, 81], [84, 85]]


def test_an_error_is_raised_where_the_batch_is_used() -> None:
    samples = Samples(bad=12)
    with BatchReader(samples.read, ROWS, batch_size=8, stop=24) as reader:
        rows_of(reader, 0)
        batch = reader.batch(8)
        assert batch[ROWS[0]].tolist() == [8, 9]
        with pytest.raises(DataError, match="sample 12 cannot"):
            batch[ROWS[1]]


def test_the_thread_ends_with_the_run() -> None:
    samples = Samples()
    with BatchReader(samples.read, ROWS, batch_size=8, stop=10**6) as reader:
        rows_of(reader, 0)
    (thread,) = samples.threads
    thread.join(timeout=30)
    assert not thread.is_alive()
