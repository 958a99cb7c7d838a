"""Edges are chosen once and then belong to the checkpoint; one rank decides where all go on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
import yaml
from common import TOLERANCE

import lime_dist.training.startup as startup
from lime_dist.checkpoint.edges import ready_plan, saved_config
from lime_dist.checkpoint.reader import CheckpointReader, find_latest
from lime_dist.cli.command_line import main
from lime_dist.config import Config, load_config
from lime_dist.data.indexed import IndexedWriter
from lime_dist.lifecycle.launcher import own_place
from lime_dist.lifecycle.local import free_port, run_local
from lime_dist.plan import run_plan
from lime_dist.plan.stages import ChunkPlan
from lime_dist.training import run

BASE = {
    "model": {"num_layers": 6, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "vocab_size": 96},
    "parallel": {"pp": 3},
    "pipeline": {"num_microbatches": 2},
    "optim": {"lr": 0.02, "router_lr": 0.3, "warmup_steps": 0, "lr_schedule": "constant"},
    "data": {"train": "train", "valid": "valid", "seq_length": 8, "global_batch_size": 4},
    "eval": {"batches": 2},
    "checkpoint": {"keep": 20},
    "run": {"steps": 10, "device": "cpu", "timeout_seconds": 60},
}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edges")
    generator = np.random.default_rng(5)
    for name in ("train", "valid"):
        with IndexedWriter(folder / name, vocab_size=96) as writer:
            tokens = np.minimum(generator.zipf(1.3, 2000), 95)
            writer.add_document(tokens)
            writer.commit({"vocab_size": 96, "tokens": len(tokens)})
    (folder / "run.yaml").write_text(yaml.safe_dump(BASE))
    os.chdir(folder)
    return folder


def train(run_dir: Path, *overrides: str) -> int:
    return main(["train", "run.yaml", f"run.dir={run_dir}", *overrides])


def losses(run_dir: Path) -> list[float]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def num_edges(run_dir: Path) -> int:
    return saved_config(CheckpointReader(find_latest(run_dir / "checkpoints"))).pattern.num_edges


def restarted_each_two_steps(run_dir: Path, *overrides: str) -> list[int]:
    """The edges after each of four starts."""
    edges = []
    for steps in (4, 6, 8, 10):
        assert train(run_dir, *overrides, f"run.steps={steps}") == 0
        edges.append(num_edges(run_dir))
    return edges


@pytest.mark.parametrize("pattern", ["top_p:0.7", "budget:4KiB", "within_stage+first:1"])
def test_a_switch_chooses_once(pattern: str, tmp_path: Path) -> None:
    switch = f"depth.switch_at={{2: {pattern}}}"
    assert train(tmp_path / "whole", switch) == 0
    edges = restarted_each_two_steps(tmp_path / "parts", switch)
    assert edges == [num_edges(tmp_path / "whole")] * 4 and 0 < edges[0] < 15
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_two_switches_and_a_config_that_a_job_has_resolved(tmp_path: Path) -> None:
    switch = "depth.switch_at={2: top_p:0.8, 6: top_p:0.5}"
    assert train(tmp_path / "whole", switch) == 0
    assert train(tmp_path / "parts", "depth.switch_at={2: top_p:0.8}", "run.steps=4") == 0
    assert train(tmp_path / "parts", switch, "run.steps=8") == 0
    resolved = str(tmp_path / "parts" / "config.yaml")
    assert main(["train", resolved, "run.steps=10"]) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize("pattern", ["within_stage", "budget:4KiB"])
def test_what_the_stages_chose_stays_on_other_stages(pattern: str, tmp_path: Path) -> None:
    assert train(tmp_path / "whole", f"depth.pattern={pattern}") == 0
    assert train(tmp_path / "parts", f"depth.pattern={pattern}", "run.steps=4") == 0
    edges = num_edges(tmp_path / "parts")
    assert train(tmp_path / "parts", f"depth.pattern={pattern}", "parallel.pp=2", "run.steps=7") == 0
    assert train(tmp_path / "parts", f"depth.pattern={pattern}", "parallel.pp=6") == 0
    assert num_edges(tmp_path / "parts") == edges == num_edges(tmp_path / "whole") and 0 < edges < 15
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=TOLERANCE)


def test_edges_are_lost_only_when_asked_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path, "run.steps=4") == 0
    assert train(tmp_path, "depth.pattern=first:1") == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("lime-dist: depth.pattern: first:1 lacks 6 of the 15 edges of checkpoint ")
    assert line.endswith("set depth.pattern=full, or depth.switch_at={4: first:1} to drop them")
    assert train(tmp_path, "depth.switch_at={3: first:1}") == 2, "a switch before the checkpoint asks for nothing at it"
    assert train(tmp_path, "depth.switch_at={4: first:1}") == 0
    assert num_edges(tmp_path) == 9
    assert train(tmp_path, "depth.switch_at={4: first:1}", "run.steps=12") == 0, "what was dropped is not missed"


def test_eval_measures_the_model_that_was_trained(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    switch = "depth.switch_at={2: top_p:0.7}"
    assert train(tmp_path, switch) == 0
    records = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    trained = [record["eval_loss"] for record in records if record.get("eval_loss") and record["step"] == 10]
    for overrides in ([switch], [], ["depth.pattern=first:1"], ["parallel.pp=2"]):
        capfd.readouterr()
        assert main(["eval", "run.yaml", f"run.dir={tmp_path}", *overrides]) == 0
        assert [json.loads(capfd.readouterr().out)["eval_loss"]] == pytest.approx(trained, rel=TOLERANCE)


def test_each_switch_chooses_among_the_edges_that_are_left(tmp_path: Path) -> None:
    """Also where two have the same text."""
    assert train(tmp_path / "one", "depth.switch_at={2: top_p:0.7}") == 0
    assert train(tmp_path / "two", "depth.switch_at={2: top_p:0.7, 6: top_p:0.7}") == 0
    assert train(tmp_path / "parts", "depth.switch_at={2: top_p:0.7, 6: top_p:0.7}", "run.steps=7") == 0
    assert train(tmp_path / "parts", "depth.switch_at={2: top_p:0.7, 6: top_p:0.7}") == 0
    assert 0 < num_edges(tmp_path / "two") < num_edges(tmp_path / "one")
    assert losses(tmp_path / "parts") == losses(tmp_path / "two")


def evaluations(run_dir: Path) -> dict[int, float]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}


def test_an_evaluation_left_at_a_switch_measures_the_model_before_it(tmp_path: Path) -> None:
    often = ("depth.switch_at={4: first:1}", "eval.every=4", "checkpoint.every=4")
    assert train(tmp_path / "whole", *often, "run.steps=8") == 0
    assert train(tmp_path / "parts", *often, "run.steps=5") == 0
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step_000005")
    metrics = tmp_path / "parts" / "metrics.jsonl"  # as a stop in the midst of the evaluation leaves it
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if not ("eval_loss" in line and json.loads(line)["step"] == 4)))
    assert 4 not in evaluations(tmp_path / "parts")
    assert train(tmp_path / "parts", *often, "run.steps=8") == 0
    assert evaluations(tmp_path / "parts") == evaluations(tmp_path / "whole")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


# ---- one rank decides


@pytest.mark.slow
@pytest.mark.parametrize("every", [2, 0])
def test_a_disk_that_lags_does_not_split_the_ranks(every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 sees the newest checkpoint late: at first it finds the one before, or none."""
    assert train(tmp_path / "whole") == 0
    assert train(tmp_path / "parts", "run.steps=4", f"checkpoint.every={every}") == 0
    newest = tmp_path / "parts" / "checkpoints" / "step_000004"
    is_file = Path.is_file
    shown_at = time.time() + 8

    def lagging(path: Path) -> bool:
        is_hidden = path.parent == newest and dist.is_initialized() and dist.get_rank() == 1
        return is_file(path) and not (is_hidden and time.time() < shown_at)

    monkeypatch.setattr(Path, "is_file", lagging)
    assert train(tmp_path / "parts") == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_host_that_never_sees_the_checkpoint_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "run.steps=2") == 0
    is_file = Path.is_file
    monkeypatch.setattr(
        Path,
        "is_file",
        lambda path: (
            is_file(path) and not (path.name == "meta.json" and dist.is_initialized() and dist.get_rank() == 2)
        ),
    )
    monkeypatch.setattr(startup, "VISIBLE_SECONDS", 0.5)
    monkeypatch.setattr(startup, "host_name", lambda: f"node-{dist.get_rank()}")
    assert train(tmp_path) == 2
    assert "host node-2 does not see it after" in capfd.readouterr().err.splitlines()[-1]


def other_seed(config: object) -> dict:
    return facts_of(config) | ({"run.steps": 99} if dist.get_rank() == 2 else {})


def other_code(config: object) -> dict:
    return facts_of(config) | ({"lime_dist": "0.1 another"} if dist.get_rank() == 1 else {})


facts_of = startup._facts


@pytest.mark.parametrize(
    ("facts", "said"),
    [(other_seed, "run.steps: 10 on rank 0 (.*), 99 on rank 2 "), (other_code, "lime_dist: .* 0.1 another on rank 1 ")],
)
def test_ranks_that_were_started_differently_are_refused(
    facts: Callable[..., dict], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(startup, "_facts", facts)
    assert train(tmp_path) == 2
    assert re.match(f"lime-dist: {said}", capfd.readouterr().err.splitlines()[-1])


def test_token_files_that_differ_are_refused(tmp_path: Path, folder: Path) -> None:
    before = startup._token_file(str(folder / "train"))
    for suffix in ("bin", "idx", "meta.json"):
        shutil.copy(folder / f"train.{suffix}", tmp_path / f"train.{suffix}")
    assert startup._token_file(str(tmp_path / "train")) == before
    meta = tmp_path / "train.meta.json"
    meta.write_text(meta.read_text().replace("2000", "2001"))
    assert startup._token_file(str(tmp_path / "train")) != before


def start_rank(rank: int, world_size: int, port: int, command: str, *overrides: str) -> subprocess.Popen[str]:
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "lime_dist.cli", command, "run.yaml", *overrides],
        env={**os.environ, **{name: str(value) for name, value in place.items()}, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("command", "others", "said"),
    [
        ("train", ("parallel.pp=1", "parallel.tp=2"), "parallel.tp: 1 on rank 0 (.*), 2 on rank 1 "),
        ("eval", ("parallel.pp=2", "data.valid=[valid, train]"), "data.valid: .* on rank 0 .* on rank 1 "),
    ],
)
def test_ranks_of_other_layouts_or_files_are_refused_before_they_wait_for_each_other(
    command: str, others: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    if command == "eval":
        assert train(tmp_path, "parallel.pp=2", "run.steps=1") == 0
    port = free_port()
    ranks = [
        start_rank(rank, 2, port, command, f"run.dir={tmp_path}", *overrides)
        for rank, overrides in enumerate((("parallel.pp=2",), others))
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], errors
    assert all(re.search(f"^lime-dist: {said}", error, re.MULTILINE) for error in errors), errors


# ---- the plan


def times_planned(config: Config) -> int:
    """By a rank that trains to its end."""
    plan_chunks, times = run_plan.plan_chunks, 0

    def count(*args: Any) -> tuple[ChunkPlan, ...]:
        nonlocal times
        times += 1
        return plan_chunks(*args)

    run_plan.plan_chunks = count
    assert run.train(ready_plan(config, 3), own_place()) == 0
    run_plan.plan_chunks = plan_chunks
    return times


def test_a_launched_rank_plans_once(tmp_path: Path) -> None:
    """It reads the config itself. The second start resumes."""
    for steps in (2, 4):
        config = load_config(Path("run.yaml"), [f"run.dir={tmp_path}", f"run.steps={steps}"])
        assert run_local(times_planned, 3, config) == [1, 1, 1]


def test_a_launched_rank_plans_again_for_other_edges(tmp_path: Path) -> None:
    """A pattern to switch to is planned to be checked at the start, and when its turn comes."""
    config = load_config(Path("run.yaml"), [f"run.dir={tmp_path}", "run.steps=3", "depth.switch_at={2: first:2}"])
    assert run_local(times_planned, 3, config) == [3, 3, 3]
