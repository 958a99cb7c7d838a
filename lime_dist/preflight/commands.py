"""The `preflight` command: on ranks that a launcher has started, or on local ones. Nothing heavy until it runs."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lime_dist.checkpoint.edges import ready_plan
from lime_dist.config import Config, load_config
from lime_dist.errors import ConfigError, LimeDistError, one_line
from lime_dist.lifecycle.ending import write_outcome
from lime_dist.lifecycle.launcher import Place, find_place, host_name, own_place, require_address, require_rendezvous
from lime_dist.plan.run_plan import RunPlan, plan_run

if TYPE_CHECKING:
    from lime_dist.preflight.checks import Findings


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `preflight`; it sets `run`, a handler from the parsed arguments to the exit code."""
    parser = subparsers.add_parser(
        "preflight", help="check the hosts and the links between them; started as `train` is, on all ranks"
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="override a key, such as parallel.pp=4")
    parser.add_argument("--exclude-file", type=Path, metavar="FILE", help="append bad hosts to it, one a line")
    parser.add_argument(
        "--timeout", type=_seconds, default=120.0, metavar="SECONDS", help="wait so long for a rank (default: 120)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_preflight)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError
    return seconds


def _preflight(args: argparse.Namespace) -> int:
    place = find_place()
    if place is None:
        return _on_local_ranks(args)
    require_rendezvous()
    require_address(place)
    return _as_launched_rank(args, place)


def _load(args: argparse.Namespace, world_size: int | None) -> RunPlan:
    return ready_plan(load_config(args.config, args.overrides), world_size)


def _on_local_ranks(args: argparse.Namespace) -> int:
    from lime_dist.lifecycle.local_ranks import run_local_ranks

    options = {name: value for name, value in vars(args).items() if name != "run"}
    codes = run_local_ranks(_as_local_rank, _load(args, None), options, shared_import="lime_dist.preflight.checks")
    return codes[0]


def _as_local_rank(config: Config, options: dict[str, Any]) -> int:
    return _run(argparse.Namespace(**options), plan_run(config), own_place())


def _run(args: argparse.Namespace, plan: RunPlan | None, place: Place) -> int:
    """plan: as this host reads the config, when None."""
    from lime_dist.preflight.checks import run_preflight

    def load() -> RunPlan:
        return _load(args, place.world_size) if plan is None else plan

    return run_preflight(load, place, args.timeout, lambda findings: _finish(findings, args)).exit_code


def _as_launched_rank(args: argparse.Namespace, place: Place) -> int:
    """The process ends without Python's shutdown, in which the groups of ranks that have gone would be waited for."""
    from lime_dist.lifecycle.local import leave
    from lime_dist.preflight.meeting import MeetingFailed, Unreachable

    try:
        leave(_run(args, None, place))
    except MeetingFailed as error:
        print(f"lime-dist: {error}", file=sys.stderr, flush=True)
        if place.rank > 0 and isinstance(error, Unreachable):
            signal.signal(signal.SIGTERM, lambda *_: leave(1))
            time.sleep(args.timeout)  # a launcher may end rank 0 with this rank; it is to miss and name it before
        leave(1)
    except LimeDistError:
        raise
    except Exception as error:
        traceback.print_exc()
        print(f"lime-dist: rank {place.rank} on host {host_name()} failed: {one_line(error)}", file=sys.stderr)
        leave(1)


def _finish(findings: Findings, args: argparse.Namespace) -> None:
    """By rank 0: print what was found, the bad hosts last, and write them down."""
    from lime_dist.preflight.summary import bad_lines, report_text

    verdict, report = findings.verdict, findings.report
    lines = [verdict.user_error] if verdict.user_error else bad_lines(verdict.bad)
    if lines:
        write_outcome(verdict.exit_code, lines[0])
    if not verdict.user_error:
        print(json.dumps(report) if args.json else report_text(report), flush=True)
    if args.exclude_file is not None:
        exclude(args.exclude_file, verdict.bad)
    for line in lines:
        print(f"lime-dist: {line}", file=sys.stderr, flush=True)


def exclude(path: Path, bad: Mapping[str, Sequence[str]]) -> None:
    """Append the hosts that the file does not have yet. Raises: ConfigError when it cannot be written."""
    try:
        known = path.read_text().split() if path.exists() else []
        hosts = [host for host in bad if host and host not in known]
        if hosts:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write("".join(f"{host}\n" for host in hosts))
    except OSError as error:
        raise ConfigError(f"--exclude-file: {path}: {error.strerror}; give a file that can be written") from None
