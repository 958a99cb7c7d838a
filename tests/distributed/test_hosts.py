"""Ranks on hosts of their own: hosts that take their own name for loopback, and what listens on which address."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hosts import Ended, run_on_hosts, why_not_here

from lime_dist.data.indexed import IndexedWriter

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why := why_not_here()), reason=str(why))]

CONFIG = {
    "model": {"num_layers": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "vocab_size": 96},
    "data": {"train": "train", "seq_length": 12, "global_batch_size": 6},
    "pipeline": {"num_microbatches": 2},
    "run": {"device": "cpu", "steps": 3, "timeout_seconds": 20, "log_every": 1},
}
TOLERANCE = 1e-5  # the order of fp32 sums
CLI = f"{sys.executable} -m lime_dist.cli"
LOCAL = "run.yaml parallel.pp=2"
PORT = "29500"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of all hosts: tokens and the config."""
    folder = tmp_path_factory.mktemp("hosts")
    with IndexedWriter(folder / "train", vocab_size=96) as writer:
        writer.add_document(np.arange(400) * 7 % 96)
        writer.commit({"vocab_size": 96, "tokens": 400})
    (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Ended:
    """The run on one host's own ranks, into `alone`; the host's name means an address of its network."""
    command = f"cd {folder} && {CLI} preflight {LOCAL} && {CLI} train {LOCAL} run.dir=alone"
    (ended,) = run_on_hosts(folder / "alone_host", ["127.0.0.1 localhost\n10.77.0.1 n1\n"], [command], [{}], 300)
    assert ended.code == 0, ended
    return ended


def debian_hosts(own: int, count: int = 3) -> str:
    """As Debian's installer writes it, with the other hosts added by hand."""
    others = [f"10.77.0.{index} n{index}\n" for index in range(1, count + 1) if index != own]
    return f"127.0.0.1 localhost\n127.0.1.1 n{own}\n{''.join(others)}"


def srun(rank: int) -> dict[str, str]:
    return {
        "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURM_NTASKS": "3", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "n[1-3]", "SLURM_STEP_TASKS_PER_NODE": "1(x3)", "SLURMD_NODENAME": f"n{rank + 1}",
        "MASTER_ADDR": "n1", "MASTER_PORT": PORT,
    }  # fmt: skip


def by_hand(rank: int) -> dict[str, str]:
    """Of a launcher that does not say who is where."""
    return {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "n1", "MASTER_PORT": PORT}


VARIABLES = {"srun": srun, "by_hand": by_hand, "torchrun": lambda rank: {}}


def command(folder: Path, rank: int, launcher: str) -> str:
    if launcher == "torchrun":
        options = (
            f"--nnodes=3 --nproc-per-node=1 --node-rank={rank} --master-addr=n1 --master-port={PORT} --max-restarts=0"
        )
        start = f"{sys.executable} -m torch.distributed.run {options} -m lime_dist.cli"
    else:
        start = CLI
    preflight = f"{start} preflight run.yaml parallel.pp=3 && " if launcher == "srun" else ""
    return f"cd {folder} && {preflight}{start} train run.yaml parallel.pp=3 run.dir={launcher}"


def on_three_hosts(folder: Path, launcher: str) -> list[Ended]:
    commands = [command(folder, rank, launcher) for rank in range(3)]
    variables = [VARIABLES[launcher](rank) for rank in range(3)]
    hosts_files = [debian_hosts(index) for index in (1, 2, 3)]
    return run_on_hosts(folder / f"{launcher}_hosts", hosts_files, commands, variables, 300)


def losses(run_dir: Path) -> list[float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("launcher", VARIABLES)
def test_hosts_that_take_their_own_name_for_loopback(folder: Path, alone: Ended, launcher: str) -> None:
    """They train all the same, and listen on the addresses by which they know each other and on no others."""
    ended = on_three_hosts(folder, launcher)
    assert [host.code for host in ended] == [0, 0, 0], ended
    expected = losses(folder / "alone")
    assert losses(folder / launcher) == pytest.approx(expected, rel=TOLERANCE) and len(expected) == 3
    agents = {"*"} if launcher == "torchrun" else set()  # torchrun's own store
    assert [host.listening - agents for host in ended] == [{f"10.77.0.{index}"} for index in (1, 2, 3)]


def test_local_ranks_listen_on_loopback_alone(alone: Ended) -> None:
    assert alone.listening == {"127.0.0.1"}
