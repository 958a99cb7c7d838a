"""What SLURM's commands answer, in the words of SLURM 22.05, and when they are absent, refuse or hang."""

from __future__ import annotations

from pathlib import Path

import pytest

from lime_dist.cluster import queue
from lime_dist.cluster.queue import Job, find_job, parse_duration

SCONTROL = (
    "JobId=44 JobName=wrap UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=4294901734 Nice=0 Account=(null) "
    "QOS=(null) JobState=CANCELLED Reason=None Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:15 "
    "RunTime=00:00:00 TimeLimit=00:10:00 Partition=low ReqNodeList=(null) ExcNodeList=(null) NodeList=n[1-2] BatchHost=n1 "
)
SQUEUE_REFUSES = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
SACCT_REFUSES = "echo 'Slurm accounting storage is disabled' >&2; exit 1"


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH but the shell's own tools."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name in ("squeue", "sacct", "scontrol"):
        answer(tmp_path, name, "exit 1")
    return tmp_path


def answer(folder: Path, name: str, script: str) -> None:
    """A command that notes its arguments."""
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "$0 $@" | sed "s|.*/||" >>{folder}/asked\n{script}\n')
    path.chmod(0o755)


ANSWERS = [
    ("RUNNING|n[1-2]|10:00|None", Job(job_id="44", state="RUNNING", nodes="n[1-2]", seconds_left=600)),
    ("PENDING||1:00:00|JobHeldUser", Job(job_id="44", state="PENDING", reason="JobHeldUser", seconds_left=3600)),
    ("PENDING||UNLIMITED|(a|b)", Job(job_id="44", state="PENDING", reason="(a|b)")),
]


@pytest.mark.parametrize(("line", "job"), ANSWERS)
def test_a_job_in_the_queue(line: str, job: Job, commands: Path) -> None:
    answer(commands, "squeue", f"echo '{line}'")
    assert find_job("44") == job
    assert (commands / "asked").read_text() == "squeue -h -j 44 -o %T|%N|%L|%r\n"


def test_a_job_that_has_left_the_queue_is_in_the_accounting(commands: Path) -> None:
    answer(commands, "squeue", "")  # an empty answer, as of a job that ended a moment ago
    answer(commands, "sacct", "echo 'CANCELLED by 0|n[1-2]'")
    assert find_job("44") == Job(job_id="44", state="CANCELLED", reason="by 0", nodes="n[1-2]")


def test_without_accounting_the_controller_remembers(commands: Path) -> None:
    answer(commands, "squeue", SQUEUE_REFUSES)
    answer(commands, "sacct", SACCT_REFUSES)
    answer(commands, "scontrol", f"echo '{SCONTROL}'")
    assert find_job("44") == Job(job_id="44", state="CANCELLED", nodes="n[1-2]")
    assert [line.split()[0] for line in (commands / "asked").read_text().splitlines()] == [
        "squeue",
        "sacct",
        "scontrol",
    ]


def test_a_job_that_nobody_knows(commands: Path) -> None:
    assert find_job("44") is None


def test_where_there_is_no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_job("44") is None


def test_a_controller_that_does_not_answer(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "_ANSWER_SECONDS", 0.1)
    answer(commands, "squeue", "exec sleep 60")
    answer(commands, "sacct", "echo 'COMPLETED|n1'")
    assert find_job("44").state == "COMPLETED"


@pytest.mark.parametrize(("state", "running", "over"), [("RUNNING", True, False), ("PENDING", False, False), ("NODE_FAIL", False, True)])  # fmt: skip
def test_states(state: str, running: bool, over: bool) -> None:
    job = Job(job_id="1", state=state)
    assert (job.is_running, job.is_over) == (running, over)


DURATIONS = [("0:42", 42), ("12:34", 754), ("2:03:04", 7384), ("1-02:03:04", 93784), ("UNLIMITED", None), ("NOT_SET", None), ("", None)]  # fmt: skip


@pytest.mark.parametrize(("text", "seconds"), DURATIONS)
def test_durations(text: str, seconds: int | None) -> None:
    assert parse_duration(text) == seconds
