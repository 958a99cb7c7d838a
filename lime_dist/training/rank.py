"""One rank of a run: its stage, executor and optimiser, and the step that they make together."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lime_dist.backends.deepspeed import ZeroOptimizer
from lime_dist.backends.megatron import Groups, MegatronParts
from lime_dist.errors import TrainingDiverged
from lime_dist.lifecycle.pulse import Pass, Pulse
from lime_dist.lime.microbatch import Microbatch, count_targets, read_microbatch
from lime_dist.lime.model import LimeChunk, LimeStage
from lime_dist.lime.values import initialize
from lime_dist.pipeline.executor import Executor
from lime_dist.pipeline.recorder import Recorder
from lime_dist.pipeline.transport import Incoming, ResidualShare, Sent, Transport
from lime_dist.plan.run_plan import RunPlan
from lime_dist.plan.schedule import Action, Kind
from lime_dist.plan.stages import StagePlan
from lime_dist.training.peak_memory import peak_bytes
from lime_dist.training.spikes import Action as Judged
from lime_dist.training.spikes import Verdict, find_not_finite

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class RowsOfBatch(Protocol):
    """A global batch of values [global_batch_size, seq + 1], which reads rows when asked for them."""

    def __getitem__(self, rows: slice) -> Tensor: ...

    @property
    def num_targets(self) -> int | None:
        """Those that count in the loss; None where the values are ids without marks."""


Batch = Tensor | RowsOfBatch


class TrafficDiffers(RuntimeError):
    """The transport sent other messages or bytes than the plan says: a defect, as gradients may be wrong."""


TAKEN = Verdict(action=Judged.TAKE)
Judge = Callable[[float, float], Verdict]  # loss, gradient norm -> the same on all ranks


def require_finite(loss: float, grad_norm: float) -> Verdict:
    """Raises: TrainingDiverged."""
    if reason := find_not_finite(loss, grad_norm):
        raise TrainingDiverged(reason)
    return TAKEN


@dataclass(frozen=True)
class StepResult:
    """What every rank knows after a step.

    boundary_bytes: for each boundary, as `RunPlan.boundary_bytes` has them, the bytes of all microbatches' bundles that one
    tensor rank of one replica sent forward, as counted at the transport; as many came back as gradients.
    """

    loss: float
    grad_norm: float
    boundary_bytes: list[int]
    peak_bytes: int  # the most that any rank has had before its update (`peak_memory.py`)
    stop_asked: bool = False  # of any rank
    verdict: Verdict = TAKEN


# Where what ranks tell each other lies; from the last on by stage, and behind the stages the peak of each rank.
_LOSS, _GRAD_NORM, _STOPS, _BYTES = range(4)


class Rank:
    """Everything one rank holds. Collective: the constructor and every method, over all ranks."""

    def __init__(self, run_plan: RunPlan, groups: Groups, device: torch.device, pulse: Pulse | None = None):
        self.pulse = pulse or Pulse()
        self.pulse.beat("load")
        self.run_plan, self.groups, self.device = run_plan, groups, device
        self.config = config = run_plan.config
        self.plan: StagePlan = run_plan.stages[groups.coordinate.pp_rank]
        self.stage = self._build_stage()
        initialize(self.stage, config.run.seed)
        self.optimizer = ZeroOptimizer(self.stage, config, groups, device)
        self.recorder: Recorder | None = None  # of the step that is being made
        self.transport = Transport.connect(groups, device)
        self._executor = Executor(
            stage=self.stage,
            plan=self.plan,
            transport=self.transport,
            residual_share=ResidualShare(groups.tp, config.parallel.sequence_parallel),
            call=self.pulse.around("forward", self.optimizer.call),
            backward=self.pulse.around("backward", self.optimizer.backward),
            await_input=self._await_input,
        )

    def _build_stage(self) -> LimeStage:
        config = self.config
        parts = MegatronParts(
            self.groups,
            sequence_parallel=config.parallel.sequence_parallel,
            dtype=TORCH_DTYPES[config.run.dtype],
            device=self.device,
        )
        return LimeStage(
            {
                chunk.chunk: LimeChunk(
                    config.model,
                    chunk.transfer,
                    chunk.layers,
                    parts,
                    sum_dtype=TORCH_DTYPES[config.partial_sum_dtype],
                    recompute=config.parallel.recompute == "layer",
                )
                for chunk in self.plan.chunks
            }
        )

    def _await_input(self, action: Action, incoming: Incoming) -> Tensor:
        return self.pulse.awaiting(action.kind.name.lower(), _pass(action), incoming.wait)

    def _run_passes(self, actions: Sequence[Action], microbatches: list[Microbatch], **how: Any) -> list[Tensor]:
        """how: as `Executor.run` has it."""
        self.pulse.expect({
            kind.name.lower(): [_pass(action) for action in actions if action.kind is kind]
            for kind in Kind
        })  # fmt: skip
        return self._executor.run(actions, microbatches, **how)

    def _mark(self) -> None:
        if self.recorder is not None:
            self.recorder.mark()

    @property
    def is_logger(self) -> bool:
        """The rank that writes what a run writes once."""
        return dist.get_rank() == 0

    def rows(self) -> list[slice]:
        """Of a global batch this replica's, by microbatch: every dp-th block."""
        config, size = self.config, self.config.microbatch_size
        blocks = range(self.groups.coordinate.dp_rank, config.layout.dp * config.num_microbatches, config.layout.dp)
        return [slice(block * size, (block + 1) * size) for block in blocks]

    def microbatches(self, batch: Batch) -> list[Microbatch]:
        """This replica's microbatches of a global batch. Stages between the first and the last chunk need of the tokens their
        shape only, and have them on the CPU.
        """
        num_targets = _known_targets(batch)
        found = [self._microbatch(batch[rows], num_targets) for rows in self.rows()]
        reads_tokens = any(chunk.is_first or chunk.is_last for chunk in self.plan.chunks)
        found = [microbatch.to(self.device, tokens=reads_tokens) for microbatch in found]
        self.pulse.finish()
        return found

    def _microbatch(self, values: Tensor, num_targets: int | None) -> Microbatch:
        """num_targets: of the global batch, so that an example with more of them counts no more in one layout than in another."""
        if num_targets is None:
            return Microbatch(tokens=values)
        return read_microbatch(values, num_targets / (self.config.num_microbatches * self.config.layout.dp))

    def _num_targets(self, batch: Batch) -> int:
        num_targets = _known_targets(batch)
        return self.config.tokens_per_step if num_targets is None else num_targets

    def accumulate(self, batch: Batch) -> Tensor:
        """Add the gradients of a global batch's mean loss; returns this rank's share of the facts, for `update`."""
        microbatches = self.microbatches(batch)
        self._mark()
        follow = iter if self.recorder is None else self.recorder.follow
        losses = self._run_passes(self.plan.actions, microbatches, follow=follow)
        self._mark()
        self.optimizer.finish_gradients()
        forward, backward = self.transport.take_sent()
        self._check_sent(forward, Kind.FORWARD)
        self._check_sent(backward, Kind.BACKWARD)
        if self.recorder is not None:
            self.recorder.count(forward, backward)
        share = self._share(losses, forward.num_bytes)
        self._mark()
        return share

    def train_step(
        self,
        batch: Batch,
        lr_factor: float,
        wants_stop: Callable[[], bool] = lambda: False,
        judge: Judge = require_finite,
    ) -> StepResult:
        """One update from a global batch. wants_stop: whether this rank was asked to stop, asked behind the passes. judge: of
        a step that it does not take no weight, moment or count of updates is changed.

        The host waits for the device once, where `update` reads loss, norm, bytes and stops together; under ZeRO 3 and
        with an offloaded optimiser DeepSpeed waits on its own account (`backends/deepspeed.py`).
        Raises: what `judge` does, on all ranks, before anything is updated.
        """
        return self.update(self.accumulate(batch), lr_factor, wants_stop, judge)

    def update(
        self,
        share: Tensor,
        lr_factor: float,
        wants_stop: Callable[[], bool] = lambda: False,
        judge: Judge = require_finite,
    ) -> StepResult:
        """The second half of `train_step`, behind `accumulate`, which gave `share`."""
        self.pulse.beat("update")
        norm = self.optimizer.take_norm()
        self._mark()
        if dist.get_rank() == 0:  # all have it
            share[_GRAD_NORM] = norm
        share[_STOPS] = float(wants_stop())
        result = self._add_up(share)
        self._mark()
        verdict = judge(result.loss, result.grad_norm)
        if verdict.action is Judged.TAKE:
            self.optimizer.update(norm, lr_factor)
        else:
            self.optimizer.drop_gradients()
        self._mark()
        return replace(result, verdict=verdict)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], stop: Callable[[], bool] = lambda: False) -> float | None:
        """Mean loss of the targets of global batches; None when `stop`, asked on all ranks before each batch, says so."""
        losses: list[float] = []
        self.stage.eval()
        for batch in batches:
            if stop():
                break
            losses.append(self._evaluate_batch(batch))
        self.stage.train()
        if len(losses) < len(batches):
            return None
        counts = [self._num_targets(batch) for batch in batches]
        return sum(map(operator.mul, losses, counts)) / max(1, sum(counts))

    def _evaluate_batch(self, batch: Batch) -> float:
        self.pulse.beat("evaluate")
        losses = self._run_passes(self.plan.evaluation, self.microbatches(batch))
        return self._add_up(self._share(losses, self.transport.take_sent()[0].num_bytes)).loss

    @torch.no_grad()
    def logits(self, batch: Batch) -> list[tuple[int, Tensor]]:
        """On the last stage, for each of this replica's microbatches its first row and logits [rows, seq, vocab] on the CPU."""
        microbatches, found = self.microbatches(batch), []
        outputs = self._run_passes(self.plan.evaluation, microbatches, with_loss=False)
        self.transport.take_sent()
        for index, residual in enumerate(outputs):
            block = self.groups.coordinate.dp_rank + index * self.groups.layout.dp
            rows, seq_length = microbatches[index].inputs.shape
            logits = self.stage.chunk(self.plan.chunks[-1].chunk).whole_logits(residual)[: rows * seq_length]
            found.append((block * rows, logits.float().cpu().unflatten(0, (rows, seq_length))))
        return found

    def _check_sent(self, sent: Sent, kind: Kind) -> None:
        messages, times = self.plan.sent(kind), self.run_plan.num_microbatches
        counted = Counter(message.cargo.value for message in messages)
        planned = Sent(
            times * sum(message.num_bytes for message in messages),
            Counter({cargo: times * number for cargo, number in counted.items()}),
        )
        if sent != planned:
            raise TrafficDiffers(f"stage {self.plan.stage_index} sent {sent} ({kind.name.lower()}), planned {planned}")

    def _share(self, losses: list[Tensor], forward_bytes: int) -> Tensor:
        """What this rank adds to the facts of a step: the loss is known on the last stage, bytes to their sender."""
        layout, place = self.groups.layout, self.groups.coordinate
        share = torch.zeros(_BYTES + layout.pp + layout.world_size, dtype=torch.float64, device=self.device)
        if self.plan.is_last_stage and place.tp_rank == 0:
            share[_LOSS] = torch.stack(losses).double().mean() / layout.dp
        share[_BYTES + self.plan.stage_index] = forward_bytes / (layout.tp * layout.dp)
        share[_BYTES + layout.pp + dist.get_rank()] = peak_bytes(self.device)
        return share

    def _add_up(self, share: Tensor) -> StepResult:
        """One all-reduce tells all shares to all, one copy to the host: the host waits for the device here."""
        dist.all_reduce(share)
        loss, grad_norm, stops, *counts = share.tolist()
        boundary_bytes = [round(count) for count in counts[: len(self.run_plan.boundary_bytes)]]
        peak = round(max(counts[self.groups.layout.pp :]))
        return StepResult(loss, grad_norm, boundary_bytes, peak, stop_asked=stops > 0)


def _known_targets(batch: Batch) -> int | None:
    return count_targets(batch) if isinstance(batch, Tensor) else batch.num_targets


def _pass(action: Action) -> Pass:
    return Pass(action.chunk, action.microbatch_index + 1)
