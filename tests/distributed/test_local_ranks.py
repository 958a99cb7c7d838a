"""Commands that start local ranks: where the device may be CUDA in fresh interpreters, not by fork; none sends objects.

There is no GPU here, so a stand-in starts the command: it believes that it sees GPUs, and its forks end at once, as forks
of a process that has asked for CUDA cannot use it. Its fresh interpreters see that there is none and train on the CPU.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from torch.distributed import distributed_c10d

from lime_dist.checkpoint.reader import find_latest
from lime_dist.cli.command_line import main
from lime_dist.data.indexed import IndexedWriter
from lime_dist.lifecycle.ending import DONE, FAILED, NEVER_RESTART, REQUEUE

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parents[1] / "golden" / "mha4"
CONFIG = {
    "model": {
        "num_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 96,
    },
    "parallel": {"pp": 3},
    "pipeline": {"num_microbatches": 3},
    "optim": {"lr": 0.05, "router_lr": 0.1, "eps": 1e-3, "max_grad_norm": 0.5, "warmup_steps": 2},
    "data": {"train": "train", "valid": "train", "seq_length": 12, "global_batch_size": 12},
    "eval": {"batches": 1},
    "run": {"device": "auto", "steps": 3, "timeout_seconds": 60},
}  # fmt: skip
STAND_IN = """
import os, sys
from lime_dist.preflight import devices
devices.count_gpus = lambda: 8
os.register_at_fork(after_in_child=lambda: os._exit(99))
from lime_dist.cli.command_line import main
sys.exit(main())
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    generator = np.random.default_rng(5)
    with IndexedWriter(tmp_path / "train", vocab_size=96) as writer:
        writer.add_document(generator.integers(0, 96, 2000))
        writer.commit({"vocab_size": 96, "tokens": 2000})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", STAND_IN, *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run(*arguments: str) -> tuple[int, str, str]:
    """Exit code, output, errors."""
    process = start(*arguments)
    output, errors = process.communicate(timeout=200)
    return process.returncode, output, errors


def steps(run_dir: Path) -> list[tuple[float, float]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def weights(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in find_latest(run_dir / "checkpoints").glob("*.safetensors")}


def test_the_same_numbers_as_by_fork(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, errors = run("train", "run.yaml", "run.dir=fresh")
    assert code == DONE, errors
    assert main(["train", "run.yaml", "run.dir=fork", "run.device=cpu"]) == DONE
    assert len(steps(folder / "fresh")) == 3 and steps(folder / "fresh") == steps(folder / "fork")
    assert weights(folder / "fresh") == weights(folder / "fork") != {}

    code, output, errors = run("eval", "run.yaml", "run.dir=fresh")
    assert code == DONE, errors
    capfd.readouterr()
    assert main(["eval", "run.yaml", "run.dir=fork", "run.device=cpu"]) == DONE
    assert json.loads(output)["eval_loss"] == json.loads(capfd.readouterr().out)["eval_loss"]


def test_by_fork_the_stand_in_fails() -> None:
    """Else the tests here would show nothing."""
    code, _, errors = run("train", "run.yaml", "run.dir=run", "run.device=cpu")
    assert code == FAILED and re.search(r"rank \d \(pp=.*\) failed: exit code 99$", errors)


@pytest.mark.parametrize(
    "command",
    [
        ["parity", str(GOLDEN), "parallel.pp=2"],
        ["preflight", "run.yaml", "run.dir=run"],
        ["bench", "patterns", "run.yaml", "run.dir=run", "run.steps=7", "--patterns", "full", "--seeds", "1"],
    ],
    ids=lambda command: command[0],
)
def test_the_other_commands(command: list[str]) -> None:
    code, output, errors = run(*command)
    assert code == 0 and output, errors


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("an object was sent")


@pytest.mark.parametrize("layout", [[], ["parallel.pp=1", "parallel.dp=2", "deepspeed.zero_optimization.stage=3"]])
def test_no_library_sends_objects_either(layout: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's object collectives and stores pickle; what DeepSpeed and Megatron do in a run must not need them."""
    for module, name in (
        (distributed_c10d, "_object_to_tensor"),
        (distributed_c10d, "_tensor_to_object"),
        (pickle, "loads"),
    ):
        monkeypatch.setattr(module, name, refuse)
    train = ["train", "run.yaml", "run.dir=run", "run.device=cpu", "pipeline.num_microbatches=1", *layout]
    assert main([*train, "run.steps=1", "optim.lr_schedule=constant"]) == DONE
    assert main(train) == DONE, "resuming"


def ranks_of(process: subprocess.Popen[str], count: int) -> list[psutil.Process]:
    while len(found := psutil.Process(process.pid).children()) < count:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    return sorted(found, key=lambda rank: rank.pid)


def test_a_killed_rank_is_named(folder: Path) -> None:
    process = start("train", "run.yaml", "run.dir=run", "run.steps=100000")
    ranks = ranks_of(process, 3)
    while not (folder / "run/metrics.jsonl").exists() or len(steps(folder / "run")) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    ranks[1].kill()
    _, errors = process.communicate(timeout=30)
    assert process.returncode == FAILED
    assert errors.splitlines()[-1] == "lime-dist: rank 1 (pp=1 dp=0 tp=0) failed: killed by SIGKILL"
    assert not psutil.wait_procs(ranks, timeout=5)[1]


def test_a_users_error_is_one_line() -> None:
    code, _, errors = run("train", "run.yaml", "run.dir=/proc/run", "parallel.pp=2")
    assert code == NEVER_RESTART and "Traceback" not in errors
    assert re.match(r"lime-dist: run\.dir: /proc/run: .*; name a folder", errors.splitlines()[-1])


def hears(rank: psutil.Process, number: signal.Signals) -> bool:
    (caught,) = re.findall(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{rank.pid}/status").read_text(), re.MULTILINE)
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_a_signal_while_ranks_import_means_to_start_again(folder: Path) -> None:
    """Before the ranks have met each leaves at once; nothing has been made that could be saved."""
    process = start("train", "run.yaml", "run.dir=run", "run.steps=100000", "parallel.pp=2")
    ranks = ranks_of(process, 2)
    while not all(hears(rank, signal.SIGTERM) for rank in ranks):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == REQUEUE, errors
    assert find_latest(folder / "run/checkpoints") is None and "Traceback" not in errors
