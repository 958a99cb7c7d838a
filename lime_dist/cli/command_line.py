"""`lime-dist`: the command line. A user's mistake ends in one line and exit code 2."""

from __future__ import annotations

import argparse
import errno
import os
import select
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn, TextIO

from lime_dist import __version__
from lime_dist.analysis import commands as analysis_commands
from lime_dist.bench import commands as bench_commands
from lime_dist.cli import commands, samples
from lime_dist.cluster import commands as cluster_commands
from lime_dist.cluster import watching
from lime_dist.comparison import commands as comparison_commands
from lime_dist.data import commands as data_commands
from lime_dist.errors import ConfigError, LimeDistError, one_line, shown
from lime_dist.lifecycle.ending import FAILED, INTERRUPTED, NEVER_RESTART, READER_GONE, REQUEUE, write_outcome
from lime_dist.lifecycle.launcher import is_launched
from lime_dist.lifecycle.local import RankFailed, StoppedEarly
from lime_dist.lifecycle.stopping import STOP_SIGNALS
from lime_dist.preflight import commands as preflight_commands
from lime_dist.profiling import commands as profiling_commands


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lime-dist", description="Pretrain LIMe language models over tensor, pipeline and data ranks."
    )
    parser.add_argument("--version", action="version", version=f"lime-dist {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    commands.add_parsers(subparsers)
    samples.add_parser(subparsers)
    analysis_commands.add_parser(subparsers)
    data_commands.add_parser(subparsers)
    bench_commands.add_parser(subparsers)
    cluster_commands.add_parser(subparsers)
    watching.add_parsers(subparsers)
    preflight_commands.add_parser(subparsers)
    profiling_commands.add_parser(subparsers)
    comparison_commands.add_parsers(subparsers)
    return parser


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand before and after options, which argparse alone does not allow of a trailing list."""
    parser = build_parser()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args, rest = parser.parse_known_args(profiling_commands.spelled_out(arguments))
    if rest and (not hasattr(args, "overrides") or any(item.startswith("-") or "=" not in item for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        try:
            return _run_command(arguments)
        finally:
            print(end="", flush=True)  # here, as at the interpreter's end a reader that has gone costs a stack trace
    except BrokenPipeError:
        if all(map(_has_reader, (sys.stdout, sys.stderr))):
            raise
        # Whoever read the output, such as `head`, has enough.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        return READER_GONE


def _has_reader(stream: TextIO) -> bool:
    """Whatever is no pipe has one."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return not any(event & select.POLLERR for _, event in poll.poll(0))


def _run_command(arguments: Sequence[str] | None) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # ranks that share cores must not spin for one another
    args = _parse(arguments)
    try:
        return args.run(args)
    except LimeDistError as error:
        return _refuse(error)
    except OSError as error:
        if error.filename is None or error.errno not in _USERS_PATHS:
            raise
        return _refuse(ConfigError(f"{shown(error.filename)}: {error.strerror}; give a path that can be used"))
    except StoppedEarly as error:
        write_outcome(REQUEUE, error)
        print(f"lime-dist: {error}", file=sys.stderr)
        return REQUEUE
    except KeyboardInterrupt:
        print("lime-dist: interrupted", file=sys.stderr)
        return INTERRUPTED
    except RankFailed as error:
        write_outcome(FAILED, error)
        print(f"{error.detail}\nlime-dist: {one_line(error)}".lstrip(), file=sys.stderr)
        return FAILED


def _refuse(error: LimeDistError) -> int:
    is_news = write_outcome(NEVER_RESTART, error)
    if is_news or not is_launched():  # ranks make the same mistake all at once
        print(f"lime-dist: {one_line(error)}", file=sys.stderr)
    return NEVER_RESTART


# What is wrong with a path that a user gave, wherever it is first used.
_USERS_PATHS = (errno.EACCES, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR)


def run() -> NoReturn:
    """The installed command: `main`, and an end whose code a late signal does not change."""
    code = main()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)
