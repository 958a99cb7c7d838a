"""`lime-dist checkpoint export-hf` and `import-hf`. Nothing heavy is imported until one runs."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parsers(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the commands of the group `checkpoint`."""
    _add_export(subparsers)
    _add_import(subparsers)


def _add_export(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("export-hf", help="write a folder that Hugging Face's transformers loads")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a step_N folder, or a run's folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default: fp32)")
    parser.add_argument(
        "--max-shard-size",
        default="4GiB",
        metavar="SIZE",
        help="of a weight file; as much is in memory (default: 4GiB)",
    )
    parser.add_argument("--tokenizer", metavar="X.model", help="default: the run's data.tokenizer; none leaves it out")
    parser.set_defaults(run=_export)


def _add_import(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "import-hf", help="make a checkpoint of a LIMe or LLaMA model in Hugging Face's form"
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="config.json and safetensors")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN_FOLDER", help="a new folder")
    parser.add_argument(
        "--as-lime",
        nargs="?",
        const="full",
        metavar="PATTERN",
        help="a LLaMA as LIMe whose routers begin with the own layer alone; put it behind the folder (default PATTERN: full)",
    )
    parser.set_defaults(run=_import)


def _export(args: argparse.Namespace) -> int:
    from lime_dist.hugging_face.export import Export, export_checkpoint

    export = Export(
        checkpoint=args.checkpoint,
        out=args.out,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        tokenizer=args.tokenizer,
    )
    config = export_checkpoint(export)
    trust = "" if config.depth.router == "none" else ", trust_remote_code=True"
    print(f'wrote {args.out}: AutoModelForCausalLM.from_pretrained("{args.out}"{trust})')
    if not (args.out / "tokenizer.json").is_file():
        print("without a tokenizer")
    return 0


def _import(args: argparse.Namespace) -> int:
    from lime_dist.hugging_face.importing import import_model

    checkpoint = import_model(args.folder, args.out, args.as_lime)
    print(
        f"wrote {checkpoint}: lime-dist train {args.out / 'config.yaml'} checkpoint.weights_from={args.out} run.dir=NEW"
    )
    return 0
