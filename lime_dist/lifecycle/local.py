"""Ranks on this machine: start them, watch them, name the first that fails. Knows nothing of models.

A rank is a fork of this process, or a fresh interpreter; from then on both are watched alike. Forks start at once,
as they have this process's imports. But a fork cannot use CUDA if its parent has asked for it, as DeepSpeed's
import does, and hangs in the first threaded CPU operation if its parent has run one, hence one thread a rank on the
CPU unless there are more cores than ranks.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, NoReturn, Protocol, cast

from lime_dist import errors
from lime_dist.errors import USER_ERROR_EXIT_CODE, LimeDistError
from lime_dist.lifecycle.launcher import SECRET_VARIABLE, new_job_secret
from lime_dist.lifecycle.ownership import RunTaken
from lime_dist.lifecycle.stopping import STOP_SIGNALS, Terminal, heard_signals
from lime_dist.lifecycle.wire import find, name_of, pack, unpack

LEAVE_GRACE = timedelta(seconds=5)  # for ranks that have told their results
STRAGGLER_LIMIT = timedelta(seconds=60)  # for ranks after the first result: all end together, but one that is frozen
FAILURE_WINDOW = timedelta(seconds=1)  # after the first failure, how long to wait for its cause to show
_MAX_RESULT_BYTES = 2**36
_MAX_TEXT = 100_000  # characters of an error


class RankFailed(RuntimeError):
    """A rank ended with an error; the others have been stopped."""

    def __init__(self, rank: int, place: str, reason: str, detail: str = ""):
        super().__init__(f"rank {rank} ({place}) failed: {reason}" if place else f"rank {rank} failed: {reason}")
        self.rank, self.detail = rank, detail


class StoppedEarly(RuntimeError):
    """A signal that asks to stop came before the ranks could hear it. No step was made, so nothing is lost."""


def run_local(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: timedelta | None = None,
    describe: Callable[[int], str] = lambda rank: "",
    fresh: bool = False,
) -> list[Any]:
    """Run `function(*args)` on `world_size` ranks with torchrun's environment set; results by rank.

    fresh: in new interpreters rather than forks; `function` is then a module's own. What `wire` can pack may be a
    result, and, where fresh, an argument. `describe` says of a rank what it is, for the error. No rank outlives the call.
    Signals that ask to stop are passed on to the ranks, which know what to do, or end of them; call on the main thread. A
    terminal sends Ctrl-C to all of them itself, too.
    Raises: KeyboardInterrupt for a Ctrl-C that ranks have ended of; the `LimeDistError` of a rank as it is; StoppedEarly; RankFailed for anything else, among it a rank killed by a
    signal, a run longer than `timeout`, and a rank that is still there long after another's result.
    """
    port, secret = free_port(), new_job_secret()
    pipes: list[Connection] = []
    processes: list[_Process] = []
    try:
        with _StopSignals(processes) as signals:
            begin = _begin_fresh if fresh else partial(_begin_fork, signals.before)
            for rank in range(world_size):
                receiver, sender = multiprocessing.Pipe(duplex=False)
                environment = _environment(rank, world_size, port) | {SECRET_VARIABLE: secret}
                pipes.append(receiver)
                with _signals_held():
                    processes.append(begin(function, args, environment, sender))
                sender.close()
                signals.stop_early()
            results = _collect(pipes, processes, timeout, describe, signals.passed_on)
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


# ---- two ways to begin


class _Process(Protocol):
    """As `multiprocessing.Process`. exitcode: minus the signal that ended it."""

    @property
    def pid(self) -> int | None: ...
    @property
    def exitcode(self) -> int | None: ...
    def is_alive(self) -> bool: ...
    def join(self, timeout: float | None = None) -> None: ...
    def kill(self) -> None: ...


def _begin_fork(
    handlers: Mapping[int, Any],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    environment: Mapping[str, str],
    sender: Connection,
) -> _Process:
    process = multiprocessing.get_context("fork").Process(
        target=_fork, args=(handlers, function, args, environment, sender, os.getpid())
    )
    process.start()
    return process


def _fork(
    handlers: Mapping[int, Any],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    environment: Mapping[str, str],
    sender: Connection,
    parent: int,
) -> NoReturn:
    _hear_signals(handlers)
    os.environ.update(environment)
    import torch

    torch.set_num_threads(_threads(environment))
    _be_rank(lambda: function(*args), sender, parent)


class _Interpreter(subprocess.Popen[bytes]):
    """A child that shares nothing with this process but what it is told."""

    @property
    def exitcode(self) -> int | None:
        return self.poll()

    def is_alive(self) -> bool:
        return self.poll() is None

    def join(self, timeout: float | None = None) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(timeout)


# With this process's own paths: those of `python -c` and `-m` differ from a launcher script's.
_BOOT = """\
import os, signal, sys
if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no stack trace
signal.pthread_sigmask(signal.SIG_SETMASK, ())
sys.path[:] = sys.argv[1].split(os.pathsep)
from lime_dist.lifecycle.local import be_fresh
be_fresh({name!r}, {sender}, {parent})
"""


def _begin_fresh(
    function: Callable[..., Any], args: tuple[Any, ...], environment: Mapping[str, str], sender: Connection
) -> _Process:
    boot = _BOOT.format(name=name_of(function), sender=sender.fileno(), parent=os.getpid())
    task = pack(args)
    process = _Interpreter(
        [sys.executable, "-c", boot, os.pathsep.join(sys.path), *sys.argv],  # the last for those who list processes
        stdin=subprocess.PIPE,
        pass_fds=[sender.fileno()],
        env={**os.environ, **environment, "OMP_NUM_THREADS": str(_threads(environment))},
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin:  # a rank that has gone already is named like any other
        process.stdin.write(task)
    return process


def be_fresh(name: str, sender: int, parent: int) -> NoReturn:
    """In a fresh interpreter: call the function `name` (module:function) with the arguments on standard input."""

    os.set_inheritable(sender, False)  # what this rank starts must not keep it open

    def run() -> Any:
        importlib.import_module(name.partition(":")[0])
        return find(name)(*unpack(sys.stdin.buffer.read()))

    _be_rank(run, Connection(sender, readable=False), parent)


def _threads(environment: Mapping[str, str]) -> int:
    return max(1, (os.cpu_count() or 1) // int(environment["WORLD_SIZE"]))


# ---- within a rank

_to_parent: Connection | None = None  # of a rank that was begun here


def _be_rank(run: Callable[[], Any], sender: Connection, parent: int) -> NoReturn:
    global _to_parent
    _to_parent = sender
    _die_with(parent)
    rank = int(os.environ["RANK"])
    try:
        _send(sender, run())
    except LimeDistError as error:
        _send_failure(sender, _Failure(rank, time.monotonic(), str(error), user_error=type(error).__name__))
        leave(USER_ERROR_EXIT_CODE)
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        _send_failure(sender, _Failure(rank, time.monotonic(), reason, traceback.format_exc()))
        leave(1)
    leave(0)


def leave_because_of(rank: int, reason: str) -> NoReturn:
    """End this process, from any of its threads, as failed for what another rank does; `run_local` then names that one."""
    if _to_parent is not None:
        _send_failure(_to_parent, _Failure(rank, time.monotonic(), reason))
    leave(1)


def _send_failure(sender: Connection, failure: _Failure) -> None:
    short = replace(failure, reason=failure.reason[:_MAX_TEXT], detail=failure.detail[-_MAX_TEXT:])
    _send(sender, short)


def _send(sender: Connection, outcome: Any) -> None:
    sender.send_bytes(pack(outcome))


def leave(code: int) -> NoReturn:
    """End this process without interpreter shutdown: a peer that has gone would make the groups' destructors wait."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _die_with(parent: int) -> None:
    """Linux: get SIGKILL when the parent goes, however it goes, so that no rank is left behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:  # it has gone before
        os._exit(1)


# ---- what came of them


@dataclass(frozen=True)
class _Failure:
    """How a rank ended. One that has lost its peer fails moments after it, so the cause has to be picked out.

    user_error: the name of the LimeDistError that it was.
    """

    rank: int
    moment: float
    reason: str
    detail: str = ""
    user_error: str = ""
    killed_by: int = 0  # a signal

    @property
    def order(self) -> tuple[bool, bool, float]:
        """Causes first: killed from outside, a user's mistake, the earliest."""
        return not self.killed_by, not self.user_error, self.moment


def _collect(
    pipes: list[Connection],
    processes: Sequence[_Process],
    timeout: timedelta | None,
    describe: Callable[[int], str],
    passed_on: Collection[int],
) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[_Failure] = []
    pending = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = time.monotonic() + timeout.total_seconds() if timeout else None
    while pending:
        ready = wait(list(pending), timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        for pipe in cast(list[Connection], ready):
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
        first_failure = min(failures, key=lambda failure: failure.order)
        if first_failure.killed_by in passed_on:
            raise _stopped_early(first_failure.killed_by)
        _raise(first_failure, describe)
    if pending:
        limit = f"after {timeout}" if timeout else f"{STRAGGLER_LIMIT} after others had ended"
        first, *_ = running = sorted(pending.values())
        waiting = ", ".join(map(str, running))
        raise RankFailed(first, describe(first), f"no end {limit}; still running: rank {waiting}")
    return [results[rank] for rank in range(len(pipes))]


def _receive(pipe: Connection, rank: int, process: _Process) -> Any:
    """The rank's result, or a `_Failure`."""
    try:
        return unpack(pipe.recv_bytes(_MAX_RESULT_BYTES))
    except (EOFError, OSError):  # the second within a result
        pipe.close()
        process.join()
        code = process.exitcode or 0
        return _Failure(rank, time.monotonic(), _exit_reason(code), killed_by=max(0, -code))


def _raise(failure: _Failure, describe: Callable[[int], str]) -> NoReturn:
    if failure.user_error:
        raise _USER_ERRORS.get(failure.user_error, LimeDistError)(failure.reason)
    raise RankFailed(failure.rank, describe(failure.rank), failure.reason, failure.detail)


_USER_ERRORS: dict[str, type[LimeDistError]] = {
    error.__name__: error
    for error in (*vars(errors).values(), RunTaken)
    if isinstance(error, type) and issubclass(error, LimeDistError)
}


def _exit_reason(exit_code: int) -> str:
    if exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"


# ---- signals


class _StopSignals:
    """Passes signals that ask to stop on to `processes`, in a `with`.

    before: the handlers outside of it. passed_on: what was.
    """

    def __init__(self, processes: Sequence[_Process]):
        self._processes = processes
        self.before: dict[int, Any] = {number: signal.getsignal(number) for number in heard_signals()}
        self.passed_on: set[int] = set()
        self._terminal = Terminal()

    def __enter__(self) -> _StopSignals:
        for number in self.before:
            signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, _: object) -> None:
        if number == signal.SIGHUP:
            self._terminal.leave()
        self.passed_on.add(number)
        for process in self._processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, number)

    def stop_early(self) -> None:
        """While ranks begin, and so have not met. Raises: StoppedEarly or KeyboardInterrupt when a signal has come."""
        for number in self.passed_on:
            raise _stopped_early(number)


def _stopped_early(number: int) -> StoppedEarly | KeyboardInterrupt:
    if number == signal.SIGINT:
        return KeyboardInterrupt()
    return StoppedEarly(f"{signal.Signals(number).name} before the ranks had met")


@contextmanager
def _signals_held() -> Iterator[None]:
    """They come behind it: to this process when it knows the new rank, to the rank when it has handlers of its own."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _hear_signals(handlers: Mapping[int, Any]) -> None:
    """In a fork that has begun."""
    for number, handler in handlers.items():
        is_trace = handler is signal.default_int_handler
        signal.signal(number, signal.SIG_DFL if is_trace else handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
