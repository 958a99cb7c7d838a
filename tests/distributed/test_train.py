"""Whole runs through the command line: resumed equals uninterrupted, under this layout or another; what a run
leaves behind; a rank or a save that is killed.

The words of a layout are those of `common.SHORT`; what is missing has the default of `BASE`: one rank, ZeRO 1, fp32.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from common import overrides, write_short_documents
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lime_dist.checkpoint import writing
from lime_dist.checkpoint.edges import ready_plan
from lime_dist.checkpoint.reader import CheckpointReader, find_latest, read_meta
from lime_dist.cli.command_line import main
from lime_dist.config import load_config
from lime_dist.config.paths import with_absolute_paths
from lime_dist.lifecycle.ending import DONE, FAILED, NEVER_RESTART, OUTCOME_VARIABLE, REQUEUE, read_outcome
from lime_dist.lifecycle.ownership import Ownership
from lime_dist.lifecycle.stopping import REPEAT_WINDOW_SECONDS, STOP_SIGNALS
from lime_dist.plan.parameters import logical_tensors
from lime_dist.plan.run_plan import plan_run
from lime_dist.plan.table import plan_report

# eps lies above most gradients and rates are large, so that weights, moments and losses move visibly (see `common.BASE`).
BASE = {
    "model": {
        "num_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 96,
    },
    "pipeline": {"num_microbatches": 3},
    "optim": {"lr": 0.05, "router_lr": 0.1, "eps": 1e-3, "max_grad_norm": 0.5, "warmup_steps": 2},
    "data": {"train": "train", "valid": "valid", "seq_length": 12, "global_batch_size": 12},
    "eval": {"every": 3, "batches": 2},
    "checkpoint": {"every": 3, "keep": 9},
    "run": {"dir": "run", "device": "cpu", "steps": 5, "timeout_seconds": 60},
}  # fmt: skip
STEP_KEYS = {
    "step", "loss", "grad_norm", "lr", "router_lr", "tokens_per_second", "tokens_seen", "model_flops", "step_seconds",
    "boundary_bytes", "peak_resident_bytes", "time",
}  # fmt: skip
MOMENTS = ("exp_avg", "exp_avg_sq")
# fp32: layouts differ in the order of sums, which a few updates enlarge: on some CPUs to 1.04e-5 of a moment. A batch, moment or
# rate that is lost shows at 1e-3.
TOLERANCE = 3e-5

LAYOUTS = (
    "pp=3 zero=0 dp=2",
    "pp=3 zero=0 tp=2",
    "pp=3 zero=1",
    "pp=3 zero=1 tp=2 relay",
    "pp=3 zero=1 dp=2",
    "dp=2 zero=2",
    "dp=2 zero=3",
    "pp=3 zero=1 bf16",
    "pp=2 v=2 zero=1",
)
FP32 = tuple(layout for layout in LAYOUTS if "bf16" not in layout)
OTHER_LAYOUTS = (  # with the data and the schedule of a run; more in test_layout_moves.py
    ("pp=3 zero=1 tp=2 relay", "dp=2 zero=3"),
    ("dp=2 zero=3", "pp=2 tp=2 zero=1"),
    ("dp=2 zero=2", "zero=0"),
    ("pp=2 v=2 zero=1", "pp=3 zero=0 warmup=auto"),
)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of all runs: token files and the config."""
    folder = tmp_path_factory.mktemp("runs")
    write_short_documents(folder)
    (folder / "run.yaml").write_text(yaml.safe_dump(BASE))
    os.chdir(folder)
    return folder


def train(run_dir: Path, layout: str = "", *more: str) -> int:
    return main(["train", "run.yaml", *overrides(layout), f"run.dir={run_dir}", *more])


@pytest.fixture(scope="module")
def whole(folder: Path) -> Callable[[str], Path]:
    """The uninterrupted run of a layout, made once."""

    def run_of(layout: str) -> Path:
        run_dir = folder / "whole" / layout.replace(" ", "_")
        if not (run_dir / "checkpoints" / "step_000005").exists():
            assert train(run_dir, layout) == 0
        return run_dir

    return run_of


def stopped_at_3(run_dir: Path, copy: Path) -> Path:
    """A copy as if the run had been killed between its checkpoint at step 3 and its next one."""
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "checkpoints" / "step_000005")
    return copy


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def steps(run_dir: Path) -> list[dict]:
    return [line for line in lines(run_dir) if "loss" in line]


def evaluations(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line["eval_loss"] for line in lines(run_dir) if "eval_loss" in line}


def saved_bytes(run_dir: Path, step: int) -> dict[str, dict[str, bytes]]:
    checkpoint = run_dir / "checkpoints" / f"step_{step:06d}"
    files = {path.name: load_file(path) for path in checkpoint.glob("*.safetensors")}
    return {name: {key: array.tobytes() for key, array in arrays.items()} for name, arrays in files.items()}


def saved_arrays(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    """Weights and moments as logical tensors, whatever layout wrote them."""
    reader, config = (
        CheckpointReader(run_dir / "checkpoints" / f"step_{step:06d}"),
        load_config(run_dir / "config.yaml"),
    )
    tensors = logical_tensors(config.model, config.pattern).values()
    return {f"{kind}:{tensor.name}": reader.array(kind, tensor) for kind in ("weight", *MOMENTS) for tensor in tensors}


# ---- resuming


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_equals_uninterrupted(layout: str, whole: Callable[[str], Path], tmp_path: Path) -> None:
    run_dir = whole(layout)
    resumed = stopped_at_3(run_dir, tmp_path / "run")
    assert train(resumed, layout) == 0

    expected, actual = steps(run_dir), steps(resumed)
    assert actual[:3] == expected[:3], "the steps before the checkpoint were run again"  # these have their own seconds
    assert [line["step_seconds"] for line in actual[3:]] != [line["step_seconds"] for line in expected[3:]]
    for key in ("step", "loss", "grad_norm", "lr"):
        assert [line[key] for line in actual] == [line[key] for line in expected]
    assert evaluations(resumed) == evaluations(run_dir)
    assert saved_bytes(resumed, 5) == saved_bytes(run_dir, 5)


@pytest.mark.parametrize(("written", "read"), OTHER_LAYOUTS, ids=lambda layout: layout)
def test_checkpoint_loads_under_another_layout(
    written: str, read: str, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    run_dir = whole(written)
    resumed = stopped_at_3(run_dir, tmp_path / "run")
    assert train(resumed, read) == 0

    expected, actual = steps(run_dir), steps(resumed)
    assert [line["step"] for line in actual] == [1, 2, 3, 4, 5]
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in actual] == pytest.approx([line[key] for line in expected], rel=TOLERANCE)
    before, after = saved_arrays(run_dir, 5), saved_arrays(resumed, 5)
    for name, values in before.items():
        assert np.abs(after[name] - values).max() < TOLERANCE * np.abs(values).max(), name


@pytest.mark.parametrize(("written", "read"), [("pp=3 zero=1 tp=2 relay", "dp=2 zero=3"), ("zero=0", "pp=3 zero=1")])
def test_a_run_begins_with_the_weights_of_another(
    written: str, read: str, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    """Whose optimiser is not taken: the first update of the warm-up has rate 0, and leaves one gradient in its moments."""
    source, run_dir = whole(written), tmp_path / "run"
    assert train(run_dir, read, f"checkpoint.weights_from={source}", "run.steps=1") == 0
    assert evaluations(run_dir)[0] == pytest.approx(evaluations(source)[5], rel=TOLERANCE)
    before, after = saved_arrays(source, 5), saved_arrays(run_dir, 1)
    weights = [name for name in before if name.startswith("weight:")]
    assert weights and all(np.array_equal(after[name], before[name]) for name in weights)
    name = "layers.1.mlp.down_proj.weight"
    assert np.allclose(after[f"exp_avg:{name}"] ** 2 * 0.05, after[f"exp_avg_sq:{name}"] * 0.01, rtol=1e-3)
    # Stopped and started again it goes on from its own checkpoint.
    assert train(run_dir, read, f"checkpoint.weights_from={source}", "run.steps=2") == 0
    assert [line["step"] for line in steps(run_dir)] == [1, 2]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["checkpoint.weights_from=nowhere"], "checkpoint.weights_from: nowhere: neither a step_N folder nor a run's folder"),
        (["checkpoint.weights_from={source}", "model.hidden_size=64"], "saved with model.hidden_size=32, the run has 64"),
        (["checkpoint.weights_from={source}", "depth.router=none"], "saved with depth.router=static, the run has none"),
        (["checkpoint.weights_from={narrow}"], "checkpoint.weights_from: full has 3 edges that"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit(
    more: list[str], message: str, whole: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    narrow = tmp_path / "narrow"
    if "narrow" in more[0]:
        assert train(narrow, "pattern=last:1", "run.steps=1") == 0
    more = [word.format(source=whole("zero=0"), narrow=narrow) for word in more]
    assert train(tmp_path / "run", "", *more) == 2
    assert message in capfd.readouterr().err


def test_all_layouts_see_the_same_batches(whole: Callable[[str], Path]) -> None:
    first, *others = [[line["loss"] for line in steps(whole(layout))] for layout in FP32]
    assert len(set(first)) == len(first) == 5 and first[-1] < first[0] - 0.1, "training does nothing"
    for losses in others:
        assert losses == pytest.approx(first, rel=TOLERANCE)


# ---- what a run leaves


@pytest.mark.parametrize("layout", ["pp=3 zero=1 tp=2 relay", "pp=3 zero=1", "dp=2 zero=3"])
def test_metrics(layout: str, whole: Callable[[str], Path]) -> None:
    run_dir = whole(layout)
    report = plan_report(plan_run(load_config(run_dir / "config.yaml")))
    planned = [3 * boundary["bundle_bytes"] for boundary in report["hops"]]
    assert len(planned) == (2 if "pp=3" in layout else 0)
    assert [line["step"] for line in steps(run_dir)] == [1, 2, 3, 4, 5]
    for line in steps(run_dir):
        assert line.keys() == STEP_KEYS
        assert line["boundary_bytes"] == planned
        assert line["tokens_per_second"] == pytest.approx(12 * 12 / line["step_seconds"])
        assert (line["tokens_seen"], line["model_flops"]) == (12 * 12 * line["step"], report["model_flops_per_step"])
    assert [line["lr"] for line in steps(run_dir)] == pytest.approx([0.0, 0.025, 0.05, 0.0375, 0.0125])
    assert [line["router_lr"] for line in steps(run_dir)] == pytest.approx([0.0, 0.05, 0.1, 0.075, 0.025])
    peaks = [line["peak_resident_bytes"] for line in steps(run_dir)]
    assert peaks == sorted(peaks) and 50 * 2**20 < peaks[0] < psutil.virtual_memory().total
    assert list(evaluations(run_dir)) == [0, 3, 5]
    others = [line for line in lines(run_dir) if "loss" not in line]
    assert [line["step"] for line in others] == [0, 3, 3, 5, 5]
    for line in others:
        assert line.keys() - {"step", "time"} in ({"eval_loss", "eval_seconds"}, {"save_seconds", "save_wait_seconds"})


def test_utilization_of_a_resumed_run_that_switches(tmp_path: Path) -> None:
    """The FLOPs are those of the pattern that each step has, the peak that of all ranks."""
    more = ["depth.switch_at={2: first:1}", "run.peak_tflops=0.5"]
    assert train(tmp_path, "pp=2 dp=2", *more, "run.steps=3") == 0
    assert train(tmp_path, "pp=2 dp=2", *more, "run.steps=4") == 0
    config = load_config("run.yaml", overrides("pp=2 dp=2") + more)
    full, fewer = (plan_run(config.at_step(step)).model_flops_per_step for step in (0, 2))
    assert fewer < full
    assert [line["model_flops"] for line in steps(tmp_path)] == [full, full, fewer, fewer]
    assert [line["tokens_seen"] for line in steps(tmp_path)] == [12 * 12 * step for step in (1, 2, 3, 4)]
    for line in steps(tmp_path):
        assert line["mfu"] == pytest.approx(line["model_flops"] / (line["step_seconds"] * 4 * 0.5e12))


def test_tensorboard_holds_the_losses(whole: Callable[[str], Path]) -> None:
    run_dir = whole("pp=3 zero=1")
    board = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    points = {point.step: point.value for point in board.Scalars("train/loss")}
    assert points == pytest.approx({line["step"]: line["loss"] for line in steps(run_dir)}, rel=1e-6)  # kept as fp32


def test_config_reads_back(whole: Callable[[str], Path]) -> None:
    layout = "pp=3 zero=1 tp=2 relay"
    run_dir = whole(layout)
    started = ready_plan(load_config("run.yaml", [*overrides(layout), f"run.dir={run_dir}"]), 6).config
    assert load_config(run_dir / "config.yaml") == with_absolute_paths(started)
    assert (started.parallel.dp, started.depth.policy, started.zero_stage) == (1, "relay", 1)


def evaluate(capfd: pytest.CaptureFixture[str], run_dir: Path, layout: str, *more: str) -> dict:
    capfd.readouterr()
    assert main(["eval", "run.yaml", *overrides(layout), f"run.dir={run_dir}", *more]) == 0
    return json.loads(capfd.readouterr().out)


def test_the_plan_is_in_the_run_folder_and_in_each_checkpoint(whole: Callable[[str], Path]) -> None:
    run_dir = whole("pp=2 v=2 zero=1")
    config = load_config(run_dir / "config.yaml", [])
    expected = plan_report(ready_plan(config))["plan"]
    for folder in (run_dir, run_dir / "checkpoints" / "step_000005"):
        assert json.loads((folder / "plan.json").read_text()) == json.loads(json.dumps(expected))
    assert [stage["chunks"] for stage in expected["stages"]] == [[0, 2], [1, 3]]
    assert expected["stages"][1]["actions"].split()[:3] == ["1F0", "1F1", "1F2"]
    first = {message["cargo"]: message["bytes"] for message in expected["chunks"][0]["forward"]}
    assert first == {"residual": 4 * 12 * 32 * 4, "entries": 4 * 12 * 2 * 2 * 8 * 4}


def test_eval_reports_what_training_did(whole: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    layout = "pp=3 zero=1"
    run_dir = whole(layout)
    losses = evaluations(run_dir)
    report = evaluate(capfd, run_dir, layout)
    assert (report["step"], report["eval_loss"]) == (5, losses[5]) and losses[5] != losses[3]
    assert report["perplexity"] == pytest.approx(math.exp(losses[5]))
    checkpoint = run_dir / "checkpoints" / "step_000003"
    report = evaluate(capfd, run_dir, "tp=2 dp=2", "--checkpoint", str(checkpoint))
    assert report["eval_loss"] == pytest.approx(losses[3], rel=TOLERANCE) and report["checkpoint"] == str(checkpoint)


# ---- things that go wrong


def kill_self(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_while_writing(part: writing.Unwritten) -> object:
    """The last stage's rank has written its files."""
    written = write(part)
    if part.meta.step == 4 and part.stem == "pp01-tp00-dp000":
        kill_self()
    return written


def kill_before_renaming(source: Path, target: Path) -> None:
    kill_self() if target.name == "step_000004" else rename(source, target)


write, rename = writing._write, os.rename


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_interrupted_save(moment: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also: `keep` checkpoints are left, and what the interrupted save wrote goes with the next one."""
    with pytest.MonkeyPatch.context() as patch:  # ranks are forked, so they have it
        if moment == "writing":
            patch.setattr(writing, "_write", kill_while_writing)
        else:
            patch.setattr(os, "rename", kill_before_renaming)
        assert train(tmp_path, "pp=2", "run.steps=6", "checkpoint.every=1", "checkpoint.keep=2") == 1
    killed = "rank 1 (pp=1 dp=0 tp=0)" if moment == "writing" else "rank 0 (pp=0 dp=0 tp=0)"
    assert f"lime-dist: {killed} failed: killed by SIGKILL" in capfd.readouterr().err
    checkpoints = tmp_path / "checkpoints"
    left = {path.name for path in checkpoints.iterdir()}
    assert left == {"step_000002", "step_000003", ".unfinished-step_000004"}
    assert find_latest(checkpoints).name == "step_000003"

    assert train(tmp_path, "pp=2", "run.steps=6", "checkpoint.every=5", "checkpoint.keep=2") == 0
    assert f"resumed from {checkpoints}/step_000003, step 3 of 6" in capfd.readouterr().out
    assert {path.name for path in checkpoints.iterdir()} == {"step_000005", "step_000006"}
    assert [line["step"] for line in steps(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_killed_rank(tmp_path: Path) -> None:
    def command() -> None:
        sys.stderr = (tmp_path / "stderr").open("w")
        sys.exit(train(tmp_path, "pp=3", "run.steps=100000", "eval.every=0", "checkpoint.every=0"))

    process = multiprocessing.get_context("fork").Process(target=command)
    process.start()
    while not (tmp_path / "metrics.jsonl").exists() or len(steps(tmp_path)) < 2:
        assert process.is_alive()
        time.sleep(0.05)
    ranks = sorted(psutil.Process(process.pid).children(recursive=True), key=lambda rank: rank.pid)
    assert len(ranks) == 3
    ranks[1].kill()
    process.join(15)
    assert process.exitcode == 1
    _, alive = psutil.wait_procs(ranks, timeout=0)
    assert not alive
    last = (tmp_path / "stderr").read_text().splitlines()[-1]
    assert last == "lime-dist: rank 1 (pp=1 dp=0 tp=0) failed: killed by SIGKILL"


UNTIL_STOPPED = "eval.every=0", "checkpoint.every=0", "optim.lr_schedule=constant"
LONG = *UNTIL_STOPPED, "run.steps=100000"


def start(run_dir: Path, *more: str) -> subprocess.Popen[str]:
    """A training command of its own, whose third step is done when this returns."""
    command = [
        sys.executable,
        "-m",
        "lime_dist.cli",
        "train",
        "run.yaml",
        "parallel.pp=3",
        f"run.dir={run_dir}",
        *more,
    ]
    environment = os.environ | {OUTCOME_VARIABLE: str(run_dir / "outcome")}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    while not (run_dir / "metrics.jsonl").exists() or len(steps(run_dir)) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_saves_and_asks_for_a_restart(number: signal.Signals, folder: Path, tmp_path: Path) -> None:
    process = start(tmp_path, *LONG)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == REQUEUE, errors
    assert errors.count(f"{number.name}: stopping after this step") == 1, "of three ranks"
    at = steps(tmp_path)[-1]["step"]
    assert find_latest(tmp_path / "checkpoints").name == f"step_{at:06d}"
    assert read_outcome(tmp_path / "outcome") == (REQUEUE, f"{number.name} at step {at} of 100000")

    uninterrupted, more = tmp_path / "uninterrupted", (*UNTIL_STOPPED, f"run.steps={at + 2}")
    assert train(uninterrupted, "pp=3", *more) == train(tmp_path, "pp=3", *more) == DONE
    for key in ("step", "loss", "grad_norm", "lr"):
        assert [line[key] for line in steps(tmp_path)] == [line[key] for line in steps(uninterrupted)]


def test_one_rank_that_is_asked_stops_all(folder: Path, tmp_path: Path) -> None:
    process = start(tmp_path, *LONG)
    ranks = sorted(psutil.Process(process.pid).children(), key=lambda rank: rank.pid)
    ranks[1].send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert errors.count("stopping after this step") == 1
    code, reason = read_outcome(tmp_path / "outcome")
    assert (process.returncode, code) == (REQUEUE, REQUEUE)
    assert re.fullmatch(r"(SIGUSR1|stop asked of another rank) at step \d+ of 100000", reason)


@pytest.mark.slow
def test_another_signal_is_no_second_one(folder: Path, tmp_path: Path) -> None:
    """At a time limit that is near SIGUSR1 comes, and SIGTERM at the limit, when ranks may be saving."""
    process = start(tmp_path, *LONG)
    ranks = sorted(psutil.Process(process.pid).children(), key=lambda rank: rank.pid)
    ranks[1].suspend()
    process.send_signal(signal.SIGUSR1)
    time.sleep(REPEAT_WINDOW_SECONDS + 0.5)
    process.send_signal(signal.SIGTERM)
    ranks[1].resume()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == REQUEUE, errors
    # The suspended rank gets both at once, in either order, and may be the first to say how the run ended.
    assert re.match(r"SIG(USR1|TERM) at step", read_outcome(tmp_path / "outcome")[1])


def test_going_back_leaves_the_later_checkpoints_aside(folder: Path, tmp_path: Path) -> None:
    """Else the next start would return to the branch that was left, and pruning would take the new one's checkpoints."""
    assert train(tmp_path, "pp=3", "checkpoint.keep=2") == DONE
    checkpoints = tmp_path / "checkpoints"
    back = f"checkpoint.resume={checkpoints}/step_000003"
    assert train(tmp_path, "pp=3", back, "checkpoint.keep=2", "run.steps=4", "optim.lr_schedule=constant") == DONE
    left = sorted(path.name for path in checkpoints.iterdir())
    assert left[1:] == ["step_000003", "step_000004"] and re.fullmatch(r"abandoned-\d+-step_000005", left[0])
    assert read_meta(find_latest(checkpoints)).step == 4


def test_a_run_folder_that_cannot_be_written(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train(Path("/proc/run"), "pp=3") == NEVER_RESTART
    assert re.search(r"^lime-dist: run\.dir: /proc/run: .*; name a folder", capfd.readouterr().err, re.MULTILINE)


@pytest.mark.slow
def test_a_second_signal_leaves_at_once(folder: Path, tmp_path: Path) -> None:
    """Even a rank that stands in a collective, which no Python signal handler reaches."""
    process = start(tmp_path, *LONG)
    ranks = sorted(psutil.Process(process.pid).children(), key=lambda rank: rank.pid)
    ranks[1].suspend()
    process.send_signal(signal.SIGTERM)
    time.sleep(REPEAT_WINDOW_SECONDS + 0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == FAILED and "SIGTERM again: leaving at once" in errors
    assert find_latest(tmp_path / "checkpoints") is None
    assert not psutil.wait_procs(ranks, timeout=5)[1]


@pytest.mark.slow
def test_a_start_that_was_replaced_does_not_save(folder: Path, tmp_path: Path) -> None:
    process = start(tmp_path, *LONG)
    Ownership(tmp_path)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == NEVER_RESTART
    assert re.search(r"^lime-dist: run.dir: .* was taken over by process \d+ on", errors, re.MULTILINE)
    assert find_latest(tmp_path / "checkpoints") is None


def all_finite(run_dir: Path) -> bool:
    files = (run_dir / "checkpoints").glob("*/*.safetensors")
    return all(np.isfinite(array).all() for path in files for array in load_file(path).values())


def told(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of stderr that are for the user; one that starts the ranks is not."""
    errors = capfd.readouterr().err
    assert "Traceback" not in errors
    return [line for line in errors.splitlines() if line.startswith("lime-dist: ")]


def refuse_constant(text: str) -> None:
    raise ValueError(text)


# The embeddings of ids that do not occur have zero moments, which AdamW without eps divides by each other.
RUIN = ("optim.eps=0", "model.tie_embeddings=false", "optim.warmup_steps=0", "eval.every=0")


@pytest.mark.parametrize("steps_asked", [1, 3])
def test_an_update_that_ruins_the_weights_is_not_saved(
    steps_asked: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The loss before it and its gradient are finite, the weights after it are not."""
    assert train(tmp_path, "pp=3", *RUIN, f"run.steps={steps_asked}") == NEVER_RESTART
    (line,) = told(capfd)
    assert re.search(r"not finite|nan", line) and "start again from step 0" in line
    assert find_latest(tmp_path / "checkpoints") is None
    for text in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=refuse_constant)


def test_a_ruined_model_does_not_push_out_the_good_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    keep = ("checkpoint.every=1", "checkpoint.keep=1", "optim.lr_schedule=constant")
    assert train(tmp_path, "pp=3", *RUIN, *keep, "run.steps=2", "optim.eps=1e-3") == DONE
    for _ in range(2):
        assert train(tmp_path, "pp=3", *RUIN, *keep, "run.steps=9") == NEVER_RESTART
        assert len(told(capfd)) == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000002"] and all_finite(tmp_path)


def test_torchrun(whole: Callable[[str], Path], tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    command = [
        "-m",
        "lime_dist.cli",
        "train",
        "run.yaml",
        "parallel.pp=3",
        f"run.dir={tmp_path}",
        "eval.batches=1",
    ]
    result = subprocess.run([*launcher, *command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    expected = [line["loss"] for line in steps(whole("pp=3 zero=1"))]
    assert [line["loss"] for line in steps(tmp_path)] == pytest.approx(expected, rel=TOLERANCE)
    assert len(re.findall(r"^step 5/5  loss", result.stdout, re.MULTILINE)) == 1, "ranks other than 0 print as well"
