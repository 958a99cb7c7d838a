"""The rendered script in real bash: what it decides at each end, its bounds, its signals. SLURM's clients stand in."""

from __future__ import annotations

import signal
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cluster_stand_ins import Bash, Run, wait_for

from lime_dist.cluster.schema import ClusterConfig

CLUSTER = {"nodes": 2, "tasks_per_node": 2, "time": "01:00:00", "preflight": False, "stop_lead_seconds": 60}
REQUEUE = ["requeue", "42"]
CUT_OFF = "no step begun"


@pytest.fixture
def bash(tmp_path: Path) -> Bash:
    return Bash(tmp_path)


def make_run(bash: Bash, **keys: object) -> Run:
    return Run(bash, ClusterConfig(**(CLUSTER | keys)))


@pytest.mark.parametrize("mode", ["requeue", "chain", "never"])
@pytest.mark.parametrize("code", [0, 2, 75, 1, 137])
def test_decision(bash: Bash, mode: str, code: int) -> None:
    run = make_run(bash, requeue=mode)
    ended = run.start(SRUN=f"exit {code}")
    again = {"requeue": "requeued", "chain": "chained", "never": "failed"}[mode]
    decision = {0: "finished", 2: "failed"}.get(code, again)
    assert ended.code == code, ended.text
    start, *queued, end = run.history()[1:]
    assert start == ["start", "0", "0", "n[1-2]"]
    assert queued == ([["successor", "0", "0", "43"]] if mode == "chain" else [])
    reason = f"asked to stop, {CUT_OFF}" if code == 75 else f"exit code {code}"
    assert end == ["end", "0", "0", f"{code} {reason} -> {decision}"]
    assert ended.called("scontrol", "requeue") == ([REQUEUE] if decision == "requeued" else [])
    assert ended.called("scancel") == ([["--state=PENDING", "43"]] if mode == "chain" and code == 2 else [])
    assert len(ended.called("sbatch")) == (mode == "chain")


def test_outcome_is_believed_rather_than_the_launcher(bash: Bash) -> None:
    run = make_run(bash)
    ended = run.start(SRUN='beat 7; echo "75 SIGUSR1 at step 7" >"$LIME_DIST_OUTCOME_FILE"; exit 137')
    assert ended.code == 75
    assert run.history()[-1][-1] == "75 SIGUSR1 at step 7 -> requeued"
    assert (run.submission.slurm_dir / "outcomes" / "42.0").read_text() == "75 SIGUSR1 at step 7\n"


def test_requeue_starts_soon_and_without_bad_hosts(bash: Bash) -> None:
    run = make_run(bash)
    (run.submission.slurm_dir / "exclude").write_text("n7\nn2\nno;host\nn7\n")
    updates = run.start(SRUN="exit 1").called("scontrol", "update")
    assert updates == [["update", "JobId=42", "ExcNodeList=n2,n7"], ["update", "JobId=42", "StartTime=now+10"]]


def test_requeue_refused(bash: Bash) -> None:
    run = make_run(bash)
    bash.add_client("sleep", "")
    ended = run.start(SRUN="exit 75", REQUEUE_CODE="1")
    assert len(ended.called("scontrol", "requeue")) == 6, "a controller that is just starting refuses as well"
    assert ended.code == 75 and "scontrol requeue was refused" in ended.text
    assert run.history()[-1][-1].endswith("-> failed")


def test_lost_start_leaves_the_next_one_alone(bash: Bash) -> None:
    """Its node was cut off: when its ranks fail at last, SLURM has started the job again elsewhere."""
    run = make_run(bash)
    bash.add_client("scontrol", 'case "$1 $2" in "show job") echo "JobId=42 Restarts=2 Reason=None" ;; esac')
    ended = run.start(SRUN="exit 1", SLURM_RESTART_COUNT="1")
    assert run.history()[-1][-1] == "1 exit code 1 -> requeued"
    assert not ended.called("scontrol", "requeue") and not ended.called("scontrol", "update")


def test_cancelled_while_slurm_is_asked(bash: Bash) -> None:
    """A scancel between the end of the ranks and the requeue stays one."""
    run = make_run(bash)
    ended = run.start(SRUN="exit 1", STATE="COMPLETING")
    assert not ended.called("scontrol", "requeue")
    assert run.history()[-1][-1] == "1 exit code 1 -> failed"


def test_no_start_that_nothing_would_count(bash: Bash) -> None:
    run = make_run(bash)
    history = run.submission.history
    history.unlink()
    history.mkdir()  # as a full disk: no line can be added
    ended = run.start(SRUN="touch ran", SLURM_RESTART_COUNT="1")
    assert ended.code == 2 and "history.tsv cannot be written" in ended.text
    assert not ended.called("srun") and not ended.called("scontrol", "requeue")


def test_setup_may_change_the_shells_options(bash: Bash) -> None:
    run = make_run(bash, setup=["set -e", "trap '' TERM USR1"])
    ended = run.start(SRUN="exit 1", POSIXLY_CORRECT="1")
    assert ended.code == 1 and run.history()[-1][-1] == "1 exit code 1 -> requeued"


def test_chain_queues_its_successor_first(bash: Bash) -> None:
    run = make_run(bash, requeue="chain")
    exclude = run.submission.slurm_dir / "exclude"
    exclude.write_text("n9\n")
    ended = run.start(SRUN=f"echo n8 >>{exclude}; exit 1", SBATCH_ANSWER="43;cluster")
    flags = ["--parsable", "--dependency=afternotok:42", "--kill-on-invalid-dep=yes", "--exclude=n9"]
    assert ended.called("sbatch") == [[*flags, str(run.script), "successor"]]
    names = [call[0] for call in ended.calls]
    assert names.index("sbatch") < names.index("srun")
    assert ended.called("scontrol", "update") == [["update", "JobId=43", "ExcNodeList=n8,n9"]]


def test_chain_without_successor(bash: Bash) -> None:
    run = make_run(bash, requeue="chain")
    ended = run.start(SRUN="exit 1", SBATCH_ANSWER="", SBATCH_CODE="1")
    assert ended.code == 1 and run.history()[-1][-1].endswith("-> failed")


@pytest.mark.parametrize("mode", ["requeue", "chain"])
def test_last_restart(bash: Bash, mode: str) -> None:
    """The start after the last allowed restart is not made, and one that comes all the same does nothing."""
    run = make_run(bash, requeue=mode, max_restarts=1)
    run.add_history("start", step=0)
    run.add_checkpoint(5)
    ended = run.start("successor", SRUN="exit 1")
    assert run.history()[-1] == ["end", "1", "5", "1 exit code 1 -> gave-up"]
    assert not ended.called("scontrol", "requeue") and not ended.called("sbatch")
    ended = run.start("successor")
    assert ended.code == 2 and not ended.called("srun")
    assert run.history()[-1] == ["end", "2", "5", "2 max_restarts=1 reached -> gave-up"]


def test_no_progress(bash: Bash) -> None:
    run = make_run(bash, max_starts_without_progress=2)
    run.add_checkpoint(10)
    run.add_checkpoint(20, complete=False)
    run.add_history("start", step=5)
    run.add_history("start", step=10)
    assert run.start().called("srun")  # the second from step 10
    ended = run.start()
    assert ended.code == 2 and not ended.called("srun")
    assert run.history()[-1] == ["end", "3", "10", "2 no progress in 2 starts -> gave-up"]
    run.add_history("submitted", restart="-")  # a new submission counts anew
    assert run.start().code == 0
    assert run.history()[-2][:3] == ["start", "0", "10"]


def test_start_waits_for_the_submission(bash: Bash) -> None:
    """A start that is quicker than submit must not take an earlier submission's starts for its own."""
    run = make_run(bash, max_restarts=1)
    history = run.submission.history
    history.write_text(history.read_text().replace("\t42\t", "\t41\t"))
    for _ in range(5):
        run.add_history("start")
    bash.add_client("sleep", f"printf 't\\t42\\t-\\tsubmitted\\t0\\t\\n' >>{history}")
    assert run.start().code == 0
    assert run.history()[-2][:2] == ["start", "0"]


def test_restart_resumes(bash: Bash) -> None:
    """checkpoint.resume of the config is for the first start; later ones go on from the run's own checkpoints."""
    run = make_run(bash)
    assert not any("checkpoint.resume=auto" in call for call in run.start(SRUN="exit 1").called("srun"))
    assert not any("checkpoint.resume=auto" in call for call in run.start(SRUN="exit 1").called("srun"))
    run.add_checkpoint(3)
    (call,) = run.start().called("srun")
    assert call[-1] == "checkpoint.resume=auto"


@pytest.mark.parametrize(("code", "decision"), [(1, "requeued"), (2, "failed")])
def test_preflight_ends_the_start(bash: Bash, code: int, decision: str) -> None:
    run = make_run(bash, preflight=True)
    ended = run.start(PREFLIGHT_CODE=str(code))
    (call,) = ended.called("srun")
    slurm = run.submission.slurm_dir
    assert call[-5:] == [
        "lime_dist.cli",
        "preflight",
        f"{slurm}/config.yaml",
        "--exclude-file",
        f"{slurm}/exclude",
    ]
    assert ended.code == code and run.history()[-1][-1] == f"{code} preflight -> {decision}"
    assert len(run.start().called("srun")) == 2


def test_outcome_of_the_preflight_is_believed_too(bash: Bash) -> None:
    """srun says 143 of the ranks that it stopped behind the one with the user's mistake."""
    run = make_run(bash, preflight=True)
    bash.add_client("srun", 'echo "2 run.device: no GPU" >"$LIME_DIST_OUTCOME_FILE"; exit 143')
    assert run.start().code == 2
    assert run.history()[-1][-1] == "2 run.device: no GPU -> failed"


def test_ports_and_addresses(bash: Bash) -> None:
    run = make_run(bash)
    tell = 'echo "at $MASTER_ADDR:$MASTER_PORT rank ${RANK-none}" >>ports; exit 1'
    for _ in range(2):
        run.start(SRUN=tell, MASTER_ADDR="stale", RANK="7")
    first, second = (bash.folder / "ports").read_text().splitlines()
    assert first.startswith("at n1:") and first.endswith(" rank none") and first != second
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    port = int(first.split(":")[1].split()[0])
    assert 10000 <= port < 30000 and not low <= port <= high


def test_export_wins(bash: Bash) -> None:
    run = make_run(bash, export={"MASTER_ADDR": "10.0.0.1", "NCCL_DEBUG": "b c"}, environment=["NCCL_DEBUG", "HOME"])
    ended = run.start(SRUN='echo "$MASTER_ADDR/$NCCL_DEBUG" >exported', HOME="/h", UNLISTED="secret")
    assert (bash.folder / "exported").read_text() == "10.0.0.1/b c\n"
    assert "NCCL_DEBUG='b c'" in ended.text and "HOME='/h'" in ended.text and "secret" not in ended.text


def test_failing_module_never_restarts(bash: Bash) -> None:
    run = make_run(bash, modules=["cuda/12"])
    ended = run.start()
    assert ended.code == 2 and not ended.called("srun")
    assert run.history()[-1][-1] == "2 module load cuda/12 failed -> failed"


NAP = "read -rt 0.05 <> <(:)"  # bash's own, so that traps run soon


def test_usr1_reaches_the_ranks(bash: Bash) -> None:
    run = make_run(bash)
    process = bash.start(run.script, SRUN=f"trap 'exit 75' USR1; beat 1; touch ready; while :; do {NAP}; done")
    ended = bash.interrupt(process, signal.SIGUSR1, bash.folder / "ready")
    assert ended.code == 75, ended.text
    assert run.history()[-1][-1] == "75 asked to stop -> requeued"


def test_usr1_waits_until_all_ranks_listen(bash: Bash) -> None:
    """While Python starts it would kill them. A heartbeat of an earlier start is no sign."""
    run = make_run(bash)
    bash.run(bash.folder / "bin" / "beat", "5")
    starting = f"touch ready; for _ in {{1..20}}; do {NAP}; done; trap 'exit 75' USR1; beat 0; while :; do {NAP}; done"
    ended = bash.interrupt(bash.start(run.script, SRUN=starting), signal.SIGUSR1, bash.folder / "ready")
    assert ended.code == 75, ended.text


def test_usr1_in_preflight_ends_the_start_behind_it(bash: Bash) -> None:
    run = make_run(bash, preflight=True)
    bash.add_client("srun", f"touch ready; for _ in {{1..20}}; do {NAP}; done; touch checked")
    ended = bash.interrupt(bash.start(run.script), signal.SIGUSR1, bash.folder / "ready")
    assert (bash.folder / "checked").exists() and len(ended.called("srun")) == 1
    assert ended.code == 75 and run.history()[-1][-1] == f"75 asked to stop, {CUT_OFF} -> requeued"


def test_starts_cut_off_are_no_lack_of_progress(bash: Bash) -> None:
    """They count as restarts only."""
    run = make_run(bash, max_starts_without_progress=2, max_restarts=5)
    for restart, detail in enumerate(
        [f"75 asked to stop, {CUT_OFF}", f"75 time limit, {CUT_OFF}", "1 x", "75 time limit"]
    ):
        assert run.start().called("srun"), detail
        lines = run.submission.history.read_text().splitlines()
        run.submission.history.write_text("\n".join(lines[:-1]) + "\n")
        run.add_history("end", restart=str(restart), detail=f"{detail} -> requeued")
    ended = run.start()
    assert not ended.called("srun")
    assert run.history()[-1] == ["end", "4", "0", "2 no progress in 2 starts -> gave-up"]


@pytest.mark.parametrize("lead", [60, 3599])
def test_the_clock_asks_before_the_limit_of_now(bash: Bash, lead: int) -> None:
    """The limit has been shortened below the lead: training gets two thirds of what is left."""
    run = make_run(bash, stop_lead_seconds=lead)
    ranks = f"trap 'exit 75' USR1; beat 1; while :; do {NAP}; done"
    ended = run.start(SRUN=ranks, SQUEUE_ANSWER=in_seconds(7))
    assert ended.code == 75 and " s are left to the time limit" in ended.text
    assert int(ended.text.split(" s are left")[0].split()[-1]) <= 3
    assert "lime_dist.cluster.lead" not in str(ended.calls)


def test_the_lead_is_measured_anew(bash: Bash) -> None:
    run = make_run(bash, stop_lead_seconds=None)
    bash.add_client("python", "echo 2000")
    ended = run.start(SRUN=f"trap 'exit 75' USR1; beat 1; while :; do {NAP}; done", SQUEUE_ANSWER=in_seconds(7))
    assert ended.code == 75
    assert ended.called("python")[0] == ["-m", "lime_dist.cluster.lead", str(run.submission.run_dir)]


def in_seconds(seconds: float) -> str:
    return (datetime.now() + timedelta(seconds=seconds)).isoformat(timespec="seconds")


def test_a_killed_rank_is_named(bash: Bash) -> None:
    """By srun only; the others know that somebody has gone, and then srun ends them too."""
    run = make_run(bash)
    said = ["error: n1: task 1: Exited with exit code 1", "error: n2: task 3: Killed", "Terminating StepId=42.0",
            "error: n1: task 0: Killed"]  # fmt: skip
    log = run.submission.slurm_dir / "logs" / "42.out"
    log.write_text("srun: error: n9: task 9: Killed\n")  # in an earlier start
    lines = "".join(f"echo 'srun: {line}' >>{log};" for line in said)
    run.start(SRUN=f"{lines} exit 137")
    assert run.history()[-1][-1] == "137 rank 3 on n2: Killed; exit code 137 -> requeued"
    run.start(SRUN=f"{lines} echo '1 rank 0 failed: peer' >\"$LIME_DIST_OUTCOME_FILE\"; exit 137")
    assert run.history()[-1][-1] == "1 rank 3 on n2: Killed; rank 0 failed: peer -> requeued"
    run.start(SRUN=f"echo 'srun: error: n1: task 1: Exited with exit code 1' >>{log}; exit 1")
    assert run.history()[-1][-1] == "1 exit code 1 -> requeued"


# What `scontrol show job` says within the script after TERM, as measured: what follows.
TERMS = {
    "Reason=None PreemptTime=None": ("cancelled", "cancelled", "cancelled"),
    "Reason=TimeLimit PreemptTime=None": ("time limit", "requeued", "chained"),
    "Reason=None Restarts=1 ": ("requeued by SLURM", "requeued", "requeued"),
    "Reason=None PreemptTime=2026-01-31T12:00:00": ("preemption", "requeued", "chained"),
    "Reason=NodeDown PreemptTime=None": ("node failure", "requeued", "chained"),
}


@pytest.mark.parametrize("stepped", [True, False])
@pytest.mark.parametrize("mode", ["requeue", "chain"])
@pytest.mark.parametrize("job", TERMS)
def test_term(bash: Bash, job: str, mode: str, stepped: bool) -> None:
    cause, requeue_decision, chain_decision = TERMS[job]
    decision = requeue_decision if mode == "requeue" else chain_decision
    run = make_run(bash, requeue=mode)
    bash.add_client("srun", f"beat {int(stepped)}; touch ready; while [ ! -e told ]; do {NAP}; done; exit 75")
    restarts = "" if "Restarts" in job else "Restarts=0 "
    bash.add_client("scontrol", f'case "$1 $2" in "show job") echo "JobId=42 {restarts}{job} "; touch told ;; esac')
    ended = bash.interrupt(bash.start(run.script), signal.SIGTERM, bash.folder / "ready")
    assert ended.code == 75, ended.text
    assert run.history()[-1][-1] == f"75 {cause}{'' if stepped else f', {CUT_OFF}'} -> {decision}"
    assert [line[0] for line in run.history()].count("end") == 1
    by_us = decision == "requeued" and cause != "requeued by SLURM"
    assert ended.called("scontrol", "requeue") == ([REQUEUE] if by_us else [])
    assert ended.called("scancel") == ([["--state=PENDING", "43"]] if mode == "chain" and cause == "cancelled" else [])


def test_term_when_slurm_does_not_answer(bash: Bash) -> None:
    """A run that ends unseen costs more than one start too many."""
    run = make_run(bash)
    bash.add_client("srun", f"beat 1; touch ready; while [ ! -e told ]; do {NAP}; done; exit 75")
    bash.add_client("scontrol", 'case "$1 $2" in "show job") touch told; exit 1 ;; esac')
    ended = bash.interrupt(bash.start(run.script), signal.SIGTERM, bash.folder / "ready")
    assert run.history()[-1][-1] == "75 unknown cause -> requeued"
    assert ended.called("scontrol", "requeue") == [REQUEUE]


def test_usr1_before_the_ranks_start(bash: Bash) -> None:
    run = make_run(bash, setup=["touch ready", f"while [ ! -e go ]; do {NAP}; done"])
    process = bash.start(run.script)
    wait_for(bash.folder / "ready")
    process.send_signal(signal.SIGUSR1)
    (bash.folder / "go").touch()
    ended = bash.finish(process)
    assert ended.code == 75 and not ended.called("srun")
    assert run.history()[-1][-1].endswith("-> requeued")


WORKER = """
import signal, pathlib, sys, time
def leave(*_):
    pathlib.Path("told").touch()
    sys.exit(75)
signal.signal(signal.SIGUSR1, leave)
pathlib.Path("ready").touch()
time.sleep(60)
"""


def test_torchrun_hands_usr1_to_the_ranks(bash: Bash) -> None:
    """torchrun itself would die of it: the stand-in for the agent keeps the default action unless it inherits another."""
    run = make_run(bash, launcher="torchrun")
    worker = bash.folder / "worker.py"
    worker.write_text(WORKER)
    bash.add_client("python", f"{sys.executable} {worker} & beat 0; wait $!; exit 1")
    nodes = 'while [[ $1 = --* ]]; do shift; done; export SLURM_NODEID=1; "$@" & trap "kill -USR1 $!" USR1; wait $!; wait $!'
    ended = bash.interrupt(bash.start(run.script, SRUN=nodes), signal.SIGUSR1, bash.folder / "ready")
    assert ended.code == 1, ended.text
    assert (bash.folder / "told").exists()
    (call,) = ended.called("python")
    assert call[:8] == ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--node-rank=1",
                        "--master-addr=n1", call[6], "--max-restarts=0"]  # fmt: skip
    assert call[-4:] == ["-m", "lime_dist.cli", "train", f"{run.submission.slurm_dir}/config.yaml"]
