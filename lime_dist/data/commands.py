"""The `data` part of the command line. Imports nothing heavy until a command runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from lime_dist.data.tasks.arithmetic import DEFAULT_OPERANDS, Arithmetic
from lime_dist.data.tasks.catalog import TASKS
from lime_dist.errors import DataError

if TYPE_CHECKING:
    from lime_dist.data.documents import TextFormat


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `data` and its commands; each sets `run`, a handler from the parsed arguments to the exit code."""
    parser = subparsers.add_parser(
        "data", help="build a corpus or a task, train a tokenizer, tokenize text, adopt token files"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_build_corpus(commands)
    _add_train_tokenizer(commands)
    _add_tokenize(commands)
    _add_adopt(commands)
    _add_build_task(commands)


def _add_build_corpus(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("build-corpus", help="write a small English corpus from Python's own documentation")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for train.jsonl and valid.jsonl")
    parser.add_argument(
        "--valid-fraction", type=_fraction, default=0.05, metavar="F", help="documents held out (default: 0.05)"
    )
    parser.add_argument(
        "--packages", action="store_true", help="take the documentation of the installed packages too: a larger corpus"
    )
    _add_overwrite(parser)
    parser.set_defaults(run=_build_corpus)


def _add_train_tokenizer(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("train-tokenizer", help="train a SentencePiece tokenizer")
    _add_text_options(parser)
    parser.add_argument("--vocab-size", type=_positive, required=True, metavar="N", help="number of token ids")
    parser.add_argument("--out", type=Path, required=True, metavar="PREFIX", help="writes PREFIX.model")
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe", help="kind of model (default: bpe)")
    parser.add_argument(
        "--character-coverage",
        type=_fraction_or_one,
        default=0.9995,
        metavar="F",
        help="share of the text's characters that get ids; the rest becomes bytes (default: 0.9995)",
    )
    parser.add_argument(
        "--max-lines", type=_positive, default=5_000_000, metavar="N", help="sample this many lines (default: 5000000)"
    )
    parser.add_argument(
        "--workers", type=_positive, default=4, metavar="N", help="threads; the file may depend on it (default: 4)"
    )
    _add_overwrite(parser)
    parser.set_defaults(run=_train_tokenizer)


def _add_tokenize(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("tokenize", help="turn text into token files for training")
    _add_text_options(parser)
    _add_tokenizer(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx and PREFIX.meta.json"
    )
    parser.add_argument(
        "--append-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the end-of-sequence token",
    )
    parser.add_argument(
        "--add-bos",
        action="store_true",
        help="begin each document with the beginning-of-sequence token, as the paper does",
    )
    add_special_tokens(parser)
    parser.add_argument(
        "--workers", type=_positive, default=_usable_cpus(), metavar="N", help="threads (default: the usable CPUs)"
    )
    _add_overwrite(parser)
    parser.set_defaults(run=_tokenize)


def _add_adopt(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "adopt", help="check token files of Megatron's own tools and write their PREFIX.meta.json"
    )
    parser.add_argument(
        "prefix", metavar="PREFIX", help="of PREFIX.bin and PREFIX.idx, as preprocess_data.py writes them"
    )
    _add_tokenizer(parser)
    add_special_tokens(parser)
    parser.add_argument("--out", metavar="PREFIX", help="a prefix elsewhere, which gets links and the meta file")
    _add_overwrite(parser)
    parser.set_defaults(run=_adopt)


def _add_build_task(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("build-task", help="write a synthetic task: examples, tokenizer and token files")
    parser.add_argument("task", choices=tuple(TASKS), help="what to make")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="folder for train, valid and, of prosqa, test"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="a .model or tokenizer.json (default: one of the task's own words is made)",
    )
    parser.add_argument(
        "--operands",
        type=_numbers,
        metavar="N,N",
        help=f"of arithmetic: operands of the expressions (default: {','.join(map(str, DEFAULT_OPERANDS))})",
    )
    for split in ("train", "valid", "test"):
        defaults = ", ".join(f"{task.sizes[split]} {name}" for name, task in TASKS.items() if split in task.sizes)
        parser.add_argument(
            f"--{split}",
            type=_positive,
            metavar="N",
            help=f"examples, of arithmetic for each number of operands (default: {defaults})",
        )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    _add_overwrite(parser)
    parser.set_defaults(run=_build_task)


def _add_text_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help=".jsonl (a document a line) or .txt (a document a file), UTF-8, may be .gz or .zst; or .parquet (a document a row)",
    )
    parser.add_argument(
        "--field", default="text", help="JSON field, or column of a .parquet, that holds the text (default: text)"
    )
    parser.add_argument("--document-per-line", action="store_true", help="each line of a .txt is a document")


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="FILE",
        help="a SentencePiece .model, or a tokenizer.json of Hugging Face's tokenizers",
    )


def add_special_tokens(parser: argparse.ArgumentParser) -> None:
    """What names the tokens that begin and end a document."""
    for name, words in (("bos", "beginning"), ("eos", "end")):
        parser.add_argument(
            f"--{name}",
            metavar="TOKEN",
            help=f"the {words}-of-sequence token (default: as the tokenizer or the tokenizer_config.json beside it says)",
        )


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace existing output")


def _build_corpus(args: argparse.Namespace) -> int:
    from lime_dist.data.corpus import build_corpus

    for written in build_corpus(
        args.out, valid_fraction=args.valid_fraction, packages=args.packages, overwrite=args.overwrite
    ):
        print(written)
    return 0


def _train_tokenizer(args: argparse.Namespace) -> int:
    from lime_dist.data.tokenizer import train_tokenizer

    model_path = train_tokenizer(
        args.input,
        args.out,
        vocab_size=args.vocab_size,
        model_type=args.model_type,
        character_coverage=args.character_coverage,
        text_format=_text_format(args),
        max_lines=args.max_lines,
        workers=args.workers,
        overwrite=args.overwrite,
    )
    print(f"{model_path}: {args.vocab_size:,} token ids")
    return 0


def _tokenize(args: argparse.Namespace) -> int:
    from lime_dist.data.special_tokens import SpecialTokens
    from lime_dist.data.tokenize import Packing, tokenize_files

    named = SpecialTokens(bos=args.bos, eos=args.eos)
    report = tokenize_files(
        args.input,
        args.tokenizer,
        args.out,
        text_format=_text_format(args),
        packing=Packing(add_bos=args.add_bos, append_eos=args.append_eos, named=named),
        workers=args.workers,
        overwrite=args.overwrite,
    )
    print(report)
    return 0


def _adopt(args: argparse.Namespace) -> int:
    from lime_dist.data.adopt import adopt_files
    from lime_dist.data.special_tokens import SpecialTokens

    named = SpecialTokens(bos=args.bos, eos=args.eos)
    print(adopt_files(args.prefix, args.tokenizer, out=args.out, named=named, overwrite=args.overwrite))
    return 0


def _build_task(args: argparse.Namespace) -> int:
    from lime_dist.data.tasks.build import build_task

    if args.operands is not None and args.task != Arithmetic.name:
        raise DataError(f"--operands: {args.task} has none; leave it out")
    task = TASKS[args.task]() if args.operands is None else Arithmetic(args.operands)
    given = {split: getattr(args, split) for split in ("train", "valid", "test") if getattr(args, split) is not None}
    if not given.keys() <= task.sizes.keys():
        raise DataError(f"--test: {args.task} has no such file; leave it out")
    sizes = {**task.sizes, **given}
    for written in build_task(
        task, args.out, sizes, tokenizer=args.tokenizer, seed=args.seed, overwrite=args.overwrite
    ):
        print(written)
    return 0


def _text_format(args: argparse.Namespace) -> TextFormat:
    from lime_dist.data.documents import TextFormat

    return TextFormat(field=args.field, document_per_line=args.document_per_line)


def _usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(_positive, text.split(",")))


def _fraction(text: str) -> float:
    value = _fraction_or_one(text)
    if value == 1:
        raise argparse.ArgumentTypeError("1 holds out everything; give less than 1")
    return value


def _fraction_or_one(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value
