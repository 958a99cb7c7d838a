"""What a step leaves and tells, and what happens when a rank fails, dies, stalls or breaks the plan."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from common import (
    OF_WEIGHTS,
    TOLERANCE,
    assert_close,
    make_batches,
    make_config,
    make_plain,
    run_layout,
    run_plain,
    weight_of,
)
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from torch import Tensor

from lime_dist.lifecycle.local import RankFailed
from lime_dist.lime.model import model_logits, model_loss
from lime_dist.lime.values import gather_logical
from lime_dist.pipeline.executor import _Passes
from lime_dist.plan.run_plan import plan_run
from lime_dist.plan.table import plan_report
from lime_dist.testing import Pieces, assemble, local_pieces, run_ranks
from lime_dist.training.peak_memory import peak_bytes
from lime_dist.training.rank import Rank, TrafficDiffers

# ---- gradients through stages that do not read what they pass on


PASSED_ON = (
    "pp=4 pattern={3:[0]} micro=3 relay",  # stages 1 and 2 have entry 0 and neither router nor entry of their own
    "pp=4 layers=7 split=[2,1,2,2] pattern={3:[0],4:[1],5:[2],6:[3]} micro=4 tp=2 sp relay",
    "pp=4 layers=7 split=[2,1,2,2] pattern={3:[0],5:[0,1,2],6:[0,1,3]} micro=4 tp=2",
    "pp=3 layers=6 split=[1,4,1] pattern={5:[0]} micro=2 recompute gpipe relay",
    "pp=4 layers=8 pattern={6:[0,1,2],7:[0,1,4]} micro=3 gpipe recompute",  # a sum passes a stage that adds nothing
)


@pytest.mark.parametrize("text", PASSED_ON)
def test_stages_that_only_pass_on_return_the_gradients(text: str) -> None:
    config = make_config(text)
    expected, (actual, _) = run_plain(config), run_layout(config)
    assert actual.losses == pytest.approx(expected.losses, rel=TOLERANCE)
    assert_close(actual.gradients, expected.gradients, TOLERANCE)
    assert_close(actual.weights, expected.weights, OF_WEIGHTS * TOLERANCE)


# ---- the device


@pytest.mark.parametrize("text", ["pp=3", "dp=2 zero=3"])
def test_a_run_on_the_cpu_leaves_this_machines_gpus_alone(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed believes in a GPU, as on a machine that has one; here it would fail at the first use."""
    monkeypatch.setattr(real_accelerator, "ds_accelerator", CUDA_Accelerator())
    config = make_config(text)
    assert_close(run_layout(config)[0].weights, run_plain(config).weights, OF_WEIGHTS * TOLERANCE)


# ---- parameters


@pytest.mark.parametrize(
    "text", ["pp=3", "pp=3 untied vocab=300", "pp=2 v=2 micro=2", "pp=3 tp=2 vocab=300 split=[1,2,1]"]
)
def test_the_stage_table_counts_the_parameters_that_ranks_hold(text: str) -> None:
    """The last stage's copy of a tied embedding too, which the model's own number leaves out."""
    config = make_config(text)
    report = plan_report(plan_run(config))
    held = run_ranks(config, held_parameters)
    assert held[:: config.layout.tp] == [stage["parameters_per_tp_rank"] for stage in report["stages"]]
    assert report["total_parameters"] == sum(parameter.numel() for parameter in make_plain(config).parameters())


def held_parameters(rank: Rank) -> int:
    """But for the one element that stands in for a router where a stage has none."""
    return sum(parameter.numel() for name, parameter in rank.stage.named_parameters() if name != "no_router")


# ---- memory


def test_every_rank_knows_the_largest_peak() -> None:
    """Here that of stage 1 of three, which has taken 200 MiB and given them back."""
    found = run_ranks(make_config("pp=3 micro=3"), peak_after_a_step)
    own, told = zip(*found)
    assert len(set(told)) == 1 and own[1] <= told[0] < 1.1 * own[1]
    assert min(own[0], own[2]) < own[1] - 100 * 2**20


def peak_after_a_step(rank: Rank) -> tuple[int, int]:
    """This rank's own, and what the step says."""
    if rank.plan.stage_index == 1:
        torch.ones(50 * 2**20)
    own = peak_bytes(rank.device)
    return own, rank.train_step(make_batches(rank.config)[0], 1.0).peak_bytes


# ---- initial weights


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tp=4 sp untied vocab=300",
        "pp=3 tp=2 split=[1,2,1]",
        "dp=2 zero=3 heads=4 kv=2",
        "pp=2 dp=2 llama",
        "pp=2 bf16",
    ],
)
def test_initial_weights_are_the_same_under_every_layout(text: str) -> None:
    config = make_config(text)
    whole = assemble(run_ranks(config, initial_weights))
    dtype = torch.bfloat16 if config.run.dtype == "bf16" else torch.float32
    for name, value in gather_logical(make_plain(config), lambda parameter: parameter).items():
        assert torch.equal(whole.pop(name), value.to(dtype).float()), name
    assert not whole


def initial_weights(rank: Rank) -> Pieces:
    return local_pieces(rank, weight_of(rank))


# ---- evaluation


EVALUATED = (
    "pp=3 tp=2 micro=3 split=[1,2,1]",
    "pp=2 dp=2 micro=2",
    "dp=2 tp=2 sp zero=2 seq=5",
    "dp=2 zero=3 micro=3",
    "pp=4 gpipe micro=6",
    "pp=2 v=2 layers=6 micro=3",
    "pp=3 v=2 layers=6 micro=4 relay gpipe",
)


@pytest.mark.parametrize("text", EVALUATED)
def test_evaluation_is_the_plain_loss_on_every_rank_and_changes_nothing(text: str) -> None:
    config = make_config(text)
    batches = make_batches(config)
    with torch.no_grad():
        model = make_plain(config)
        mean_loss = sum(float(model_loss(model, batch)) for batch in batches) / len(batches)
    alone = run_ranks(config, train_losses, batches, False)
    between = run_ranks(config, train_losses, batches, True)
    for (losses, _, _), (same_losses, evaluated, left) in zip(alone, between, strict=True):
        assert evaluated == pytest.approx(mean_loss, rel=TOLERANCE)
        assert evaluated == between[0][1]
        assert left == []
        assert losses == same_losses


def train_losses(rank: Rank, batches: list[Tensor], with_evaluation: bool) -> tuple[list[float], float, list[str]]:
    """Losses of steps, the loss over all batches before them, and what that left: gradients, memories of microbatches."""
    made, begin = [], _Passes.__init__

    def begin_and_note(passes: _Passes, *args: Any) -> None:
        begin(passes, *args)
        made.append(passes)

    _Passes.__init__ = begin_and_note
    evaluated = rank.evaluate(batches) if with_evaluation else 0.0
    _Passes.__init__ = begin
    assert bool(made) == with_evaluation
    left = [name for name, parameter in rank.stage.named_parameters() if parameter.grad is not None]
    left += [f"chunk, microbatch {place}" for passes in made for place in passes._memories]
    left += [] if rank.stage.training else ["evaluation mode"]
    return [rank.train_step(batch, 1.0).loss for batch in batches], evaluated, left


@pytest.mark.parametrize("text", ["pp=3 tp=2 micro=3", "dp=2 tp=4 seq=5 batch=6 micro=3 sp vocab=300"])
def test_logits_are_those_of_the_plain_model(text: str) -> None:
    config = make_config(text)
    batch = make_batches(config)[0]
    with torch.no_grad():
        expected = model_logits(make_plain(config), batch[:, :-1])
    found = {row: logits for logits_of_rank in run_ranks(config, Rank.logits, batch) for row, logits in logits_of_rank}
    actual = torch.cat([found[row] for row in sorted(found)])
    assert_close({"logits": actual}, {"logits": expected}, TOLERANCE)


# ---- ranks that fail


LONG = 300.0  # seconds: far beyond what a failure may take
PROMPT = 20.0  # seconds, on a machine busy with other work; a second or two on an idle one


@contextmanager
def fails_promptly(match: str) -> Iterator[pytest.ExceptionInfo[RankFailed]]:
    """A rank fails, and the job with it, within `PROMPT`: a hang would last for `LONG`."""
    start = time.monotonic()
    with pytest.raises(RankFailed, match=match) as failure:
        yield failure
    assert time.monotonic() - start < PROMPT


FAILING = ("pp=3 micro=4", "pp=2 tp=2 micro=2", "tp=2 micro=2", "dp=3 micro=2")


@pytest.mark.parametrize("text", FAILING)
def test_a_rank_that_raises_is_named_and_ends_the_job(text: str) -> None:
    config = make_config(text, timeout_seconds=LONG)
    with fails_promptly("failed: ValueError: injected") as failure:
        run_ranks(config, misbehave, make_batches(config)[0], "raise")
    assert failure.value.rank == 1 and "misbehave" in failure.value.detail


@pytest.mark.parametrize("text", FAILING)
def test_a_killed_rank_is_named_and_ends_the_job(text: str) -> None:
    config = make_config(text, timeout_seconds=LONG)
    with fails_promptly("failed: killed by SIGKILL") as failure:
        run_ranks(config, misbehave, make_batches(config)[0], "kill")
    assert failure.value.rank == 1


@pytest.mark.parametrize("text", FAILING)
def test_a_stalled_rank_makes_the_others_give_up_after_the_timeout(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process groups' own timeouts: what runs without a folder has no watchdog to wait for."""
    monkeypatch.setattr("lime_dist.training.world.WATCHDOG_MARGIN", timedelta(0))  # ranks are forked, so they have it
    config = make_config(text, timeout_seconds=3)
    with fails_promptly(r"(?i)timed? ?out") as failure:
        run_ranks(config, misbehave, make_batches(config)[0], "stall")
    assert failure.value.rank != 1


def misbehave(rank: Rank, batch: Tensor, how: str) -> None:
    """A good step, then rank 1 goes wrong and the others begin another."""
    rank.train_step(batch, 1.0)
    if dist.get_rank() == 1:
        if how == "raise":
            raise ValueError("injected")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(LONG)
    rank.train_step(batch, 1.0)


# ---- plan and transport


def test_bytes_other_than_planned_are_an_error() -> None:
    config = make_config("pp=3 micro=2")
    for found in run_ranks(config, step_against_another_plan, make_batches(config)[0]):
        assert "stage" in found and "planned" in found


def step_against_another_plan(rank: Rank, batch: Tensor) -> str:
    """The check's plan has messages that are one byte longer than what the stages send."""
    (chunk,) = rank.plan.chunks
    longer = {
        kind: tuple(replace(message, num_bytes=message.num_bytes + 1) for message in messages)
        for kind, messages in chunk.sent.items()
    }
    rank.plan = replace(rank.plan, chunks=(replace(chunk, sent=longer),))
    with pytest.raises(TrafficDiffers) as error:
        rank.train_step(batch, 1.0)
    return str(error.value)
