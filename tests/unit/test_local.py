"""Local ranks, forked and in fresh interpreters: results by rank, the rank that fails by name, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
from rank_work import (
    answer_signal,
    environment,
    fail,
    handlers_of,
    pid_and_flag,
    place_and_sum,
    report_pid_and_wait,
    sleep_unless,
)

from lime_dist.config import Config, ModelConfig, RunConfig
from lime_dist.errors import DataError
from lime_dist.lifecycle.launcher import find_place
from lime_dist.lifecycle.local import RankFailed, StoppedEarly, run_local
from lime_dist.lifecycle.ownership import RunTaken
from lime_dist.lifecycle.stopping import STOP_SIGNALS
from lime_dist.preflight.devices import needs_fresh_interpreters


@pytest.fixture(autouse=True)
def signals_are_heard() -> Iterator[None]:
    """Which a shell may have set to be ignored."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


both_ways = pytest.mark.parametrize("fresh", [False, True], ids=["fork", "fresh"])


@both_ways
def test_results_come_by_rank(fresh: bool) -> None:
    assert run_local(place_and_sum, 3, 10, fresh=fresh) == [(10, 0, 3), (11, 1, 3), (12, 2, 3)]
    assert find_place({key: value for key, value in os.environ.items() if "SLURM" not in key}) is None


@both_ways
def test_ranks_share_a_meeting_place_that_only_this_machine_reaches(fresh: bool) -> None:
    first, second = run_local(environment, 2, fresh=fresh)
    assert first == second and first["MASTER_PORT"].isdigit()
    assert first["MASTER_ADDR"] == "127.0.0.1"


@both_ways
def test_each_rank_has_its_share_of_the_cores(fresh: bool) -> None:
    for threads in run_local(torch.get_num_threads, 4, fresh=fresh):
        assert threads <= max(1, (os.cpu_count() or 1) // 4)


def test_tensors_travel_whole_and_large_ones_too() -> None:
    tensors = run_local(lambda: torch.full((1000, 1000), float(find_place().rank)), 2)
    assert [tensor.unique().tolist() for tensor in tensors] == [[0.0], [1.0]]


def total(tensor: torch.Tensor) -> tuple[float, torch.Tensor]:
    return float(tensor.sum()), tensor + find_place().rank


def test_tensors_travel_to_fresh_interpreters_and_back() -> None:
    for rank, (value, tensor) in enumerate(run_local(total, 2, torch.full((1000, 1000), 2.0), fresh=True)):
        assert value == 2e6 and torch.equal(tensor, torch.full((1000, 1000), 2.0 + rank))


FAILURES = [
    ("raise", "rank 1 failed: KeyError: 'lost'"),
    ("exit", "rank 1 failed: exit code 7"),
    ("interrupt", "rank 1 failed: SystemExit: 3"),
    ("unsendable", "rank 1 failed: TypeError: set cannot be sent to another process"),
    ("within a result", "rank 1 failed: killed by SIGKILL"),
    ("SIGKILL", "rank 1 failed: killed by SIGKILL"),
    ("SIGTERM", "rank 1 failed: killed by SIGTERM"),
]


@both_ways
@pytest.mark.parametrize(("how", "message"), FAILURES)
def test_the_rank_that_fails_is_named_and_the_others_are_stopped(how: str, message: str, fresh: bool) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed) as failure:
        run_local(fail, 3, 1, how, fresh=fresh)
    assert str(failure.value) == message and failure.value.rank == 1
    assert ("in fail" in failure.value.detail) == (how in ("raise", "interrupt")), "where it was raised"
    assert time.monotonic() - start < 10


@both_ways
def test_a_rank_that_leaves_because_of_another_names_it(fresh: bool) -> None:
    with pytest.raises(RankFailed, match=r"^rank 2 failed: silent for 8 s$"):
        run_local(fail, 3, 1, "blame", fresh=fresh)


@both_ways
def test_the_caller_says_what_a_rank_is(fresh: bool) -> None:
    with pytest.raises(RankFailed, match=r"^rank 1 \(stage 7\) failed: KeyError"):
        run_local(fail, 2, 1, "raise", describe=lambda rank: f"stage {rank + 6}", fresh=fresh)


@both_ways
def test_a_users_error_stays_what_it_is(fresh: bool) -> None:
    with pytest.raises(DataError, match="^data.train: no such file$"):
        run_local(fail, 2, 0, "refuse", fresh=fresh)
    with pytest.raises(RunTaken, match="^run.dir: taken over$"):
        run_local(fail, 2, 0, "taken", fresh=fresh)


@both_ways
def test_a_run_that_is_too_long_names_who_still_runs(fresh: bool) -> None:
    with pytest.raises(RankFailed, match="no end after 0:00:03; still running: rank 0, 2"):
        run_local(sleep_unless, 3, 1, timeout=timedelta(seconds=3), fresh=fresh)


@both_ways
@pytest.mark.parametrize("deaf", [False, True])
def test_no_rank_outlives_the_call(tmp_path: Path, deaf: bool, fresh: bool) -> None:
    with pytest.raises(RankFailed):
        run_local(report_pid_and_wait, 2, tmp_path, deaf, fresh=fresh)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2 and not any(map(psutil.pid_exists, pids))


@both_ways
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signals_that_ask_to_stop_are_passed_on(number: signal.Signals, tmp_path: Path, fresh: bool) -> None:
    before = signal.getsignal(number)

    def ask() -> None:
        """When the ranks listen, and this process does: they may be the first, and the signal would end it."""
        while len(list(tmp_path.iterdir())) < 2 or signal.getsignal(number) == before:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    asking = threading.Thread(target=ask)
    asking.start()
    assert run_local(answer_signal, 2, tmp_path, fresh=fresh) == [number.name] * 2
    asking.join()


STOPPED_CALLER = """
import multiprocessing, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have set to be ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)
import psutil
from lime_dist.lifecycle.local import run_local
from rank_work import sleep_unless

pipe, made = multiprocessing.Pipe, []

def pipe_and_signal(**options):  # which is made for each rank ahead of its beginning
    made.append(pipe(**options))
    if len(made) == 2:
        os.kill(os.getpid(), int(sys.argv[1]))
    return made[-1]

multiprocessing.Pipe = pipe_and_signal
try:
    run_local(sleep_unless, 3, 9, fresh=sys.argv[2] == "True")
except (Exception, KeyboardInterrupt) as error:
    print(f"{type(error).__name__}: {error}; left: {psutil.Process().children()}")
"""


@both_ways
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_between_the_first_rank_and_the_last(number: signal.Signals, fresh: bool) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", STOPPED_CALLER, str(int(number)), str(fresh)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    told = "KeyboardInterrupt: " if number == signal.SIGINT else f"StoppedEarly: {number.name} before the ranks had met"
    assert ended.stdout == f"{told}; left: []\n", ended


CALLER = """
import signal, sys
from pathlib import Path
from lime_dist.lifecycle.local import run_local
from rank_work import answer_signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have set to be ignored
run_local(answer_signal, 2, Path(sys.argv[1]), fresh=sys.argv[2] == "True")
"""


@both_ways
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_rank_outlives_the_caller(number: signal.Signals, tmp_path: Path, fresh: bool) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", CALLER, str(tmp_path), str(fresh)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as caller:
        while len(list(tmp_path.iterdir())) < 2:
            assert caller.poll() is None
            time.sleep(0.01)
        ranks = [psutil.Process(int(path.name)) for path in tmp_path.iterdir()]
        assert all(rank.ppid() == caller.pid for rank in ranks)
        caller.send_signal(number)
        caller.wait(10)
    assert not psutil.wait_procs(ranks, timeout=5)[1]


@both_ways
def test_an_interrupt_ends_ranks_that_do_not_hear_it(fresh: bool) -> None:
    threading.Timer(3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        run_local(time.sleep, 2, 60, fresh=fresh)


@both_ways
def test_what_is_ignored_here_is_ignored_by_the_ranks(tmp_path: Path, fresh: bool) -> None:
    """As under `nohup`."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert run_local(handlers_of, 2, fresh=fresh) == [[True, False]] * 2


# ---- fresh interpreters


def test_a_fresh_interpreter_is_no_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mark stands for what a process keeps of CUDA, and its forks with it."""
    monkeypatch.setattr(sys, "marked", True, raising=False)
    assert [marked for _, marked in run_local(pid_and_flag, 2)] == [True, True]
    assert [marked for _, marked in run_local(pid_and_flag, 2, fresh=True)] == [False, False]


def test_a_fresh_interpreter_calls_functions_of_modules_only() -> None:
    with pytest.raises(ValueError, match="another process finds only what stands in a module"):
        run_local(lambda: None, 2, fresh=True)


@pytest.mark.parametrize(
    ("device", "num_gpus", "needed"),
    [("cpu", 0, False), ("cpu", 8, False), ("auto", 0, False), ("auto", 8, True), ("cuda", 8, True), ("cuda", 0, True)],
)
def test_ranks_that_may_use_cuda_need_fresh_interpreters(device: str, num_gpus: int, needed: bool) -> None:
    model = ModelConfig(num_layers=1, hidden_size=8, intermediate_size=8, num_heads=1, vocab_size=8)
    assert needs_fresh_interpreters(Config(model=model, run=RunConfig(device=device)), num_gpus) == needed


@both_ways
def test_a_stop_before_the_ranks_can_hear_it_means_to_start_again(fresh: bool) -> None:
    threading.Timer(3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(StoppedEarly, match="^SIGTERM before the ranks had met"):
        run_local(time.sleep, 2, 60, fresh=fresh)
