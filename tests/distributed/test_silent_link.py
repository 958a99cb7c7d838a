"""A link between two hosts that is cut while all hosts live and see the shared disk: the boundary is named, no rank.

Each stage has a host of its own on one switch; the cut is a pair of routes into nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from test_watchdog import write_endless_run

from lime_dist.bench.hosts import Host, hosts, why_no_hosts
from lime_dist.lifecycle.ending import FAILED, OUTCOME_VARIABLE, read_outcome

TIMEOUT = 10  # seconds without progress
PATIENCE = 120  # for three interpreters on a busy machine
# The sender waits in a forward pass of a later step until the link is cut; then what it sends does not arrive.
_RANK = """
import os, sys, time
from pathlib import Path
from lime_dist.cli.command_line import main
from lime_dist.lime.layers import DecoderLayer

folder, forward, calls = Path(sys.argv[1]), DecoderLayer.forward, []

def wait_for_the_cut(layer, *args):
    calls.append(None)
    if os.environ["RANK"] == sys.argv[2] and len(calls) == 20:
        (folder / "waiting").touch()
        while not (folder / "cut").exists():
            time.sleep(0.05)
    return forward(layer, *args)

DecoderLayer.forward = wait_for_the_cut
sys.exit(main(["train", *sys.argv[3:]]))
"""


needs_hosts = pytest.mark.skipif(bool(why := why_no_hosts()), reason=str(why))


def cut(one: Host, other: Host) -> None:
    for here, there in ((one, other), (other, one)):
        route = ["ip", "route", "add", "blackhole", f"{there.address}/32"]
        subprocess.run(route, check=True, preexec_fn=here.enter)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_endless_run(tmp_path)


def begin(on: Sequence[Host], rank: int, config: Path, sender: int, *overrides: str) -> subprocess.Popen[str]:
    environment = {
        "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": on[0].address, "MASTER_PORT": "29511",
        "GLOO_SOCKET_IFNAME": "eth0", "SLURMD_NODENAME": f"host{rank}", "OMP_NUM_THREADS": "1",
        OUTCOME_VARIABLE: str(config.parent / "outcome"),
    }  # fmt: skip
    arguments = [str(config.parent), str(sender), str(config), "parallel.pp=3", f"run.timeout_seconds={TIMEOUT}"]
    command = [sys.executable, "-c", _RANK, *arguments, *overrides]
    return subprocess.Popen(
        command, env=os.environ | environment, stderr=subprocess.PIPE, text=True, preexec_fn=on[rank].enter
    )


RING = ("parallel.virtual_stages=2", "model.num_layers=6")


@needs_hosts
@pytest.mark.slow
@pytest.mark.parametrize(("sender", "receiver", "overrides"), [(1, 2, ()), (1, 2, RING), (2, 0, RING)])
def test_the_boundary_whose_link_is_cut_is_named(
    config: Path, sender: int, receiver: int, overrides: tuple[str, ...]
) -> None:
    """With virtual stages the last stage sends to the first."""
    with hosts(3) as three:
        errors = errors_after_a_cut(three, config, sender, receiver, overrides)
    code, reason = read_outcome(config.parent / "outcome")
    assert code == FAILED
    one, other = sorted((sender, receiver))
    assert reason.startswith(
        f"no progress for {TIMEOUT} s; silent: between stage {one} on host{one} and stage {other} on host{other} "
        "(forward of microbatch "
    )
    assert all(f"stacks of rank {rank}:" in text for rank, text in enumerate(errors))


def errors_after_a_cut(
    on: Sequence[Host], config: Path, sender: int, receiver: int, overrides: tuple[str, ...]
) -> list[str]:
    """What the ranks print when the link is cut between a forward pass of the sender and its message."""
    ranks = [begin(on, rank, config, sender, *overrides) for rank in range(3)]
    try:
        deadline = time.monotonic() + PATIENCE
        while not (config.parent / "waiting").exists():
            assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks)
            time.sleep(0.05)
        cut(on[sender], on[receiver])
        (config.parent / "cut").touch()
        return [rank.communicate(timeout=PATIENCE)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
