"""SLURM's lists of hosts: as scontrol reads them, and without it."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from lime_dist.cluster.nodelist import expand_nodelist, planned_hosts
from lime_dist.errors import LayoutError

LISTS = [
    ("n1", ["n1"]),
    ("n[1-3,07-09]", ["n1", "n2", "n3", "n07", "n08", "n09"]),
    ("n[08-11],gpu-a", ["n08", "n09", "n10", "n11", "gpu-a"]),
    ("r[1-2]n[3,5]", ["r1n3", "r1n5", "r2n3", "r2n5"]),
    ("a[1-2]-ib.x", ["a1-ib.x", "a2-ib.x"]),
    ("n2,n1,n2", ["n2", "n1", "n2"]),
    ("", []),
]


@pytest.mark.parametrize(("text", "hosts"), LISTS)
def test_expanded(text: str, hosts: list[str]) -> None:
    assert expand_nodelist(text, run_scontrol=False) == hosts


@pytest.mark.parametrize("text", ["n[1-", "n[a]", "n[3-1]", "n[]", "n[1-2,]"])
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(LayoutError, match="^nodelist: .*write it as SLURM does"):
        expand_nodelist(text, run_scontrol=False)


@pytest.fixture
def scontrol(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It needs a configuration but no daemon."""
    (tmp_path / "slurm.conf").write_text("ClusterName=test\nSlurmctldHost=localhost\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="compares with SLURM's own scontrol")
def test_as_scontrol_does(scontrol: None) -> None:
    """Random lists of what a step's list can hold."""
    generator = random.Random(4)
    for _ in range(40):
        text = ",".join(random_item(generator) for _ in range(generator.randint(1, 6)))
        command = ["scontrol", "show", "hostnames", text]
        expected = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        assert expand_nodelist(text, run_scontrol=False) == expected, text


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="asks SLURM's own scontrol")
def test_scontrol_knows_other_forms(scontrol: None) -> None:
    assert expand_nodelist("n1]") == ["n1]"]  # what a bracket means is SLURM's affair
    with pytest.raises(LayoutError):
        expand_nodelist("n[3-1]")


def random_item(generator: random.Random) -> str:
    prefixes = [generator.choice(("n", "gpu-", "rack2-n", "x-y")) for _ in range(generator.choice((1, 1, 2)))]
    return "".join(prefix + random_brackets(generator) for prefix in prefixes)


def random_brackets(generator: random.Random) -> str:
    ranges = []
    for _ in range(generator.randint(1, 3)):
        first, width = generator.randint(0, 120), generator.choice((0, 0, 2, 4))
        last = first + generator.randint(0, 9)
        ranges.append(generator.choice((f"{first:0{width}}", f"{first:0{width}}-{last:0{width}}")))
    return f"[{','.join(ranges)}]"


STEP = {"SLURM_STEP_NODELIST": "n[1-3]", "SLURM_JOB_NODELIST": "n[1-9]"}
PLANS = [
    ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}, ["n1", "n1", "n2", "n2", "n3"]),
    ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "1(x3)", "LOCAL_WORLD_SIZE": "2"}, ["n1", "n1", "n2", "n2", "n3", "n3"]),
    ({"SLURM_JOB_NODELIST": "n4", "SLURM_STEP_TASKS_PER_NODE": "2"}, ["n4", "n4"]),
]


@pytest.mark.parametrize(("environment", "hosts"), PLANS)
def test_hosts_of_ranks(environment: dict[str, str], hosts: list[str]) -> None:
    assert planned_hosts(len(hosts), environment) == dict(enumerate(hosts))
    assert set(planned_hosts(len(hosts) + 1, environment).values()) == {""}  # other ranks than SLURM's tasks


def test_hosts_are_unknown_outside_slurm() -> None:
    assert planned_hosts(2, {}) == {0: "", 1: ""}
