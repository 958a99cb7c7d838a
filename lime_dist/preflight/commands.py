"""The `preflight` command: on ranks that a launcher has started, or on local ones. Imports nothing heavy until it runs."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lime_dist.config import Config, load_config
from lime_dist.errors import ConfigError, LimeDistError, one_line
from lime_dist.launcher import Place, find_place, host_name, require_rendezvous
from lime_dist.resolve import ready_config

if TYPE_CHECKING:
    from lime_dist.preflight.run import Findings


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
        return _finish(_on_local_ranks(args), args)
    require_rendezvous()
    return _as_launched_rank(args, place)


def _load(args: argparse.Namespace, world_size: int | None) -> Config:
    return ready_config(load_config(args.config, args.overrides), world_size)


def _on_local_ranks(args: argparse.Namespace) -> Findings:
    from lime_dist.local import run_local
    from lime_dist.preflight.files import check_devices

    config = _load(args, None)
    check_devices(config)
    from lime_dist.preflight import run  # noqa: F401  (its imports are slow: once, before the ranks are forked)

    layout = config.layout
    return run_local(
        _as_local_rank, layout.world_size, config, args.timeout, describe=lambda rank: str(layout.coordinate(rank))
    )[0]


def _as_local_rank(config: Config, seconds: float) -> Findings:
    from lime_dist.preflight.run import run_preflight

    return run_preflight(lambda: config, find_place(), seconds)


def _as_launched_rank(args: argparse.Namespace, place: Place) -> int:
    """Every error ends the process at once, so that the launcher sees it."""
    from lime_dist.local import leave
    from lime_dist.preflight.meeting import MeetingFailed
    from lime_dist.preflight.run import run_preflight

    try:
        findings = run_preflight(lambda: _load(args, place.world_size), place, args.timeout)
    except MeetingFailed as error:
        print(f"lime-dist: {error}", file=sys.stderr)
        leave(1)
    except LimeDistError:
        raise
    except Exception as error:
        traceback.print_exc()
        print(f"lime-dist: rank {place.rank} on host {host_name()} failed: {one_line(error)}", file=sys.stderr)
        leave(1)
    leave(_finish(findings, args))


def _finish(findings: Findings, args: argparse.Namespace) -> int:
    """Rank 0 prints, bad hosts last, and writes them down; returns the exit code of all ranks."""
    from lime_dist.preflight.report import bad_lines, report_text

    bad, report = findings.verdict.bad, findings.report
    if report is not None:
        print(json.dumps(report) if args.json else report_text(report), flush=True)
        if args.exclude_file is not None:
            exclude(args.exclude_file, bad)
        for line in bad_lines(bad):
            print(f"lime-dist: {line}", file=sys.stderr, flush=True)
    return findings.verdict.exit_code


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
