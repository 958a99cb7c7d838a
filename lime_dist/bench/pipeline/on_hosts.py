"""Starts the hosts and their ranks, and puts together what they have measured."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from lime_dist.bench.hosts import hosts, why_no_hosts
from lime_dist.bench.pipeline.comparison import Record, Report, Turn, make_record
from lime_dist.bench.pipeline.measuring import Findings, Job, Step, measure
from lime_dist.bench.pipeline.ways import Way
from lime_dist.config import to_dict
from lime_dist.lifecycle.local import run_local

SHARES = (0.25, 0.5)


def run_pipeline(ways: Sequence[Way], rounds: int) -> Report:
    """Every way, on hosts of a stage each, without limits and with links at both `SHARES`; on loopback where hosts
    cannot be made. Raises: LossesDiffer (as RankFailed), and as `run_local`."""
    why_not = why_no_hosts()
    shares: list[float | None] = [None]
    if why_not is None:
        shares += SHARES
    else:
        print(f"no hosts here: {why_not}; ranks on loopback, without limits and byte counts", file=sys.stderr)
    num_stages = ways[0].config.parallel.pp
    job = Job(ways=list(ways), shares=shares, rounds=rounds)
    with hosts(num_stages) if why_not is None else nullcontext(None) as made:
        findings = run_local(measure, num_stages, job, made, describe=lambda rank: f"stage {rank}")
    return Report(circumstances=_circumstances(job, why_not), records=make_records(job, findings))


def make_records(job: Job, findings: Sequence[Findings]) -> list[Record]:
    """findings: by host."""
    first = findings[0]
    place_of = {(way.model, way.schedule): index for index, way in enumerate(job.ways)}
    return [
        make_record(
            way,
            _turns(findings, index, share),
            _turns(findings, place_of[way.twin], share),
            share=job.shares[share],
            bytes_per_second=first.rates[share],
            llama_seconds=first.llama_seconds[share],
            peak_bytes=max(host.peak_bytes[index] for host in findings),
            first_loss=first.losses[index],
        )
        for index, way in enumerate(job.ways)
        for share in range(len(job.shares))
    ]


def _turns(findings: Sequence[Findings], way: int, share: int) -> list[Turn]:
    own = [[step for step in host.steps if (step.way, step.share) == (way, share)] for host in findings]
    return [_turn(of_hosts) for of_hosts in zip(*own, strict=True)]


def _turn(of_hosts: Sequence[Step]) -> Turn:
    cards = [step.card for step in of_hosts if step.card is not None]
    return Turn(
        seconds=max(step.seconds for step in of_hosts),
        cpu_seconds=sum(step.cpu_seconds for step in of_hosts),
        sent=[card.sent for card in cards] or None,
        received=[card.received for card in cards] or None,
    )


def _circumstances(job: Job, why_not: str | None) -> dict:
    return {
        "links": "network namespaces" if why_not is None else f"loopback: {why_not}",
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "rounds": job.rounds,
        "config": to_dict(job.ways[0].config),
    }
