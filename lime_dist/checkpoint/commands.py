"""`lime-dist checkpoint inspect`, `verify`, `diff`, `convert` and `average`. Nothing heavy is imported until one runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lime_dist.lifecycle.ending import DONE, FAILED, NEVER_RESTART

if TYPE_CHECKING:
    from lime_dist.checkpoint.upkeep import Done

_CHECKPOINT = "a step_N folder, or a run's folder for its newest"


def add_parsers(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the commands; each sets `run`, a handler from the parsed arguments to the exit code."""
    inspect = subparsers.add_parser("inspect", help="step, tokens, run, layers and shapes; reads no tensor")
    inspect.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=_CHECKPOINT)
    inspect.add_argument("--json", action="store_true", help="print JSON, with the config")
    inspect.set_defaults(run=_inspect)
    verify = subparsers.add_parser("verify", help="read all of it and hold it against its checksums")
    verify.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help=_CHECKPOINT)
    verify.set_defaults(run=_verify)
    diff = subparsers.add_parser("diff", help="in which keys and tensors two differ: exit code 1 where they do")
    diff.add_argument("left", type=Path, metavar="CHECKPOINT", help=_CHECKPOINT)
    diff.add_argument("right", type=Path, metavar="CHECKPOINT")
    diff.set_defaults(run=_diff)
    convert = subparsers.add_parser("convert", help="write one of an earlier version in the present form")
    convert.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=_CHECKPOINT)
    convert.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder, such as step_000100")
    convert.set_defaults(run=_convert)
    average = subparsers.add_parser("average", help="the mean of weights, for checkpoint.weights_from and eval")
    average.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help=_CHECKPOINT)
    average.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    average.set_defaults(run=_average)


@contextmanager
def _progress(total_bytes: int) -> Iterator[Done]:
    from tqdm import tqdm

    with tqdm(total=total_bytes, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), delay=1.0) as bar:
        yield bar.update


def _inspect(args: argparse.Namespace) -> int:
    from lime_dist.checkpoint.upkeep import description, description_text, open_checkpoint

    reader = open_checkpoint(args.checkpoint)
    print(json.dumps(description(reader)) if args.json else description_text(reader))
    return DONE


def _verify(args: argparse.Namespace) -> int:
    from lime_dist.checkpoint.upkeep import open_checkpoint, tensor_bytes, verify
    from lime_dist.errors import CheckpointError
    from lime_dist.formats import format_bytes

    code = DONE
    for path in args.checkpoints:
        try:
            reader = open_checkpoint(path)
            with _progress(tensor_bytes(reader)) as done:
                problems = list(verify(reader, done))
        except CheckpointError as error:
            problems = [str(error)]
        if problems:
            code = NEVER_RESTART
            print("\n".join(f"lime-dist: {problem}" for problem in problems), file=sys.stderr)
        else:
            found = "whole" if reader.has_checksums else "all of it can be read, but it has no checksums"
            print(f"{reader.folder}: {found}, {format_bytes(tensor_bytes(reader))}")
    return code


def _diff(args: argparse.Namespace) -> int:
    from lime_dist.checkpoint.upkeep import config_differences, open_checkpoint, tensor_differences

    left, right = open_checkpoint(args.left), open_checkpoint(args.right)
    print(f"step {left.meta.step} | {right.meta.step}, samples {left.meta.samples_seen} | {right.meta.samples_seen}")
    for line in config_differences(left, right):
        print(line)
    count = 0
    for found in tensor_differences(left, right):
        count += 1
        size = "other shapes" if found.largest is None else f"{found.largest:.3g} of {found.magnitude:.3g}"
        print(f"{found.key}: {size}")
    if count == 0:
        print("all tensors are equal to the bit")
    return FAILED if count else DONE


def _convert(args: argparse.Namespace) -> int:
    from lime_dist.checkpoint.upkeep import convert, open_checkpoint, tensor_bytes

    reader = open_checkpoint(args.checkpoint)
    with _progress(tensor_bytes(reader)) as done:
        convert(reader, args.out, done)
    print(f"wrote {args.out}")
    return DONE


def _average(args: argparse.Namespace) -> int:
    from lime_dist.checkpoint.upkeep import average, open_checkpoint, tensor_bytes

    readers = [open_checkpoint(path) for path in args.checkpoints]
    with _progress(sum(map(tensor_bytes, readers)) // 3) as done:
        average(readers, args.out, done)
    print(f"wrote {args.out}: weights of {len(readers)} checkpoints")
    return DONE
