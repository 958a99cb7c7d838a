"""`lime-dist analyze`: the paper's analyses of a checkpoint, on one device. Nothing heavy is imported until it runs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from lime_dist.cli.given_paths import writing
from lime_dist.errors import ConfigError

_STDOUT = "-"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "analyze",
        help="router maps, entropy of representations, word probes and edges of a checkpoint; several are laid over each other",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="a run's folder, for its newest checkpoint, or a step_N folder",
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="a step_N folder of the one RUN (default: its newest)"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="a .txt or .jsonl (default: the run's held-out text)")
    parser.add_argument("--batches", type=_positive, default=8, metavar="N", help="of 8 sequences each (default: 8)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the plots; opens offline")
    parser.add_argument(
        "--json",
        nargs="?",
        const=_STDOUT,
        metavar="FILE",
        help="every figure, printed in place of the text or written to FILE; put it behind the runs",
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="a .model or tokenizer.json (default: the run's data.tokenizer)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.set_defaults(run=_analyze)


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 10**6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 1000000")
    return int(text)


def _analyze(args: argparse.Namespace) -> int:
    _check(args)
    from lime_dist.analysis.report import Options, analyze
    from lime_dist.analysis.text_report import screen

    options = Options(text=args.text, batches=args.batches, tokenizer=args.tokenizer, device=args.device)
    reports = [analyze(args.checkpoint or run, options) for run in args.runs]
    if args.html is not None:
        from lime_dist.analysis.figures import page

        _write("--html", args.html, page(reports))
    found: dict[str, Any] = reports[0] if len(reports) == 1 else {"runs": reports}
    if args.json is not None and args.json != _STDOUT:
        _write("--json", Path(args.json), json.dumps(found, allow_nan=False) + "\n")
    print(json.dumps(found, allow_nan=False) if args.json == _STDOUT else "\n\n".join(map(screen, reports)))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Before minutes of work. Raises: ConfigError."""
    if args.checkpoint is not None and len(args.runs) > 1:
        raise ConfigError("--checkpoint: works with one RUN; for several give step_N folders as RUN")
    if args.html is not None and args.html.suffix not in (".html", ".htm"):
        raise ConfigError(f"--html: {args.html} must end in .html")
    for option, path in (("--html", args.html), ("--json", args.json)):
        if path not in (None, _STDOUT) and not Path(path).parent.is_dir():
            raise ConfigError(f"{option}: {Path(path).parent} is no folder; give a file that can be written")


def _write(option: str, path: Path, text: str) -> None:
    with writing(option, path):
        path.write_text(text, encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)
