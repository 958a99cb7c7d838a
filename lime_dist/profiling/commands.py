"""`lime-dist profile`: record a short run, or show what was recorded. Nothing heavy is imported until one runs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lime_dist.checkpoint.edges import ready_plan
from lime_dist.cli.commands import add_config, add_nproc, ended, ready_on_ranks
from lime_dist.cli.given_paths import writing
from lime_dist.config.checking import MAX_PROFILED_STEPS
from lime_dist.errors import ConfigError

if TYPE_CHECKING:
    from lime_dist.profiling.analysis import Analysis

_STEPS = 10


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `profile` and its commands; `profile CONFIG` stands for `profile run CONFIG` (`spelled_out`)."""
    parser = subparsers.add_parser(
        "profile",
        help="where a step's time goes: `profile CONFIG` records a short run, `profile show RUN` reports it",
        description="`profile CONFIG [KEY=VALUE ...] [--steps N]` (short for `profile run CONFIG`) records a few steps; "
        "`profile show RUN` reports what was recorded.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_run(commands)
    _add_show(commands)


def spelled_out(arguments: list[str]) -> list[str]:
    """`profile CONFIG ...` with its `run`."""
    if len(arguments) > 1 and arguments[0] == "profile" and arguments[1] not in ("run", "show", "-h", "--help"):
        return ["profile", "run", *arguments[1:]]
    return arguments


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("run", help="a few steps from the initial weights, recorded; started as `train` is")
    add_config(parser)
    add_nproc(parser)
    parser.add_argument("--steps", type=_number, default=_STEPS, metavar="N", help=f"to record (default: {_STEPS})")
    parser.set_defaults(run=_run)


def _add_show(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("show", help="one screen: what waits, for what, and what to do")
    parser.add_argument("folder", type=Path, metavar="RUN", help="a run's folder (its newest profile), or a profile's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the timeline; opens offline")
    parser.add_argument(
        "--trace",
        metavar="FILE",
        help="write a .json or .json.gz for Perfetto; FOLDER/: one a rank, for HolisticTraceAnalysis",
    )
    parser.set_defaults(run=_show)


def _number(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_PROFILED_STEPS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {MAX_PROFILED_STEPS}")
    return int(text)


def _run(args: argparse.Namespace) -> int:
    code, folder = ready_on_ranks(args, ready_plan, "profile", args.steps)
    if folder is not None:
        _print(_read(Path(folder)))
    return ended(code)


def _show(args: argparse.Namespace) -> int:
    analysis = _read(args.folder)
    if args.html is not None:
        _write_page(analysis, args.html)
    if args.trace is not None:
        from lime_dist.profiling.trace import write_trace

        written = write_trace(analysis.profile, analysis.timelines, args.trace)
        print(f"wrote {', '.join(map(str, written))}", file=sys.stderr)
    _print(analysis, as_json=args.json)
    return 0


def _read(folder: Path) -> Analysis:
    from lime_dist.profiling.analysis import Analysis

    return Analysis.read(folder)


def _write_page(analysis: Analysis, path: Path) -> None:
    from lime_dist.profiling.page import write_page

    if path.suffix not in (".html", ".htm"):
        raise ConfigError(f"--html: {path} must end in .html")
    with writing("--html", path):
        write_page(analysis.profile, analysis.timelines, analysis.account, path, analysis.sentences)
    print(f"wrote {path}", file=sys.stderr)


def _print(analysis: Analysis, *, as_json: bool = False) -> None:
    from lime_dist.profiling.screen import profile_report, profile_screen

    parts = analysis.profile, analysis.account, analysis.path, analysis.sentences
    print(json.dumps(profile_report(*parts)) if as_json else profile_screen(*parts))
