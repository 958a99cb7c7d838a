"""Ranks on this machine: start them by fork, watch them, name the first that fails. Knows nothing of models.

Fork after the heavy imports starts four ranks in a second where spawning them takes ten. A forked child
hangs in the first threaded CPU operation if its parent has run one, hence one thread a rank on the CPU
unless there are more cores than ranks.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn

from lime_dist.errors import USER_ERROR_EXIT_CODE, LimeDistError
from lime_dist.stopping import STOP_SIGNALS

LEAVE_GRACE = timedelta(seconds=5)  # for ranks that have told their results
STRAGGLER_LIMIT = timedelta(seconds=60)  # for ranks after the first result: all end together, but one that is frozen
FAILURE_WINDOW = timedelta(seconds=1)  # after the first failure, how long to wait for its cause to show


class RankFailed(RuntimeError):
    """A rank ended with an error; the others have been stopped."""

    def __init__(self, rank: int, place: str, reason: str, detail: str = ""):
        super().__init__(f"rank {rank} ({place}) failed: {reason}" if place else f"rank {rank} failed: {reason}")
        self.rank, self.detail = rank, detail


def run_local(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: timedelta | None = None,
    describe: Callable[[int], str] = lambda rank: "",
) -> list[Any]:
    """Run `function(*args)` on `world_size` forked ranks with torchrun's environment set; results by rank.

    Results travel by pickle; `describe` says of a rank what it is, for the error. No rank outlives the call.
    Signals that ask to stop are passed on to the ranks, which know what to do; call on the main thread.
    Raises: the `LimeDistError` of a rank as it is; RankFailed for anything else, among it a rank killed by a
    signal, a run longer than `timeout`, and a rank that is still there long after another's result.
    """
    context = multiprocessing.get_context("fork")
    port = free_port()
    pipes, processes = [], []
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            environment = _environment(rank, world_size, port)
            process = context.Process(target=_rank_main, args=(function, args, environment, sender))
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        with _stop_signals_passed_on(processes):
            results = _collect(pipes, processes, timeout, describe)
        for process in processes:
            process.join(LEAVE_GRACE.total_seconds())
        return results
    finally:
        for process in processes:  # not by a signal that asks: ranks that train would finish their step first
            process.kill()
            process.join()


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


_to_parent: Connection | None = None  # of a forked rank


def _rank_main(function: Callable[..., Any], args: tuple, environment: dict[str, str], sender: Connection) -> None:
    global _to_parent
    _to_parent = sender
    _die_with_parent()
    os.environ.update(environment)
    rank = int(environment["RANK"])
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(environment["WORLD_SIZE"])))
    try:
        _send(sender, "result", function(*args))
    except LimeDistError as error:
        _send(sender, "failure", (rank, time.monotonic(), error, ""))
        leave(USER_ERROR_EXIT_CODE)
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        _send(sender, "failure", (rank, time.monotonic(), reason, traceback.format_exc()))
        leave(1)
    leave(0)


def leave_because_of(rank: int, reason: str) -> NoReturn:
    """End this process, from any of its threads, as failed for what another rank does; `run_local` then names that one."""
    if _to_parent is not None:
        _send(_to_parent, "failure", (rank, time.monotonic(), reason, ""))
    leave(1)


def _send(sender: Connection, kind: str, value: Any) -> None:
    # Plain pickle: what torch makes multiprocessing use shares memory with a process that is about to end.
    sender.send_bytes(pickle.dumps((kind, value)))


def leave(code: int) -> None:
    """End this process without interpreter shutdown: a peer that has gone would make the groups' destructors wait."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _die_with_parent() -> None:
    """Linux: get SIGKILL when the parent goes, however it goes, so that no rank is left behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@dataclass(frozen=True)
class _Failure:
    """How a rank ended. One that has lost its peer fails moments after it, so the cause has to be picked out."""

    rank: int
    moment: float
    reason: str
    detail: str = ""
    error: LimeDistError | None = None
    by_signal: bool = False

    @property
    def order(self) -> tuple[bool, bool, float]:
        """Causes first: killed from outside, a user's mistake, the earliest."""
        return not self.by_signal, self.error is None, self.moment


def _collect(
    pipes: list[Connection], processes: list, timeout: timedelta | None, describe: Callable[[int], str]
) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[_Failure] = []
    pending = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = time.monotonic() + timeout.total_seconds() if timeout else None
    while pending:
        ready = wait(list(pending), timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        for pipe in ready:
            rank = pending.pop(pipe)
            outcome = _receive(pipe, rank, processes[rank])
            if isinstance(outcome, _Failure):
                if not failures:
                    deadline = time.monotonic() + FAILURE_WINDOW.total_seconds()
                failures.append(outcome)
            else:
                results[rank] = outcome
                if deadline is None:
                    deadline = time.monotonic() + STRAGGLER_LIMIT.total_seconds()
        if not ready:
            break
    if failures:
        _raise(min(failures, key=lambda failure: failure.order), describe)
    if pending:
        limit = f"after {timeout}" if timeout else f"{STRAGGLER_LIMIT} after others had ended"
        first, *_ = running = sorted(pending.values())
        waiting = ", ".join(map(str, running))
        raise RankFailed(first, describe(first), f"no end {limit}; still running: rank {waiting}")
    return [results[rank] for rank in range(len(pipes))]


def _receive(pipe: Connection, rank: int, process: Any) -> Any:
    """The rank's result, or a `_Failure`."""
    try:
        kind, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join()
        code = process.exitcode
        return _Failure(rank, time.monotonic(), _exit_reason(code), by_signal=code < 0)
    if kind == "result":
        return value
    cause, moment, error, detail = value
    is_user_error = isinstance(error, LimeDistError)
    return _Failure(cause, moment, str(error), detail, error if is_user_error else None)


def _raise(failure: _Failure, describe: Callable[[int], str]) -> NoReturn:
    if failure.error is not None:
        raise failure.error
    raise RankFailed(failure.rank, describe(failure.rank), failure.reason, failure.detail)


def _exit_reason(exit_code: int) -> str:
    if exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"


@contextmanager
def _stop_signals_passed_on(processes: list) -> Iterator[None]:
    def pass_on(number: int, _: object) -> None:
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
