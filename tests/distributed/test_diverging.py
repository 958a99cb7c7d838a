"""What is not finite is refused before the update and is never saved, whatever the ZeRO stage."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch
from common import make_batches, make_config
from torch import Tensor

from lime_dist.backends.zero_state import get_state
from lime_dist.checkpoint.checking import read_meta
from lime_dist.checkpoint.reader import UNFINISHED, find_checkpoints
from lime_dist.checkpoint.saving import Progress, Saver
from lime_dist.errors import CheckpointError, TrainingDiverged
from lime_dist.lime.values import specified_parameters
from lime_dist.plan.tensors import KINDS
from lime_dist.testing import run_ranks
from lime_dist.training.metrics import DeadGradients, Metrics
from lime_dist.training.rank import Rank

LAYOUTS = ("pp=3 zero=0", "pp=3 zero=1", "pp=3 zero=0 bf16", "pp=3 zero=1 bf16 dp=2", "dp=2 zero=2", "dp=2 zero=3 bf16")


def state_of(rank: Rank) -> list[Tensor]:
    return [
        get_state(rank.optimizer, parameter, kind).clone()
        for _, parameter in specified_parameters(rank.stage)
        for kind in KINDS
    ]


def step_with_a_bad_gradient(rank: Rank, batches: list[Tensor], value: float) -> tuple[str, bool]:
    """One good step, then one in which a single element of rank 1's gradients is `value`."""
    rank.train_step(batches[0], 1.0)
    before = state_of(rank)
    if torch.distributed.get_rank() == 1 or rank.groups.layout.world_size == 1:
        _, parameter = next(iter(specified_parameters(rank.stage)))
        parameter.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([0]), value))
    try:
        rank.train_step(batches[1], 1.0)
        message = "taken"
    except TrainingDiverged as error:
        message = str(error)
    return message, all(torch.equal(old, new) for old, new in zip(before, state_of(rank), strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("text", LAYOUTS)
def test_a_gradient_that_is_not_finite_changes_nothing(text: str, value: float) -> None:
    config = make_config(f"{text} micro=2 unclipped")
    for message, unchanged in run_ranks(config, step_with_a_bad_gradient, make_batches(config), value):
        assert message == "the gradient norm is not finite" and unchanged


def save_poisoned(rank: Rank, folder: Path) -> str:
    Saver(folder).save(rank, Progress(step=1, samples_seen=1))
    if rank.plan.is_last_stage:
        with torch.no_grad():
            rank.stage.chunk(rank.plan.chunks[-1].chunk).norm.weight[0] = math.inf
    try:
        Saver(folder).save(rank, Progress(step=2, samples_seen=2))
        return "saved"
    except TrainingDiverged as error:
        return str(error)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    config = make_config("pp=3 zero=0", "checkpoint.keep=1")
    assert run_ranks(config, save_poisoned, tmp_path) == ["weight:norm.weight is not finite"] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"], "the good one stays, nothing else does"


def save_to_a_full_disk(rank: Rank, folder: Path) -> str:
    import resource
    import signal

    Saver(folder).save(rank, Progress(step=1, samples_seen=1))
    if rank.plan.is_last_stage:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    try:
        Saver(folder).save(rank, Progress(step=2, samples_seen=2))
        return "saved"
    except CheckpointError as error:
        return str(error)


def test_a_full_disk_is_told_on_one_line_by_all_ranks(tmp_path: Path) -> None:
    for message in run_ranks(make_config("pp=3", "checkpoint.keep=1"), save_to_a_full_disk, tmp_path):
        assert message.startswith(f"checkpoint {tmp_path}: File too large; free space")
        assert message.endswith("(the last whole checkpoint is step_000001)")
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def save_again_where_names_cannot_change(rank: Rank, folder: Path) -> str:
    Saver(folder).save(rank, Progress(step=1, samples_seen=1))
    rename = os.rename

    def refuse_new_ones(source: Path, target: Path) -> None:
        if source.name.startswith(UNFINISHED):
            raise OSError(errno.ENOSPC, "")
        rename(source, target)

    os.rename = refuse_new_ones
    try:
        Saver(folder).save(rank, Progress(step=1, samples_seen=2))
        return "saved"
    except CheckpointError as error:
        return str(error)


def test_one_that_cannot_be_replaced_stays(tmp_path: Path) -> None:
    for message in run_ranks(make_config("pp=3"), save_again_where_names_cannot_change, tmp_path):
        assert message.startswith(f"checkpoint {tmp_path}: No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]
    assert read_meta(tmp_path / "step_000001").samples_seen == 1


def save_twice(rank: Rank, folder: Path) -> None:
    for step in (1, 2):
        Saver(folder).save(rank, Progress(step=step, samples_seen=step))


def test_what_is_not_ours_neither_stops_a_save_nor_goes(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / ".unfinished-x").symlink_to(elsewhere)
    (checkpoints / ".unfinished-step_000002").symlink_to(elsewhere)
    (checkpoints / ".unfinished-y").write_text("a note")
    (checkpoints / ".unfinished-step_000009").mkdir()
    run_ranks(make_config("pp=3"), save_twice, checkpoints)
    assert [path.name for path in find_checkpoints(checkpoints)] == ["step_000001", "step_000002"]
    left = {path.name for path in checkpoints.iterdir()}
    assert left == {"step_000001", "step_000002", ".unfinished-x", ".unfinished-y"}
    assert (elsewhere / "kept").exists()


def test_metrics_stay_json_and_a_dead_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = Metrics(tmp_path, first_step=0, num_steps=9, log_every=1)
    for step in range(1, 8):
        norm = 0.0 if step > 1 else 1.0
        metrics.step(
            step=step, loss=1.0, grad_norm=norm, lr=1, tokens=1, tokens_seen=step, model_flops=1, step_seconds=1, boundary_bytes=[]
        )  # fmt: skip
    metrics.evaluation(step=7, eval_loss=math.nan, eval_seconds=1.0)
    metrics.close()

    def refuse(text: str) -> None:
        raise ValueError(text)

    records = [
        json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert records[-1].items() >= {"step": 7, "eval_loss": None, "eval_seconds": 1.0}.items()
    errors = capsys.readouterr().err
    assert errors.count("warning: step 6: the gradient norm has been 0 for 5 steps") == 1 == errors.count("warning")


def test_a_model_that_moves_again_is_counted_anew() -> None:
    dead = DeadGradients()
    norms = [0.0] * 4 + [1.0] + [0.0] * 6
    assert [bool(dead.warning(step, norm)) for step, norm in enumerate(norms)].index(True) == 9


# ---- replicas in bf16


# A sum of three that rounds to bf16 errs by 2**-9 of a gradient, so by 4e-5 in an update of 0.02; in fp32 by 1e-9, and the
# weights themselves, up to 1, round to 6e-8.
UPDATE_TOLERANCE = 5e-7


def masters_after_a_step(rank: Rank, row: Tensor) -> list[Tensor]:
    rank.train_step(row.repeat(rank.groups.layout.dp, 1), 1.0)
    return [get_state(rank.optimizer, parameter, "weight").clone() for _, parameter in specified_parameters(rank.stage)]


@pytest.mark.parametrize("text", ["pp=3 zero=0", "pp=3 zero=1", "zero=2", "zero=3"])
def test_equal_replicas_average_to_one_of_them(text: str) -> None:
    """Three equal gradients add up to three times one exactly in fp32, and not when the sum rounds to bf16."""
    row = make_batches(make_config())[0][:1]
    one, three = (
        run_ranks(make_config(f"{text} bf16 dp={dp} batch={dp} unclipped"), masters_after_a_step, row) for dp in (1, 3)
    )
    for stage, masters in enumerate(one):
        for alone, averaged in zip(masters, three[3 * stage], strict=True):
            assert torch.allclose(alone, averaged, rtol=0, atol=UPDATE_TOLERANCE)


def both_ends_of_the_embedding(rank: Rank, batch: Tensor) -> tuple[Tensor, Tensor]:
    """This end's gradient before the ends are added, and after."""
    chunk, optimizer = rank.stage.chunk(rank.plan.chunks[0].chunk), rank.optimizer
    weight = (chunk.embed_tokens if chunk.is_first else chunk.lm_head).weight
    before: list[Tensor] = []
    finish = optimizer.finish_gradients

    def finish_and_note() -> None:
        before.append(optimizer._local_gradient(weight).float().clone())
        finish()

    optimizer.finish_gradients = finish_and_note
    rank.accumulate(batch)
    return before[0], optimizer.gradient(weight)


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_the_ends_of_a_tied_embedding_add_up_in_fp32(zero_stage: int) -> None:
    """Bit for bit; most sums of two numbers of eight bits have more."""
    config = make_config(f"pp=2 zero={zero_stage} bf16")
    (first, summed), (last, same) = run_ranks(config, both_ends_of_the_embedding, make_batches(config)[0])
    assert torch.equal(summed, first + last) and torch.equal(same, summed)
    assert not torch.equal(summed, summed.bfloat16().float()), "no sum that bf16 cannot hold: shows nothing"
