"""Forked ranks: results by rank, the rank that fails by name, and nothing left behind."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from lime_dist.errors import DataError
from lime_dist.launcher import find_place
from lime_dist.local import RankFailed, run_local


def test_results_come_by_rank() -> None:
    def work(base: int) -> tuple[int, int, int]:
        place = find_place()
        time.sleep(0.02 * (3 - place.rank))  # the first rank ends last
        return base + place.rank, place.local_rank, place.world_size

    assert run_local(work, 3, 10) == [(10, 0, 3), (11, 1, 3), (12, 2, 3)]
    assert find_place({key: value for key, value in os.environ.items() if "SLURM" not in key}) is None


def test_ranks_share_a_meeting_place_and_leave_a_core_to_each() -> None:
    facts = run_local(lambda: (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], torch.get_num_threads()), 4)
    assert len(set(facts)) == 1
    assert facts[0][0] == "127.0.0.1" and facts[0][2] <= max(1, (os.cpu_count() or 1) // 4)


def test_tensors_travel_whole_and_large_ones_too() -> None:
    tensors = run_local(lambda: torch.full((1000, 1000), float(find_place().rank)), 2)
    assert [tensor.unique().tolist() for tensor in tensors] == [[0.0], [1.0]]


def fail(rank: int, how: str) -> None:
    if find_place().rank != rank:
        time.sleep(60)
    if how == "raise":
        raise KeyError("lost")
    if how == "refuse":
        raise DataError("data.train: no such file")
    if how == "exit":
        os._exit(7)
    if how == "interrupt":
        raise SystemExit(3)
    os.kill(os.getpid(), getattr(signal, how))


FAILURES = [
    ("raise", "rank 1 failed: KeyError: 'lost'"),
    ("exit", "rank 1 failed: exit code 7"),
    ("interrupt", "rank 1 failed: SystemExit: 3"),
    ("SIGKILL", "rank 1 failed: killed by SIGKILL"),
    ("SIGTERM", "rank 1 failed: killed by SIGTERM"),
]


@pytest.mark.parametrize(("how", "message"), FAILURES)
def test_the_rank_that_fails_is_named_and_the_others_are_stopped(how: str, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed) as failure:
        run_local(fail, 3, 1, how)
    assert str(failure.value) == message and failure.value.rank == 1
    assert ("in fail" in failure.value.detail) == (how in ("raise", "interrupt")), "where it was raised"
    assert time.monotonic() - start < 10


def test_the_caller_says_what_a_rank_is() -> None:
    with pytest.raises(RankFailed, match=r"^rank 1 \(stage 7\) failed: KeyError"):
        run_local(fail, 2, 1, "raise", describe=lambda rank: f"stage {rank + 6}")


def test_a_users_error_stays_what_it_is() -> None:
    with pytest.raises(DataError, match="^data.train: no such file$"):
        run_local(fail, 2, 0, "refuse")


def test_a_run_that_is_too_long_names_who_still_runs() -> None:
    with pytest.raises(RankFailed, match="no end after 0:00:01; still running: rank 0, 2"):
        run_local(lambda: time.sleep(60 * (find_place().rank != 1)), 3, timeout=timedelta(seconds=1))


@pytest.mark.parametrize("deaf", [False, True])
def test_no_rank_outlives_the_call(tmp_path: Path, deaf: bool) -> None:
    def work() -> None:
        if deaf:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        (tmp_path / str(os.getpid())).touch()
        while find_place().rank == 0 and len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        if find_place().rank == 0:
            raise ValueError
        time.sleep(60)

    with pytest.raises(RankFailed):
        run_local(work, 2)
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name), 0)
