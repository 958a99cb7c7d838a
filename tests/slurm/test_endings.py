"""Every way in which a submitted training can end or be interrupted, on a real cluster: whether it starts again, and
that the losses of all its starts together are those of a run that nothing disturbed, to the last bit.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster, Process
from submission import Submission
from training import PP3, STEPS, TP2_PP2, steps_done, write_training

from lime_dist.ending import NEVER_RESTART, REQUEUE

pytestmark = pytest.mark.timeout(900)  # on a busy machine; an idle one needs under a minute for each
Curve = list[tuple[int, float]]


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


def test_time_limit(run: Submission, finishes: Callable[..., None]) -> None:
    """The true clock. A step is so long that the signal ahead of the limit comes within it."""
    run.submit(time="00:01:00", stop_lead_seconds=20)
    run.reach(5)
    long_step(run, until=lambda: "USR1" in run.log)
    finishes(run)
    assert run.decisions == ["requeued", "finished"]
    assert run.events("start")[1].step == run.events("end")[0].step == stopped_at(run)


def test_time_limit_without_warning(run: Submission, finishes: Callable[..., None]) -> None:
    """TERM and the limit in one: the ranks still save, and the script requeues the job itself."""
    run.submit()
    run.reach(5)
    long_step(run, until=lambda: update_job(run, "EndTime=now+1") or "TERM" in run.log)
    finishes(run)
    assert run.decisions == ["requeued", "finished"]
    assert run.events("start")[1].step == stopped_at(run)


def long_step(run: Submission, until: Callable[[], object]) -> None:
    """Hold all ranks, as a step of minutes would, until something is there."""
    ranks = run.ranks()
    assert len(ranks) == 4
    send(ranks, signal.SIGSTOP)
    run.cluster.wait_until(until, "the end of the long step", job_id=run.job, timeout=90)
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


def test_requeued_by_the_administrator(run: Submission, finishes: Callable[..., None]) -> None:
    run.submit()
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


def assert_queue_empties(run: Submission) -> None:
    """No successor is left waiting."""
    run.cluster.wait_until(lambda: not run.cluster.run(["squeue", "--noheader"]).stdout, "an empty queue", timeout=30)
    assert len(run.events("start")) <= 2


# ---- things that break: on from the newest checkpoint


def test_killed_rank(run: Submission, finishes: Callable[..., None]) -> None:
    run.submit()
    run.reach(13)
    run.ranks()[2].kill()
    finishes(run)
    assert run.decisions == ["requeued", "finished"]
    assert run.events("start")[1].step == 10


def test_lost_nodes(new_run: Callable[..., Submission], finishes: Callable[..., None]) -> None:
    """Three jobs lose a node each, in three ways. SLURM declares the nodes down and starts the jobs again elsewhere."""
    slurmd_dies, power_fails, cut_off = runs = [new_run(name) for name in ("_slurmd", "_power", "_cut_off")]
    cluster = slurmd_dies.cluster
    lost = [lose(slurmd_dies, 1, cluster.kill_slurmd), lose(power_fails, 0, cluster.power_off)]
    lost.append(lose(cut_off, 0, cluster.cut_off))
    orphans = [process for process in cut_off.ranks() if process.node == lost[2]]
    assert orphans
    for run in runs:
        run.hurry()
    cluster.wait_until(lambda: steps_done(cut_off.dir) >= 25, "the run that was cut off goes on", job_id=cut_off.job)
    cluster.join(lost[2])  # the ranks and the script of the first start see the cluster again, while the second runs
    for run in runs:
        finishes(run)
        assert run.events("start")[1].step == 10
        assert not set(run.nodes) & set(lost)
        assert cluster.job(run.job)["Restarts"] == "1"
    cluster.start_slurmd(lost[0])
    cluster.power_on(lost[1])
    cluster.wait_for_nodes(lost, "idle")
    assert not {process.pid for process in orphans} & {process.pid for process in cluster.processes("")}


def lose(run: Submission, index: int, fail: Callable[[str], None]) -> str:
    """Submit, and let the job's node of this index fail in the middle of the run; its name."""
    run.submit()
    run.reach(13)
    node = run.nodes[index]
    fail(node)
    return node


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
