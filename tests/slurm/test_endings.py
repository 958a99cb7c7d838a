"""Every way in which a submitted training can end or be interrupted, on a real cluster: whether it starts again, and
that the losses of all its starts together are those of a run that nothing disturbed, to the last bit.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster, Process
from submission import LIME_DIST, RANK, Submission
from training import PP3, STEPS, TP2_PP2, steps_done, write_training

from lime_dist.lifecycle.ending import NEVER_RESTART, REQUEUE

# On a busy machine; an idle one needs under a minute for each.
pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]
Curve = list[tuple[int, float]]
PERIODIC = (
    10,
    20,
)  # the newest checkpoint of a run that breaks behind step 13, or behind 20 on a machine that is slow to tell


@pytest.fixture
def new_run(
    cluster: Cluster, desk: Path, undisturbed: Callable[..., Curve], request: pytest.FixtureRequest
) -> Iterator[Callable[..., Submission]]:
    """Makes a run with a folder named after the test. The undisturbed run, which it is compared with, comes first."""
    undisturbed(*TP2_PP2)
    made = []

    def make(name: str = "") -> Submission:
        made.append(Submission(cluster, desk, request.node.name.replace("test_", "") + name))
        return made[-1]

    yield make
    cluster.run(["scancel", "--user=root"])


@pytest.fixture
def run(new_run: Callable[..., Submission]) -> Submission:
    return new_run()


@pytest.fixture
def finishes(undisturbed: Callable[..., Curve]) -> Callable[..., None]:
    """Checks that the job ends well and that its losses are the undisturbed run's, each step once."""

    def check(run: Submission, *overrides: str) -> None:
        job = run.ended()
        assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), run.log
        assert run.curve == undisturbed(*(overrides or TP2_PP2))
        assert (run.saved_step, run.decisions[-1]) == (STEPS, "finished")

    return check


# ---- undisturbed


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_finishes(launcher: str, run: Submission, finishes: Callable[..., None]) -> None:
    run.submit(launcher=launcher, preflight=True)
    finishes(run)
    assert [event.event for event in run.history] == ["submitted", "start", "end"]
    assert run.outcome() == (0, f"step {STEPS} of {STEPS}")
    assert run.cluster.job(run.job)["Restarts"] == "0"


def test_three_stages_on_three_nodes(run: Submission, finishes: Callable[..., None]) -> None:
    run.submit(*PP3, nodes=3, tasks_per_node=1)
    finishes(run, *PP3)


# ---- asked to stop: a checkpoint, and on from there


@pytest.mark.parametrize("warned", [True, False])
def test_time_limit(warned: bool, run: Submission, finishes: Callable[..., None]) -> None:
    """SLURM's clock ticks every 30 s. With the limit 35 s ahead the script's signal comes a tick before TERM, within a
    long step; with 1 s both come at once, and the ranks still save."""
    run.submit(stop_lead_seconds=20)
    run.reach(5)
    update_job(run, f"EndTime=now+{35 if warned else 1}")
    long_step(run, until="asked to stop" if warned else "TERM from SLURM: time limit")
    run.pending()
    update_job(run, "TimeLimit=10")  # the shorter one would hold for the next start too
    finishes(run)
    assert run.decisions == ["requeued", "finished"]
    assert run.events("start")[1].step == stopped_at(run)


def test_limit_shortened_below_the_lead(run: Submission, finishes: Callable[..., None]) -> None:
    """During preflight, and for the next start, whose limit is less than the lead that was submitted: it makes some steps all
    the same. The one that made none is not held against the run."""
    run.submit(stop_lead_seconds=599, preflight=True, max_starts_without_progress=1)
    checks = run.cluster.wait_until(lambda: run.checks()[3:] and run.checks(), "preflight", job_id=run.job)
    send(checks, signal.SIGSTOP)
    update_job(run, "TimeLimit=2")  # minutes; a busy machine needs one to start the ranks
    run.cluster.wait_until(lambda: "asked to stop" in run.log, "asked to stop", job_id=run.job, timeout=150)
    send(checks, signal.SIGCONT)
    run.cluster.wait_until(lambda: len(run.decisions) == 2, "the second start's end", job_id=run.job, timeout=300)
    if run.decisions[1] == "requeued":
        update_job(run, "TimeLimit=10")
    finishes(run)
    first, *later = run.events("end")
    assert first.detail.endswith(", no step begun -> requeued") and first.step == 0
    assert all(event.detail.startswith(("75 SIGUSR1 at step ", "0 ")) for event in later), later
    starts = [event.step for event in run.events("start")]
    assert starts[:2] == [0, 0] and sorted(set(starts[1:])) == starts[1:]


def long_step(run: Submission, until: str) -> None:
    """Hold all ranks, as a step of minutes would, until the script has said something."""
    ranks = run.ranks()
    assert len(ranks) == 4
    send(ranks, signal.SIGSTOP)
    run.cluster.wait_until(lambda: until in run.log, until, job_id=run.job, timeout=90)
    send(ranks, signal.SIGCONT)


def send(ranks: list[Process], number: signal.Signals) -> None:
    for rank in ranks:
        os.kill(rank.pid, number)


def update_job(run: Submission, change: str) -> None:
    run.cluster.run(["scontrol", "update", f"JobId={run.job}", change])


def stopped_at(run: Submission, restart: int = 0) -> int:
    """The step of the outcome, which must be that of a stop on request."""
    code, reason = run.outcome(restart)
    assert code == REQUEUE, reason
    return int(reason.split(" at step ")[1].split()[0])


def test_cancelled_and_submitted_again(run: Submission, finishes: Callable[..., None]) -> None:
    run.submit()
    run.reach(13)
    run.cluster.cancel(run.job)
    assert run.ended()["JobState"] == "CANCELLED"
    assert run.decisions == ["cancelled"] and run.saved_step == steps_done(run.dir) == stopped_at(run) >= 13
    first = run.job
    run.submit()
    finishes(run)
    assert run.cluster.state(first) == "CANCELLED"
    assert [event.restart for event in run.events("start")] == ["0", "0"]


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_requeued_by_the_administrator(launcher: str, run: Submission, finishes: Callable[..., None]) -> None:
    run.submit(launcher=launcher)
    run.reach(13)
    run.cluster.run(["scontrol", "requeue", str(run.job)])
    run.hurry()
    finishes(run)
    assert run.events("start")[1].step == stopped_at(run) >= 13


def test_preempted(run: Submission, finishes: Callable[..., None]) -> None:
    run.submit()
    run.reach(13)
    nodes = ",".join(run.nodes)
    urgent = run.cluster.sbatch("--partition=high", f"--nodelist={nodes}", "--exclusive", "--wrap", "srun hostname")
    run.hurry()
    assert run.cluster.wait_for(urgent)["JobState"] == "COMPLETED"
    finishes(run)
    assert run.events("start")[1].step == stopped_at(run) >= 13


def test_chain(run: Submission, finishes: Callable[..., None]) -> None:
    """Where requeueing is forbidden a successor waits from the start; it runs only if this job ends badly."""
    run.submit(requeue="chain")
    run.reach(13)
    first = run.job
    run.cluster.run(["scancel", "--batch", "--signal=USR1", str(first)])
    ended = run.ended()
    assert (ended["JobState"], ended["Requeue"], ended["Restarts"]) == ("FAILED", "0", "0")
    stopped = stopped_at(run)
    run.job = int(run.cluster.wait_until(lambda: [e.job for e in run.events("start")][1:], "the successor")[0])
    assert run.job != first
    finishes(run)
    assert run.decisions == ["chained", "finished"]
    assert run.events("start")[1].step == stopped >= 13
    assert_queue_empties(run)


def test_chain_cancelled(run: Submission) -> None:
    run.submit(requeue="chain")
    run.reach(13)
    run.cluster.cancel(run.job)
    assert run.ended()["JobState"] == "CANCELLED"
    assert_queue_empties(run)
    assert run.decisions == ["cancelled"] and run.saved_step == stopped_at(run)


def test_chain_loses_its_first_node(run: Submission, finishes: Callable[..., None]) -> None:
    """The script dies with the node and decides nothing: SLURM ends the job, and so lets the successor begin."""
    run.submit(requeue="chain")
    run.reach(13)
    first, lost = run.job, run.nodes[0]
    run.cluster.power_off(lost)
    assert run.ended()["JobState"] == "NODE_FAIL"
    run.job = int(run.cluster.wait_until(lambda: [e.job for e in run.events("start")][1:], "the successor")[0])
    assert run.job != first and lost not in run.nodes
    finishes(run)
    assert run.events("start")[1].step in PERIODIC
    assert_queue_empties(run)
    run.cluster.power_on(lost)
    run.cluster.wait_for_nodes([lost], "idle")


def assert_queue_empties(run: Submission) -> None:
    """No successor is left waiting."""
    run.cluster.wait_until(lambda: not run.cluster.run(["squeue", "--noheader"]).stdout, "an empty queue", timeout=30)
    assert len(run.events("start")) <= 2


# ---- things that break: on from the newest checkpoint


def test_killed_rank(run: Submission, finishes: Callable[..., None]) -> None:
    run.submit()
    run.reach(13)
    killed = run.nodes[1]
    run.ranks()[2].kill()
    finishes(run)
    assert run.decisions == ["requeued", "finished"]
    assert re.fullmatch(rf"\d+ rank [23] on {killed}: Killed; .* -> requeued", run.events("end")[0].detail)
    status = run.cluster.run([*LIME_DIST, "status", str(run.dir)]).stdout
    assert f"on {killed}: Killed; " in status
    assert run.events("start")[1].step in PERIODIC


def test_lost_nodes(new_run: Callable[..., Submission], finishes: Callable[..., None]) -> None:
    """Three jobs lose a node each, in three ways. SLURM declares the nodes down and starts the jobs again elsewhere."""
    slurmd_dies, power_fails, cut_off = runs = [new_run(name) for name in ("_slurmd", "_power", "_cut_off")]
    cluster = slurmd_dies.cluster
    lost = [lose(slurmd_dies, 1, cluster.kill_slurmd)]
    held = slurmd_dies.ranks()
    send(held, signal.SIGSTOP)  # a long step: without slurmd a job goes on, and could be through before it is missed
    lost += [lose(power_fails, 0, cluster.power_off), lose(cut_off, 0, cluster.cut_off)]
    orphans = [rank for rank in held + cut_off.ranks() if rank.node in lost]
    assert len(orphans) == 4
    for run in runs:
        run.hurry()
    for run in (slurmd_dies, cut_off):
        cluster.wait_until(lambda run=run: steps_done(run.dir) >= 25, "the second start's steps", job_id=run.job)
    # While the second starts run, ranks and script of the first ones awake again.
    cluster.join(lost[2])
    send([rank for rank in orphans if rank.node == lost[0]], signal.SIGCONT)
    for run in runs:
        finishes(run)
        starts = [event.step for event in run.events("start")]
        assert starts[0] == 0 and starts[1] in PERIODIC and cluster.job(run.job)["Restarts"] == str(len(starts) - 1)
        # When the first start's srun is back and has lost a rank, it may end the second start's step, which SLURM gave
        # the same number. The ranks save, and a third start goes on.
        assert len(starts) == 2 or (run is cut_off and len(starts) == 3 and stopped_at(run, 1) == starts[2])
        second = cluster.run(["scontrol", "show", "hostnames", run.events("start")[1].detail]).stdout.split()
        assert not set(second) & set(lost)
    cluster.start_slurmd(lost[0])
    cluster.power_on(lost[1])
    cluster.wait_for_nodes(lost, "idle")
    assert not {rank.pid for rank in orphans} & {process.pid for process in cluster.processes(RANK)}


def lose(run: Submission, index: int, fail: Callable[[str], None]) -> str:
    """Submit, and let the job's node of this index fail in the middle of the run; its name."""
    run.submit()
    run.reach(13)
    node = run.nodes[index]
    fail(node)
    return node


def test_bad_host_is_left_out(run: Submission, desk: Path, finishes: Callable[..., None]) -> None:
    """One node cannot write where the others do. Preflight names it, and the job starts again without it."""
    runs = desk / "runs"
    runs.mkdir(exist_ok=True)
    idle = run.cluster.run(["sinfo", "--noheader", "--Node", "--states=idle", "--partition=low", "--format=%N"]).stdout
    good, bad = idle.split()[:2]
    run.cluster.make_read_only(bad, runs)
    try:
        run.submit(preflight=True, sbatch_flags=["--hold"])
        run.cluster.run(["scontrol", "update", f"JobId={run.job}", f"ReqNodeList={good},{bad}"])
        run.cluster.run(["scontrol", "release", str(run.job)])
        run.cluster.wait_until(lambda: run.decisions, "the end of the first start", job_id=run.job)
        run.cluster.run(["scontrol", "update", f"JobId={run.job}", "ReqNodeList="])
        finishes(run)
        assert bad not in run.nodes
    finally:
        run.cluster.make_writable(bad, runs)
    assert f"lime-dist: host {bad} is bad: run.dir {run.dir} " in run.log
    assert (run.dir / "slurm" / "exclude").read_text() == f"{bad}\n"
    assert run.decisions == ["requeued", "finished"] and run.events("start")[1].step == 0


# ---- things that would end the same way again


def test_user_error_is_not_tried_again(run: Submission, desk: Path) -> None:
    """The token file goes between the submission, which has seen it, and the start."""
    write_training(desk / "gone")
    run.submit(*TP2_PP2, "data.train=gone/train", sbatch_flags=["--hold"])
    shutil.rmtree(desk / "gone")
    run.cluster.run(["scontrol", "release", str(run.job)])
    job = run.ended()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")
    assert run.decisions == ["failed"]
    code, reason = run.outcome()
    assert code == NEVER_RESTART and reason.startswith("data.train: ")


def test_no_progress_gives_up(run: Submission, desk: Path) -> None:
    broken = desk / "broken python"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    run.submit(python=str(broken), max_starts_without_progress=2)
    job = run.ended()
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0")
    assert run.decisions == ["requeued", "requeued", "gave-up"]
