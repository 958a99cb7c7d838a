"""A link between two hosts that is cut while all hosts live and see the shared disk: the boundary is named, no rank.

Each stage has a network namespace of its own on one bridge; the cut is a pair of routes into nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_watchdog import write_endless_run

from lime_dist.lifecycle.ending import FAILED, OUTCOME_VARIABLE, read_outcome

TIMEOUT = 10  # seconds without progress
PATIENCE = 120  # for three interpreters on a busy machine
_HOLD = ("unshare", "--net", "sh", "-c", "echo ready; read -r _")
# Rank 1 waits in a forward pass of a later step until the link is cut; then what it sends does not arrive.
_RANK = """
import os, sys, time
from pathlib import Path
from lime_dist.cli.command_line import main
from lime_dist.lime.layers import DecoderLayer

folder, forward, calls = Path(sys.argv[1]), DecoderLayer.forward, []

def wait_for_the_cut(layer, *args):
    calls.append(None)
    if os.environ["RANK"] == "1" and len(calls) == 20:
        (folder / "waiting").touch()
        while not (folder / "cut").exists():
            time.sleep(0.05)
    return forward(layer, *args)

DecoderLayer.forward = wait_for_the_cut
sys.exit(main(["train", *sys.argv[2:]]))
"""


def why_not_here() -> str | None:
    if not shutil.which("ip") or not shutil.which("nsenter"):
        return "needs iproute2 and nsenter"
    trial = subprocess.run([*_HOLD[:2], "ip", "link", "add", "trial", "type", "bridge"], capture_output=True, text=True)
    return f"needs root and Linux namespaces ({trial.stderr.strip()})" if trial.returncode else None


class Hosts:
    """Network namespaces with an address each, and one that is the switch between them; gone when their shells are."""

    def __init__(self, count: int) -> None:
        self._shells = [self._hold() for _ in range(count + 1)]
        self._ip(count, "link add bridge type bridge", "link set bridge up")
        for host in range(count):
            self._ip(count, f"link add port{host} type veth peer name eth0 netns {self._shells[host].pid}")
            self._ip(count, f"link set port{host} master bridge", f"link set port{host} up")
            self._ip(host, f"addr add {self.address(host)}/24 dev eth0", "link set lo up", "link set eth0 up")

    def _hold(self) -> subprocess.Popen[str]:
        shell = subprocess.Popen(_HOLD, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert shell.stdout is not None and shell.stdout.readline() == "ready\n"
        return shell

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    def inside(self, host: int) -> list[str]:
        return ["nsenter", f"--target={self._shells[host].pid}", "--net"]

    def _ip(self, host: int, *lines: str) -> None:
        for line in lines:
            subprocess.run([*self.inside(host), "ip", *line.split()], check=True)

    def cut(self, one: int, other: int) -> None:
        self._ip(one, f"route add blackhole {self.address(other)}/32")
        self._ip(other, f"route add blackhole {self.address(one)}/32")

    def close(self) -> None:
        for shell in self._shells:
            shell.communicate()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_endless_run(tmp_path)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if (reason := why_not_here()) is not None:
        pytest.skip(reason)
    hosts = Hosts(3)
    yield hosts
    hosts.close()


def begin(hosts: Hosts, rank: int, config: Path) -> subprocess.Popen[str]:
    environment = {
        "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": hosts.address(0), "MASTER_PORT": "29511",
        "GLOO_SOCKET_IFNAME": "eth0", "SLURMD_NODENAME": f"host{rank}", "OMP_NUM_THREADS": "1",
        OUTCOME_VARIABLE: str(config.parent / "outcome"),
    }  # fmt: skip
    arguments = [str(config.parent), str(config), "parallel.pp=3", f"run.timeout_seconds={TIMEOUT}"]
    command = [*hosts.inside(rank), sys.executable, "-c", _RANK, *arguments]
    return subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_the_boundary_whose_link_is_cut_is_named(hosts: Hosts, config: Path) -> None:
    ranks = [begin(hosts, rank, config) for rank in range(3)]
    try:
        deadline = time.monotonic() + PATIENCE
        while not (config.parent / "waiting").exists():
            assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks)
            time.sleep(0.05)
        hosts.cut(1, 2)
        (config.parent / "cut").touch()
        errors = [rank.communicate(timeout=PATIENCE)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    code, reason = read_outcome(config.parent / "outcome")
    assert code == FAILED
    assert reason.startswith(
        f"no progress for {TIMEOUT} s; silent: between stage 1 on host1 and stage 2 on host2 (forward of microbatch "
    )
    assert all(f"stacks of rank {rank}:" in text for rank, text in enumerate(errors))
