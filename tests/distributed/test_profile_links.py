"""Profiles of stages on hosts of their own, whose links are known: what waits is told by its cause, and faults are named."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import pytest
import torch
import torch.distributed as dist

from lime_dist.bench.hosts import BUCKET_BYTES, Host, hosts, why_no_hosts
from lime_dist.bench.pipeline.ways import LEAST, PLAIN, Way, make_ways
from lime_dist.lifecycle.launcher import own_place
from lime_dist.lifecycle.local import run_local
from lime_dist.pipeline.recorder import Recorder
from lime_dist.profiling.analysis import Analysis
from lime_dist.profiling.clock_offset import ClockOffset
from lime_dist.profiling.profile_files import Profile, RankRecord
from lime_dist.profiling.timeline import Cause
from lime_dist.training.rank import Rank
from lime_dist.training.world import join_world

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why := why_no_hosts()), reason=str(why)),
]
NUM_STAGES = 4
FAST, SLOW = 50e6, 12.5e6  # bytes a second: 400 and 100 Mbit/s
LATE_SECONDS = 0.05  # of a pass; longer than the core of a busy machine makes one wait
NUM_STEPS = 3


def record(
    *, rates: Sequence[float | None] = (FAST,) * NUM_STAGES, late_stage: int | None = None, **sizes: int
) -> Analysis:
    """Of a few steps. rates: of each host's card. late_stage: whose forward passes sleep."""
    overrides = [f"data.{key}={value}" for key, value in sizes.items()]
    way = next(way for way in make_ways(overrides, quick=True) if (way.model, way.schedule) == (LEAST, PLAIN))
    with hosts(NUM_STAGES) as made:
        records = run_local(_record, NUM_STAGES, way, made, list(rates), late_stage)
    steps = tuple(range(1, NUM_STEPS + 1))
    return Analysis(Profile(folder=Path(), plan=way.plan, steps=steps, ranks=tuple(records)))


def _record(way: Way, made: Sequence[Host], rates: Sequence[float | None], late_stage: int | None) -> RankRecord:
    place = own_place()
    host = made[place.rank]
    host.enter()
    os.environ["MASTER_ADDR"] = made[0].address
    groups, device = join_world(way.config, place)
    rank = Rank(way.plan, groups, device)
    if place.rank == late_stage:
        rank.stage.chunk(place.rank).register_forward_pre_hook(lambda *_: time.sleep(LATE_SECONDS))
    host.limit(rates[place.rank])
    shape = way.config.data.global_batch_size, way.config.data.seq_length + 1
    batch = torch.randint(way.config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    rank.train_step(batch, lr_factor=0.0)
    rank.recorder = recorder = Recorder(device)
    steps = []
    with recorder.recording(rank.transport):
        for _ in range(NUM_STEPS):
            dist.barrier()
            recorder.begin()
            rank.train_step(batch, lr_factor=0.0)
            recorder.mark()
            steps.append(recorder.take())
    names = {each.group_name for step in steps for each in step.collectives}
    everyone = tuple(range(NUM_STAGES))
    return RankRecord(
        rank=place.rank,
        host=f"host{place.rank}",
        device="CPU",
        cores=2,
        threads=1,
        offsets=(ClockOffset(0, 0, 0),) * 2,  # the hosts have one kernel
        epoch_ns=0,
        group_ranks=dict.fromkeys(names, everyone),
        steps=tuple(steps),
    )


def link_share(analysis: Analysis, stage: int) -> float:
    """Of a rank's waits for other stages, those that are laid on links."""
    seconds = analysis.account.ranks[stage].seconds
    link = seconds[Cause.QUEUE] + seconds[Cause.TRANSFER]
    return link / (link + seconds[Cause.DEPENDENCY])


def test_a_late_sender_behind_a_fast_link_is_no_transfer() -> None:
    analysis = record(rates=(None,) * NUM_STAGES, late_stage=1)
    assert link_share(analysis, 2) < 0.1
    assert analysis.account.ranks[2].seconds[Cause.DEPENDENCY] > 4 * LATE_SECONDS
    assert "stage 1" in analysis.sentences[0]


def test_a_punctual_sender_behind_a_slow_link_is_transfer() -> None:
    slow = record(rates=(None, None, None, 3e6))
    assert link_share(slow, 3) > 0.5
    (last,) = (each for each in slow.account.boundaries if each.name == "2>3")
    assert last.exposed > 0.5 * last.transfer


def test_transfers_take_their_bytes_over_the_rate() -> None:
    """Of 1 MiB: more is more than the limiter queues, and less is hardly more than what it lets through at once."""
    rate = 25e6
    analysis = record(rates=(rate,) * NUM_STAGES, seq_length=1024)
    ways: dict[tuple[int, int], list[float]] = defaultdict(list)
    for delivery in (each for timeline in analysis.timelines for each in timeline.deliveries):
        if delivery.message.num_bytes == 2**20:
            ways[delivery.sender, delivery.receiver].append(delivery.transfer_seconds)
    assert len(ways) == 2 * (NUM_STAGES - 1)
    for way, seconds in ways.items():
        assert 0.95 * (2**20 - BUCKET_BYTES) / rate < median(seconds) < 1.05 * 2**20 / rate, way


@pytest.mark.parametrize(
    ("slow_host", "name"), [(2, "links of stage 2"), (3, "link 2>3"), (0, "link 0>1")], ids=["inner", "last", "first"]
)
def test_a_slow_card_is_named_first(slow_host: int, name: str) -> None:
    rates = [SLOW if host == slow_host else FAST for host in range(NUM_STAGES)]
    first = record(rates=rates).sentences[0]
    assert name in first.split(";")[1]


def test_a_slow_card_and_a_late_stage_are_both_named() -> None:
    first = record(rates=(FAST, FAST, FAST, SLOW), late_stage=1).sentences[0]
    assert "link 2>3" in first and "stage 1" in first


def test_nothing_is_named_where_nothing_is_wrong() -> None:
    assert all(fault.kind != "link" for fault in record().faults)
