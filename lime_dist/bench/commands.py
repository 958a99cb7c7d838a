"""The `bench` part of the command line. Imports nothing heavy until a command runs."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from dataclasses import asdict
from pathlib import Path

from lime_dist.errors import ConfigError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `bench` and its commands; each sets `run`, a handler from the parsed arguments to the exit code."""
    parser = subparsers.add_parser("bench", help="measure what things cost on this machine")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_depth(commands)
    _add_patterns(commands)
    _add_precision(commands)
    _add_pipeline(commands)
    _add_prediction(commands)
    _add_checkpoint(commands)


def _add_pipeline(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "pipeline", help="steps over slow links, on hosts that this machine makes (root): LIMe, LLaMA, other pipelines"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="override a key, such as model.num_kv_heads=8"
    )
    parser.add_argument("--models", type=_listed, default=[], metavar="NAME,...", help="of the table; default: all")
    parser.add_argument("--rounds", type=_positive, default=5, metavar="N", help="to time, for each limit (default: 5)")
    parser.add_argument("--quick", action="store_true", help="a smaller model and batch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a record for each way and limit there, too")
    parser.set_defaults(run=_pipeline)


def _add_prediction(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "prediction", help="steps over slow links against what the simulator says of them after one profile (root)"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="override a key, such as data.seq_length=512")
    parser.add_argument("--rounds", type=_positive, default=5, metavar="N", help="to time, for each limit (default: 5)")
    parser.add_argument("--quick", action="store_true", help="a smaller model and batch")
    parser.set_defaults(run=_prediction)


def _add_checkpoint(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "checkpoint", help="how long training stands still for a save: behind training, at once, and torch.save"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="override a key, such as parallel.dp=2")
    parser.add_argument(
        "--parameters",
        type=_sizes,
        default=[10_000_000, 100_000_000],
        metavar="N,...",
        help="of the models, about; three stages of 16 bytes a parameter and 12 for saves (default: 10M,100M)",
    )
    parser.add_argument("--rounds", type=_positive, default=5, metavar="N", help="to time (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("runs"), metavar="FOLDER", help="the disk (default: runs)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there, too")
    parser.set_defaults(run=_checkpoint)


def _add_patterns(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "patterns", help="train with several depth patterns: bundle, step time, held-out loss after equal tokens"
    )
    _add_runs(parser)
    parser.add_argument(
        "--patterns",
        type=_listed,
        default=["full", "none", "first:2", "last:2"],
        metavar="P,...",
        help="the first is what the others are compared with; none is LLaMA (default: full,none,first:2,last:2)",
    )
    parser.set_defaults(run=_patterns)


def _add_precision(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "precision", help="train in bf16 across stages: distance to fp32 of relayed entries and of partial sums"
    )
    _add_runs(parser)
    parser.add_argument("--stages", type=_positive, default=4, metavar="N", help="default: 4")
    parser.set_defaults(run=_precision)


def _add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="override a key, such as run.steps=200")
    parser.add_argument("--seeds", type=_seeds, default=[1, 2, 3], metavar="N,...", help="default: 1,2,3")


def _add_depth(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "depth", help="routed read and whole step against the paper's growing buffer and against LLaMA, as Markdown"
    )
    parser.add_argument("--layers", type=_positive, default=16, metavar="N", help="default: 16")
    parser.add_argument(
        "--hidden-size",
        type=_positive,
        default=1024,
        metavar="N",
        help="32 heads of N/32; default: 1024 (paper: 2048)",
    )
    parser.add_argument("--tokens", type=_positive, default=512, metavar="N", help="of one microbatch (default: 512)")
    parser.add_argument("--repeats", type=_positive, default=5, metavar="N", help="rounds to time (default: 5)")
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default: fp32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there, too")
    parser.set_defaults(run=_depth)


def _depth(args: argparse.Namespace) -> int:
    _check_folder(args.json)
    import torch

    from lime_dist.bench.depth import Sizes, run_depth

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    sizes = Sizes(num_layers=args.layers, hidden_size=args.hidden_size, num_tokens=args.tokens)
    report = run_depth(sizes, repeats=args.repeats, dtype=args.dtype, device=args.device, progress=_say)
    print(report.to_markdown())
    if args.json is not None:
        args.json.write_text(json.dumps(asdict(report), indent=2) + "\n")
    return 0


def _pipeline(args: argparse.Namespace) -> int:
    from lime_dist.bench.pipeline.ways import make_ways

    _check_folder(args.json)
    ways = make_ways(args.overrides, quick=args.quick, models=args.models)
    # Hosts of our making have no names, of which torch, when it is imported, is told not to warn at each connection.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from lime_dist.bench.pipeline.on_hosts import run_pipeline

    report = run_pipeline(ways, args.rounds)
    print(report.to_markdown())
    if args.json is not None:
        args.json.write_text(json.dumps(report.to_json(), indent=2) + "\n")
    return 0


def _prediction(args: argparse.Namespace) -> int:
    from lime_dist.bench.pipeline.ways import make_ways

    ways = make_ways(args.overrides, quick=args.quick)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as for `bench pipeline`
    from lime_dist.bench.pipeline.prediction import prediction_table, run_prediction

    print(prediction_table(run_prediction(ways, args.rounds)))
    return 0


def _checkpoint(args: argparse.Namespace) -> int:
    _check_folder(args.json)
    from lime_dist.bench.checkpoints import checkpoint_table, run_checkpoints

    found = run_checkpoints(args.parameters, args.overrides, args.rounds, args.out)
    print(checkpoint_table(found))
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(one) for one in found], indent=2) + "\n")
    return 0


def _check_folder(path: Path | None) -> None:
    if path is not None and not path.absolute().parent.is_dir():
        raise ConfigError(f"--json: the folder {path.parent} does not exist; make it first")


def _patterns(args: argparse.Namespace) -> int:
    from lime_dist.bench.runs import pattern_table

    print(pattern_table(args.config, args.overrides, args.patterns, args.seeds))
    return 0


def _precision(args: argparse.Namespace) -> int:
    from lime_dist.bench.runs import precision_table

    print(precision_table(args.config, args.overrides, args.seeds, args.stages))
    return 0


def _say(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


def _listed(text: str) -> list[str]:
    return [item.strip() for item in text.split(",")]


def _seeds(text: str) -> list[int]:
    if not all(item.isdecimal() for item in _listed(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers with commas between")
    return [int(item) for item in _listed(text)]


def _sizes(text: str) -> list[int]:
    """Such as 10M or 1B."""
    units = {"M": 10**6, "B": 10**9}
    found = [re.fullmatch(r"([0-9]+)([MB])", item) for item in _listed(text)]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} is not sizes such as 10M,1B")
    return [int(one[1]) * units[one[2]] for one in found if one]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
