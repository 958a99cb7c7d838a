"""`lime-dist submit`. Nothing is imported until it runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the command; sets `run`, a handler from the parsed arguments to the exit code."""
    parser = subparsers.add_parser("submit", help="train on a SLURM cluster: writes the batch script, calls sbatch")
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="override a key, such as parallel.pp=4 or cluster.nodes=2"
    )
    parser.add_argument("--cluster", type=Path, required=True, metavar="FILE", help="YAML file of the cluster")
    parser.add_argument("--dry-run", action="store_true", help="print the script; write and submit nothing")
    parser.set_defaults(run=_submit)


def _submit(args: argparse.Namespace) -> int:
    from lime_dist.cluster.submit import prepare, submit

    prepared = prepare(args.config, args.cluster, args.overrides)
    submission, cluster = prepared.submission, prepared.cluster
    _tell(f"{cluster.nodes} nodes of {cluster.ranks_per_node} ranks: {prepared.config.layout}")
    _tell(f"ranks are told to save {submission.stop_lead_seconds} s before the time limit: {prepared.lead_source}")
    if args.dry_run:
        _tell(f"would write {submission.slurm_dir} and run: sbatch {submission.script}")
        print(prepared.script, end="")
        return 0
    job = submit(prepared)
    _tell(f"job {job}; its log: {submission.slurm_dir}/logs/{job}.out")
    print(job)
    return 0


def _tell(text: str) -> None:
    print(text, file=sys.stderr)
