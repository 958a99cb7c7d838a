"""The cluster itself: its hosts, its failures, and a training that srun starts without lime_dist's own script."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster, ClusterError
from training import STEPS, TP2_PP2, curve

pytestmark = pytest.mark.slurm
TRAIN = ("-m", "lime_dist.cli", "train", "run.yaml", *TP2_PP2)
MEETING = {"MASTER_ADDR": "n1", "MASTER_PORT": "21000"}


def test_every_node_is_a_host_of_its_own(cluster: Cluster) -> None:
    two = ["srun", "--nodelist=n1,n2", "--ntasks-per-node=2", "--label"]
    assert sorted(cluster.run([*two, "hostname"]).stdout.splitlines()) == ["0: n1", "1: n1", "2: n2", "3: n2"]
    addresses = cluster.run([*two, "getent", "hosts", "n1", "n2"]).stdout
    assert addresses.count(cluster.site.address("n1")) == addresses.count(cluster.site.address("n2")) == 4


def test_what_never_comes_is_reported_with_the_logs(cluster: Cluster) -> None:
    job = cluster.sbatch("--nodelist=n3", "--wrap", "echo my own log; sleep 60")
    cluster.wait_until(lambda: cluster.processes("^sleep 60$"), "the job's process", job_id=job)
    with pytest.raises(ClusterError, match=r"(?s)not there: job \d+ in FAILED.*JobState.*my own log"):
        cluster.wait_for(job, ["FAILED"], timeout=0)
    cluster.cancel(job)
    assert cluster.wait_for(job)["JobState"] == "CANCELLED"
    assert not cluster.processes("^sleep 60$")


def test_nodes_fail_and_come_back(cluster: Cluster) -> None:
    job = cluster.sbatch("--nodelist=n6,n7,n8", "--wrap", "srun --ntasks-per-node=1 sleep 70")

    def sleepers() -> set[str]:
        return {process.node for process in cluster.processes("^(/usr)?/bin/sleep 70$")}

    def reaches(node: str) -> bool:
        return cluster.run(["bash", "-c", f": </dev/tcp/{node}/17001"], check=False, timeout=2).returncode == 0

    cluster.wait_until(lambda: sleepers() == {"n6", "n7", "n8"}, "a process on each node", job_id=job)
    cluster.kill_slurmd("n6")
    cluster.power_off("n7")
    cluster.cut_off("n8")
    assert sleepers() == {"n6", "n8"}, "slurmd's death and a cut link leave the tasks, a power failure does not"
    assert not reaches("n6") and not reaches("n7") and not reaches("n8") and reaches("n5")
    cluster.cancel(job)
    cluster.start_slurmd("n6")
    cluster.power_on("n7")
    cluster.join("n8")
    cluster.wait_for_nodes(["n6", "n7", "n8"], "idle")
    assert not sleepers()


def test_rate_of_a_link(cluster: Cluster) -> None:
    """5 MB to another host: 0.4 s at 100 Mbit/s, of which 256 kB go at once."""
    receive = "import socket,sys; c,_=socket.create_server(('', 21001)).accept(); sys.stdout.write('x'); c.makefile('rb').read()"
    send = (
        "import socket,time; start=time.time(); s=socket.create_connection(('n4', 21001)); s.sendall(bytes(5_000_000));"
        "s.shutdown(1); s.recv(1); print(time.time()-start)"
    )
    cluster.limit_rate("n4", "100mbit")
    job = cluster.sbatch("--nodelist=n4", "--wrap", f'{sys.executable} -c "{receive}"')
    cluster.wait_until(lambda: cluster.processes(r"^\S*python\S* -c import socket,sys"), "the receiver", job_id=job)
    seconds = float(cluster.run(["srun", "--nodelist=n5", sys.executable, "-c", send]).stdout)
    assert 0.3 < seconds < 5


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_training(
    launcher: str, cluster: Cluster, desk: Path, undisturbed: Callable[..., list[tuple[int, float]]]
) -> None:
    run_dir = desk / "runs" / launcher
    nodes = ["srun", "--nodelist=n1,n2"]
    if launcher == "srun":
        command = [*nodes, "--ntasks-per-node=2", sys.executable, *TRAIN, f"run.dir={run_dir}"]
    else:
        agent = (
            f'exec "$0" -m torch.distributed.run --nnodes=2 --nproc-per-node=2 --node-rank="$SLURM_NODEID" '
            f'--master-addr={MEETING["MASTER_ADDR"]} --master-port={MEETING["MASTER_PORT"]} "$@"'
        )
        command = [*nodes, "--ntasks-per-node=1", "bash", "-c", agent, sys.executable, *TRAIN, f"run.dir={run_dir}"]
    cluster.run(command, cwd=desk, env=MEETING)
    assert [step for step, _ in curve(run_dir)] == list(range(1, STEPS + 1))
    assert curve(run_dir) == undisturbed(*TP2_PP2)
