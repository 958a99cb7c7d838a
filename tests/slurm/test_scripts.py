"""The golden batch scripts as the real sbatch reads them, each on a cluster that has what the script asks for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cluster import Cluster, why_not_here
from site_files import Site

pytestmark = pytest.mark.slurm
SCRIPTS = sorted((Path(__file__).parents[1] / "golden" / "sbatch").glob("*.sbatch"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    if reason := why_not_here():
        pytest.skip(reason)
    return lambda: tmp_path_factory.mktemp("site")


def asked_of(script: Path) -> dict[str, str]:
    """The options of the #SBATCH lines."""
    return dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script.read_text(), re.MULTILINE))


def site_for(asked: dict[str, str]) -> Site:
    gpu_type, _, gpus = (asked.get("gres") or asked.get("gpus-per-node") or "0").removeprefix("gpu:").rpartition(":")
    return Site(
        nodes=int(asked["nodes"]),
        cpus=int(asked["ntasks-per-node"]) * int(asked.get("cpus-per-task", 1)),
        memory_mib=2**20,
        gpus=int(gpus),
        gpu_type=gpu_type,
        features=",".join(re.findall(r"\w+", asked.get("constraint", ""))),
        partitions=tuple(
            f"PartitionName={name} Nodes=ALL Default=YES MaxTime=INFINITE"
            for name in asked.get("partition", "any").split(",")
        ),
    )


@contextmanager
def cluster_for(asked: dict[str, str], folder: Path) -> Iterator[Cluster]:
    with Cluster.start(folder, site_for(asked)) as cluster:
        if name := asked.get("reservation"):
            days = ["starttime=now", "duration=2-00:00:00", "users=root", "nodes=ALL"]
            cluster.run(["scontrol", "create", "reservation", f"reservationname={name}", *days])
        yield cluster


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_sbatch_accepts(script: Path, folders: Callable[[], Path]) -> None:
    asked = asked_of(script)
    with cluster_for(asked, folders()) as cluster:
        accepted = cluster.run(["sbatch", "--test-only", str(script)], check=False)
        assert accepted.returncode == 0, accepted.stderr
        placed = re.search(r"using (\d+) processors on nodes", accepted.stderr)
        assert placed and int(placed[1]) == cluster.site.cpus * cluster.site.nodes
        # What one node more would need is not there, so the answer is about this cluster.
        assert cluster.run(
            ["sbatch", "--test-only", f"-N{cluster.site.nodes + 1}", str(script)], check=False
        ).returncode


def test_scripts_are_found() -> None:
    assert len(SCRIPTS) >= 5
