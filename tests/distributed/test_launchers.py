"""The scripts in launch/ as a user runs them: the losses of `lime-dist train` alone, and the run's own exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from lime_dist.checkpoint.reader import find_latest
from lime_dist.data.indexed import IndexedWriter
from lime_dist.lifecycle.ending import DONE, NEVER_RESTART, REQUEUE
from lime_dist.lifecycle.local import free_port

ROOT = Path(__file__).parents[2]
CONFIG = {
    "model": {"num_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "vocab_size": 96},
    "parallel": {"pp": 3},
    "pipeline": {"num_microbatches": 2},
    "optim": {"lr": 0.05, "eps": 1e-3, "warmup_steps": 1},
    "data": {"train": "train", "seq_length": 12, "global_batch_size": 4},
    "run": {"device": "cpu", "steps": 3, "timeout_seconds": 60},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    generator = np.random.default_rng(5)
    with IndexedWriter(folder / "train", vocab_size=96) as writer:
        for _ in range(40):
            writer.add_document(np.minimum(generator.zipf(1.3, 30), 95))
        writer.commit({"vocab_size": 96, "tokens": 40 * 30})
    (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    yield
    for process in STARTED:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.communicate()


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[float]:
    """The losses of `lime-dist train` alone."""
    assert_done([start(folder, [sys.executable, "-m", "lime_dist.cli", "train"], "run.dir=alone")])
    return losses(folder / "alone")


def start(folder: Path, command: list[str], *overrides: str, **environment: object) -> subprocess.Popen[str]:
    """In the folder of the data, with the environment of a shell that no launcher has started."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "LIME_DIST_"))}
    inherited["PATH"] = f"{Path(sys.executable).parent}:{inherited['PATH']}"
    inherited |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | {
        name: str(value) for name, value in environment.items()
    }
    process = subprocess.Popen(
        [*command, "run.yaml", *overrides], cwd=folder, env=inherited, text=True, stderr=subprocess.PIPE
    )
    STARTED.append(process)
    return process


def script(name: str) -> list[str]:
    return ["bash", str(ROOT / "launch" / name)]


def losses(run_dir: Path) -> list[float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def assert_done(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        _, errors = process.communicate()
        assert process.returncode == DONE, errors


@pytest.mark.slow
@pytest.mark.parametrize("name", ("local.sh", "deepspeed.sh"))
def test_one_node(name: str, folder: Path, expected: list[float]) -> None:
    run_dir = folder / name
    assert_done([start(folder, script(name), f"run.dir={run_dir}", NPROC=3, MASTER_PORT=free_port())])
    assert losses(run_dir) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_two_nodes_of_torchrun(folder: Path, expected: list[float]) -> None:
    """Two stages on the first node, one on the second: both are this machine."""
    shared = {"NNODES": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    nodes = enumerate((2, 1))
    assert_done(
        [
            start(folder, script("torchrun_multinode.sh"), "run.dir=torchrun", NODE_RANK=node, NPROC=ranks, **shared)
            for node, ranks in nodes
        ]
    )
    assert losses(folder / "torchrun") == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_two_nodes_of_deepspeed(folder: Path, expected: list[float]) -> None:
    """Without ssh. The sample's hosts, with as many slots as there are stages."""
    sample = (ROOT / "launch" / "hostfile.sample").read_text()
    (folder / "hostfile").write_text(sample.replace("node-a slots=8", "node-a slots=2").replace("slots=8", "slots=1"))
    shared = {"HOSTFILE": "hostfile", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    assert_done(
        [start(folder, script("deepspeed.sh"), "run.dir=deepspeed", NODE_RANK=node, **shared) for node in range(2)]
    )
    assert losses(folder / "deepspeed") == pytest.approx(expected, rel=1e-5)


def test_a_mistake_keeps_its_exit_code(folder: Path) -> None:
    """Of which torchrun makes 1."""
    process = start(folder, script("local.sh"), "data.train=missing", NPROC=3)
    _, errors = process.communicate()
    assert process.returncode == NEVER_RESTART, errors
    assert errors.splitlines()[-1].startswith("local.sh: exit code 2, data.train: ")
    assert errors.count("lime-dist: data.train: ") == 1


def test_torchrun_alone_repeats_no_mistake(folder: Path) -> None:
    torchrun = ["torchrun", "--standalone", "--nproc-per-node", "3", "-m", "lime_dist.cli", "train"]
    process = start(folder, torchrun, "data.train=missing")
    _, errors = process.communicate()
    assert process.returncode != DONE and errors.count("lime-dist: data.train: ") == 1, errors


@pytest.mark.slow
@pytest.mark.parametrize("name", ("local.sh", "deepspeed.sh"))
def test_a_signal_to_the_script_stops_the_run_behind_a_checkpoint(name: str, folder: Path) -> None:
    run_dir = folder / f"stopped_{name}"
    process = start(folder, script(name), f"run.dir={run_dir}", "run.steps=1000000", NPROC=3, MASTER_PORT=free_port())
    metrics = run_dir / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == REQUEUE, errors
    assert find_latest(run_dir / "checkpoints") is not None


@pytest.mark.parametrize(
    ("command", "code"),
    (("exit 0", 0), ("exit 7", 7), ("echo '75 SIGTERM at step 3' > $LIME_DIST_OUTCOME_FILE; exit 1", REQUEUE)),
)
def test_the_outcome_counts_more_than_the_launcher(command: str, code: int, tmp_path: Path) -> None:
    text = f"source {ROOT}/launch/outcome.sh; exit_as_the_run bash -c {command!r}"
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", text], env=os.environ | {"TMPDIR": str(tmp_path)})
    assert done.returncode == code
