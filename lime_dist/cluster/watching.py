"""The commands that look at a run: status, logs. They run on a login node: no torch."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from lime_dist.errors import ConfigError

_LOOK_SECONDS = 0.5  # between looks of `logs -f`


def add_parsers(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the commands; each sets `run`, a handler from the parsed arguments to the exit code."""
    _add_status(subparsers)
    _add_logs(subparsers)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="the run's folder (run.dir)")


def _add_status(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("status", help="what a run does: job, step, checkpoint, restarts, silent ranks")
    _add_run(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_status)


def _add_logs(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("logs", help="what a rank of a run on SLURM printed")
    _add_run(parser)
    parser.add_argument("--rank", type=int, default=0, metavar="N", help="default: 0, which prints the progress")
    parser.add_argument("-f", "--follow", action="store_true", help="go on, into the next start too, until interrupted")
    parser.add_argument("--job", type=int, metavar="JOB", help="default: that of the newest start")
    parser.add_argument("--restart", type=int, metavar="R", help="of the run, from 0 (default: the newest)")
    parser.add_argument("--script", action="store_true", help="the job script's own log")
    parser.set_defaults(run=_logs)


def _status(args: argparse.Namespace) -> int:
    from lime_dist.cluster.status import read_status, to_text

    status = read_status(args.run_dir)
    print(json.dumps(asdict(status)) if args.json else to_text(status))
    return 0


def _logs(args: argparse.Namespace) -> int:
    from lime_dist.cluster.logs import RunLogs, Wanted, copy, follow

    logs, wanted = RunLogs(args.run_dir), Wanted(rank=args.rank, job=args.job, restart=args.restart, script=args.script)
    if args.follow:
        return _print(follow(lambda: logs.find(wanted), lambda: time.sleep(_LOOK_SECONDS)))
    if (source := logs.find(wanted)) is None:
        raise ConfigError(logs.explain_nothing(wanted))
    if source.path.stat().st_size == 0:
        print(f"rank {wanted.rank} has printed nothing yet; see `lime-dist status {args.run_dir}`", file=sys.stderr)
    return _print(copy(source))


def _print(pieces: Iterable[bytes]) -> int:
    """Until there are no more, or an interrupt."""
    try:
        for piece in pieces:
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
    except KeyboardInterrupt:
        pass
    return 0
