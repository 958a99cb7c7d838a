"""`lime-dist bench prediction`: what the simulator says of steps over slow links, after one profile, against the steps themselves."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from lime_dist.backends.megatron import Groups
from lime_dist.bench.hosts import BUCKET_BYTES, Host, hosts, why_no_hosts
from lime_dist.bench.pipeline.measuring import agreed, groups_of, ring
from lime_dist.bench.pipeline.on_hosts import SHARES
from lime_dist.bench.pipeline.ways import LEAST, LLAMA, PLAIN, Way, limited_rate
from lime_dist.errors import ConfigError
from lime_dist.formats import format_rate
from lime_dist.lifecycle.launcher import own_place
from lime_dist.lifecycle.local import run_local
from lime_dist.pipeline.recorder import Recorder
from lime_dist.pipeline.step_times import StepTimes
from lime_dist.plan.costs import LinkSpeed, Rates, costs_of
from lime_dist.plan.simulate import Simulated, simulate
from lime_dist.profiling.accounting import Account, account
from lime_dist.profiling.calibration import measured_rates
from lime_dist.profiling.clock_offset import ClockOffset
from lime_dist.profiling.deliveries import times_alone
from lime_dist.profiling.profile_files import Profile, RankRecord
from lime_dist.profiling.timeline import StepTimeline, read_timelines
from lime_dist.training.rank import Rank
from lime_dist.training.world import join_world

_WARM_UP = 2
EXPOSED_SHARE = 0.05  # of a step, from which on a boundary's exposed time is compared


@dataclass(frozen=True, kw_only=True)
class Found:
    """Of one host. steps: by share, then way. rates: bytes a second each way, by share; None: no limit.

    over_plain: of steps without limits, the time of a recorded one over that of the plain one behind it.
    """

    steps: list[list[list[StepTimes]]]
    rates: list[float | None]
    over_plain: list[float]
    group_ranks: dict[str, list[int]]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One way at one rate, in seconds. exposed: by way over a boundary, (measured, predicted), where it is a fair part of the step.

    transfer_over_rate: what messages took alone over their bytes less the bucket's, by the rate; None without a limit.
    """

    model: str
    rate: float | None
    measured: float
    predicted: float
    exposed: dict[str, tuple[float, float]]
    transfer_over_rate: float | None

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """over_plain: see `Found`, of the first host."""

    predictions: list[Prediction]
    over_plain: list[float]


def run_prediction(ways: Sequence[Way], rounds: int) -> Outcome:
    """Raises: ConfigError where hosts with limited cards cannot be made."""
    why_not = why_no_hosts()
    if why_not is not None:
        raise ConfigError(f"bench prediction: needs hosts of its own making: {why_not}")
    ways = [way for way in ways if way.schedule == PLAIN and way.pipeline.value == "lime_dist"]
    num_stages = ways[0].config.parallel.pp
    with hosts(num_stages) as made:
        found = run_local(_record, num_stages, ways, rounds, made, describe=lambda rank: f"stage {rank}")
    return Outcome(predictions=_compare(ways, found), over_plain=found[0].over_plain)


# ---- on the hosts


def _record(ways: list[Way], rounds: int, made: Sequence[Host]) -> Found:
    place = own_place()
    host = made[place.rank]
    host.enter()
    os.environ["MASTER_ADDR"] = made[0].address
    return _Recording(ways, host, *join_world(ring(ways).config, place)).run(rounds)


class _Recording:
    def __init__(self, ways: Sequence[Way], host: Host, groups: Groups, device: torch.device):
        self._ways, self._host, self._device = ways, host, device
        self._say(f"building {len(ways)} ways")
        self._ranks = [Rank(way.plan, groups_of(way, groups), device) for way in ways]
        config = ways[0].config
        shape = (config.data.global_batch_size, config.data.seq_length + 1)
        self._batch = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))

    def run(self, rounds: int) -> Found:
        """Each round goes through all limits, so that a machine whose speed drifts favours none."""
        for way in range(len(self._ways)):
            for _ in range(_WARM_UP):
                self._step(way)
        rates = self._rates()
        steps: list[list[list[StepTimes]]] = [[[] for _ in self._ways] for _ in rates]
        over_plain: list[float] = []
        for turn in range(rounds):
            for share, rate in enumerate(rates):
                self._say(f"round {turn + 1} of {rounds}, limit {share + 1} of {len(rates)}")
                self._host.limit(rate)
                for way in range(len(self._ways)):
                    steps[share][way].append(self._step(way))
                    if rate is None:
                        over_plain.append(_seconds(steps[share][way][-1]) / self._plain_step(way))
        names = {each.group_name for shares in steps for way in shares for step in way for each in step.collectives}
        everyone = [*range(dist.get_world_size())]
        groups = {name: everyone for name in names}
        return Found(steps=steps, rates=rates, over_plain=over_plain, group_ranks=groups)

    def _step(self, way: int) -> StepTimes:
        rank, recorder = self._ranks[way], Recorder(self._device)
        dist.barrier()
        with recorder.recording(rank.transport):
            rank.recorder = recorder
            recorder.begin()
            rank.train_step(self._batch, lr_factor=1.0)
            recorder.mark()
            rank.recorder = None
        return recorder.take()

    def _plain_step(self, way: int) -> float:
        """Seconds."""
        dist.barrier()
        start = time.perf_counter()
        self._ranks[way].train_step(self._batch, lr_factor=1.0)
        return time.perf_counter() - start

    def _rates(self) -> list[float | None]:
        """Without a limit, and by a LLaMA step so."""
        llama = next(index for index, way in enumerate(self._ways) if way.model == LLAMA)
        seconds = agreed(statistics.median(_seconds(self._step(llama)) for _ in range(3)))
        limits = [limited_rate(self._ways, seconds, share) for share in SHARES]
        self._say(f"a LLaMA step takes {seconds:.2f} s; limits {', '.join(map(format_rate, limits))} each way")
        return [None, *limits]

    def _say(self, progress: str) -> None:
        if dist.get_rank() == 0:
            print(progress, file=sys.stderr, flush=True)


def _seconds(step: StepTimes) -> float:
    return (step.marks[-1] - step.marks[0]) / 1e9


# ---- against the simulator


def _compare(ways: Sequence[Way], found: Sequence[Found]) -> list[Prediction]:
    """One profile prices all: the full pattern's, without limits."""
    calibrating = next(index for index, way in enumerate(ways) if way.model == LEAST)
    profile = _profile(ways[calibrating], found, 0, calibrating)
    rates = measured_rates(profile, list(read_timelines(profile)))
    return [
        _prediction(way, _profile(way, found, share, index), rates, found[0].rates[share])
        for share in range(len(found[0].rates))
        for index, way in enumerate(ways)
    ]


def _profile(way: Way, found: Sequence[Found], share: int, index: int) -> Profile:
    ranks = tuple(
        RankRecord(
            rank=rank,
            host="",
            device="CPU",
            cores=len(os.sched_getaffinity(0)),
            threads=1,
            offsets=(ClockOffset(0, 0, 0),) * 2,
            epoch_ns=0,
            group_ranks={name: tuple(ranks) for name, ranks in host.group_ranks.items()},
            steps=tuple(host.steps[share][index]),
        )
        for rank, host in enumerate(found)
    )
    return Profile(folder=Path(), plan=way.plan, steps=tuple(range(1, 1 + len(ranks[0].steps))), ranks=ranks)


def _prediction(way: Way, profile: Profile, rates: Rates, rate: float | None) -> Prediction:
    if rate is not None:
        rates = replace(rates, links={ends: _limited(link, rate) for ends, link in rates.links.items()})
    timelines = list(read_timelines(profile))
    measured, predicted = account(profile, timelines), simulate(way.plan, costs_of(way.plan, rates))
    step = statistics.median(timeline.seconds for timeline in timelines)
    return Prediction(
        model=way.model,
        rate=rate,
        measured=step,
        predicted=predicted.step_seconds,
        exposed=_exposed(measured, predicted, step),
        transfer_over_rate=None if rate is None else _transfer_over_rate(timelines, rate),
    )


def _transfer_over_rate(timelines: Sequence[StepTimeline], rate: float) -> float | None:
    """Of messages that are larger than the bucket, as those took that were most alone (`times_alone`); None if there are none."""
    deliveries = [delivery for timeline in timelines for delivery in timeline.deliveries]
    alone = times_alone(deliveries)
    large = [each for each in deliveries if each.message.num_bytes > BUCKET_BYTES]
    if not large:
        return None
    own = [alone[each.sender, each.receiver, each.message.num_bytes] for each in large]
    return sum(own) / sum((each.message.num_bytes - BUCKET_BYTES) / rate for each in large)


def _limited(link: LinkSpeed, rate: float) -> LinkSpeed:
    """What a byte takes without a limit, it takes of the hosts at either end, and with one too."""
    per_byte = 1 / rate + 1 / link.bytes_per_second
    return replace(link, bytes_per_second=1 / per_byte, burst_bytes=BUCKET_BYTES)


def _exposed(measured: Account, predicted: Simulated, step: float) -> dict[str, tuple[float, float]]:
    pairs = {
        boundary.name: (
            boundary.exposed,
            predicted.links[boundary.from_stage, boundary.to_stage].exposed_seconds,
        )
        for boundary in measured.boundaries
    }
    return {name: pair for name, pair in pairs.items() if pair[0] > EXPOSED_SHARE * step}


def prediction_table(outcome: Outcome) -> str:
    """Markdown."""
    head = ("way", "each card", "measured", "predicted", "error", "exposed over 5 % of the step: measured, predicted ms", "transfer, alone / (bytes - bucket) x rate")  # fmt: skip
    rows = [
        (
            one.model,
            "no limit" if one.rate is None else format_rate(one.rate),
            f"{one.measured:.3f} s",
            f"{one.predicted:.3f} s",
            f"{100 * one.error:+.1f} %",
            "; ".join(f"{name}: {1e3 * a:.0f}, {1e3 * b:.0f}" for name, (a, b) in one.exposed.items()) or "-",
            "-" if one.transfer_over_rate is None else f"{one.transfer_over_rate:.2f}",
        )
        for one in outcome.predictions
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))
    ratios = sorted(outcome.over_plain)
    return (
        f"{table}\n\nA recorded step takes {statistics.median(ratios):.3f} of a plain one "
        f"({ratios[0]:.3f} to {ratios[-1]:.3f}, {len(ratios)} pairs)."
    )
