"""One host's part of the bench: it holds every way's stage, and the ways take turns. Collective: world, throughout."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from lime_dist.backends.megatron import Groups
from lime_dist.bench.depth import LiveBytes
from lime_dist.bench.hosts import CardBytes, Host
from lime_dist.bench.pipeline.trainers import DeepSpeedTupleTrainer, OwnTrainer, TorchTupleTrainer, Trainer
from lime_dist.bench.pipeline.ways import LLAMA, PLAIN, Pipeline, Way, limited_rate
from lime_dist.formats import format_rate
from lime_dist.lifecycle.launcher import own_place
from lime_dist.training.world import join_world

_TRAINERS: dict[Pipeline, type[OwnTrainer | TorchTupleTrainer | DeepSpeedTupleTrainer]] = {
    Pipeline.OWN: OwnTrainer,
    Pipeline.TORCH: TorchTupleTrainer,
    Pipeline.DEEPSPEED: DeepSpeedTupleTrainer,
}
_SAME_LOSS = 1e-4  # relative; fp32 sums of a few thousand terms in another order
_LLAMA_STEPS = 3  # before each limit, to see how fast the cores are now


@dataclass(frozen=True, kw_only=True)
class Job:
    """shares: of LLaMA's step, in which the busiest card is to carry the full pattern's; None: no limit."""

    ways: list[Way]
    shares: list[float | None]
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of `ways[way]` under `shares[share]`, as seen on one host. card: None without hosts."""

    way: int
    share: int
    seconds: float
    cpu_seconds: float
    card: CardBytes | None


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Of one host. peak_bytes, losses: by way, of the second and the first step. rates: bytes a second by share."""

    losses: list[float]
    peak_bytes: list[int]
    llama_seconds: list[float]
    rates: list[float | None]
    steps: list[Step]


class LossesDiffer(RuntimeError):
    """Ways that should be the same model are not: a defect, as their times cannot be compared."""


def measure(job: Job, hosts: Sequence[Host] | None) -> Findings:
    """hosts: by rank; None: all ranks are on loopback, and only a share of None is possible."""
    place = own_place()
    host = hosts[place.rank] if hosts is not None else None
    if hosts is not None and host is not None:
        host.enter()
        os.environ["MASTER_ADDR"] = hosts[0].address
    return _Bench(job, host, *join_world(ring(job.ways).config, place)).run()


def ring(ways: Sequence[Way]) -> Way:
    """One whose groups have all that the others' need."""
    return max(ways, key=lambda way: way.config.parallel.virtual_stages)


class _Bench:
    def __init__(self, job: Job, host: Host | None, groups: Groups, device: torch.device):
        self._job, self._host = job, host
        self._say(f"building {len(job.ways)} ways")
        self._trainers = [_build(way, groups, device) for way in job.ways]
        config = job.ways[0].config
        shape = (config.data.global_batch_size, config.data.seq_length + 1)
        self._batch = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))

    def run(self) -> Findings:
        losses, peaks = self._warm_up()
        steps: list[Step] = []
        llama_seconds: list[float] = []
        rates: list[float | None] = []
        for share in range(len(self._job.shares)):
            llama_seconds.append(self._llama_seconds())
            rates.append(self._set_limit(share, llama_seconds[-1]))
            for turn in range(self._job.rounds):
                self._say(f"{_share_name(self._job.shares[share])}: round {turn + 1} of {self._job.rounds}")
                steps += [self._step(way, share) for way in range(len(self._job.ways))]
        return Findings(losses=losses, peak_bytes=peaks, llama_seconds=llama_seconds, rates=rates, steps=steps)

    def _warm_up(self) -> tuple[list[float], list[int]]:
        """First losses, which are compared, and the tensors that a step holds when they are most."""
        losses, peaks = [], []
        for way, trainer in zip(self._job.ways, self._trainers):
            self._say(f"first steps: {way.name}")
            losses.append(trainer.step(self._batch))
            with LiveBytes() as memory:
                trainer.step(self._batch)
            peaks.append(memory.peak)
        check_losses(self._job.ways, losses)
        return losses, peaks

    def _llama_seconds(self) -> float:
        if self._host is not None:
            self._host.limit(None)
        llama = next(i for i, way in enumerate(self._job.ways) if (way.model, way.schedule) == (LLAMA, PLAIN))
        seconds = statistics.median(self._step(llama, 0).seconds for _ in range(_LLAMA_STEPS))
        return agreed(seconds)

    def _set_limit(self, share_index: int, llama_seconds: float) -> float | None:
        share = self._job.shares[share_index]
        if share is None or self._host is None:
            return None
        rate = limited_rate(self._job.ways, llama_seconds, share)
        self._host.limit(rate)
        self._say(f"a LLaMA step takes {llama_seconds:.2f} s; each card now {format_rate(rate)} each way")
        return rate

    def _step(self, way: int, share: int) -> Step:
        dist.barrier()
        before = self._host.card_bytes() if self._host is not None else None
        busy, start = time.process_time(), time.perf_counter()
        self._trainers[way].step(self._batch)
        busy = time.process_time() - busy
        dist.barrier()
        seconds = time.perf_counter() - start
        card = self._host.card_bytes() - before if self._host is not None and before is not None else None
        return Step(way=way, share=share, seconds=seconds, cpu_seconds=busy, card=card)

    def _say(self, progress: str) -> None:
        if dist.get_rank() == 0:
            print(progress, file=sys.stderr, flush=True)


def _build(way: Way, groups: Groups, device: torch.device) -> Trainer:
    return _TRAINERS[way.pipeline](way.config, groups_of(way, groups), device)


def groups_of(way: Way, groups: Groups) -> Groups:
    """Of those of `ring` what the way's plan has messages for."""
    has_wrap = way.config.parallel.virtual_stages > 1
    return groups if has_wrap else replace(groups, wrap_forward=None, wrap_backward=None)


def agreed(value: float) -> float:
    """Rank 0's on all ranks."""
    tensor = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(tensor, 0)
    return float(tensor)


def _share_name(share: float | None) -> str:
    return "no limit" if share is None else f"busiest card {share} of a LLaMA step"


def check_losses(ways: Sequence[Way], losses: Sequence[float]) -> None:
    """Raises: LossesDiffer."""
    first: dict[tuple[str, str], tuple[str, float]] = {}
    for way, loss in zip(ways, losses, strict=True):
        name, expected = first.setdefault(way.first_loss_of, (way.name, loss))
        if not abs(loss - expected) <= _SAME_LOSS * expected:
            raise LossesDiffer(f"first loss of {way.name}: {loss}, of {name}: {expected}")
