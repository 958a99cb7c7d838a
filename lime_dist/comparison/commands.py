"""`lime-dist compare` and `lime-dist twin`. Nothing heavy is imported until one runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from lime_dist.cli.given_paths import writing
from lime_dist.errors import ConfigError
from lime_dist.lifecycle.launcher import warn


def add_parsers(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the commands; each sets `run`, a handler from the parsed arguments to the exit code."""
    _add_compare(subparsers)
    _add_twin(subparsers)


def _add_compare(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "compare",
        help="losses of runs at equal steps, tokens and FLOPs, over seeds",
        description="Runs that differ in run.seed alone are one variant. Each variant is compared with the first RUN's, the "
        "reference.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder (run.dir)")
    parser.add_argument(
        "--metric",
        choices=("loss", "eval_loss"),
        help="default: eval_loss where all runs have two evaluations, else loss",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw loss over steps, tokens and FLOPs")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the table and the curves")
    parser.set_defaults(run=_compare)


def _add_twin(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("twin", help="the LLaMA config to compare a LIMe config with")
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the LIMe run")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="override a key of CONFIG, such as run.seed=2"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write it there (default: print it)")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    parser.set_defaults(run=_twin)


def _compare(args: argparse.Namespace) -> int:
    from lime_dist.comparison.comparing import compare_runs
    from lime_dist.comparison.comparison_report import comparison_report, comparison_table
    from lime_dist.comparison.run_folders import read_run

    comparison = compare_runs([read_run(folder) for folder in args.runs], args.metric)
    warn(comparison.warnings)
    if args.svg is not None:
        from lime_dist.comparison.comparison_plots import comparison_svg

        _write("--svg", args.svg, ".svg", lambda: comparison_svg(comparison))
    if args.html is not None:
        from lime_dist.comparison.comparison_plots import comparison_page

        _write("--html", args.html, ".html", lambda: comparison_page(comparison))
    print(json.dumps(comparison_report(comparison)) if args.json else comparison_table(comparison))
    return 0


def _twin(args: argparse.Namespace) -> int:
    from lime_dist.comparison.twin import llama_twin

    text = llama_twin(args.config, args.overrides)
    if args.out is None:
        print(text, end="")
        return 0
    if args.out.exists() and not args.overwrite:
        raise ConfigError(f"--out: {args.out} exists already; name another file or add --overwrite")
    _write("--out", args.out, ".yaml", lambda: text)
    return 0


def _write(option: str, path: Path, suffix: str, content: Callable[[], str]) -> None:
    """Raises: ConfigError."""
    if path.suffix != suffix:
        raise ConfigError(f"{option}: {path} must end in {suffix}")
    with writing(option, path):
        path.write_text(content(), encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)
