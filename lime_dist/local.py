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
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from lime_dist.errors import LimeDistError

TERMINATE_GRACE = timedelta(seconds=5)


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
    Raises: the `LimeDistError` of a rank as it is; RankFailed for anything else, among it a rank killed by a
    signal and a run longer than `timeout`.
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
        return _collect(pipes, processes, timeout, describe)
    finally:
        _stop(processes)


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


def _rank_main(function: Callable[..., Any], args: tuple, environment: dict[str, str], sender: Connection) -> None:
    _die_with_parent()
    os.environ.update(environment)
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(environment["WORLD_SIZE"])))
    try:
        _send(sender, "result", function(*args))
    except LimeDistError as error:
        _send(sender, "user error", error)
        leave(2)
    except BaseException as error:
        _send(sender, "error", (f"{type(error).__name__}: {error}", traceback.format_exc()))
        leave(1)
    leave(0)


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


def _collect(
    pipes: list[Connection], processes: list, timeout: timedelta | None, describe: Callable[[int], str]
) -> list[Any]:
    deadline = time.monotonic() + timeout.total_seconds() if timeout else None
    results: dict[int, Any] = {}
    pending = {pipe: rank for rank, pipe in enumerate(pipes)}
    while pending:
        left = None if deadline is None else deadline - time.monotonic()
        ready = wait(list(pending), timeout=left) if left is None or left > 0 else []
        if not ready:
            waiting = ", ".join(str(rank) for rank in pending.values())
            first = next(iter(pending.values()))
            raise RankFailed(first, describe(first), f"no end after {timeout}; still running: rank {waiting}")
        for pipe in ready:
            rank = pending.pop(pipe)
            results[rank] = _receive(pipe, rank, processes[rank], describe(rank))
    return [results[rank] for rank in range(len(pipes))]


def _receive(pipe: Connection, rank: int, process: Any, place: str) -> Any:
    try:
        kind, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        process.join()
        raise RankFailed(rank, place, _exit_reason(process.exitcode)) from None
    if kind == "user error":
        raise value
    if kind == "error":
        raise RankFailed(rank, place, *value)
    return value


def _exit_reason(exit_code: int) -> str:
    if exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"


def _stop(processes: list) -> None:
    for process in processes:
        if process.is_alive():
            process.terminate()
    deadline = time.monotonic() + TERMINATE_GRACE.total_seconds()
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
