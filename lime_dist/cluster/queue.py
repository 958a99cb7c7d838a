"""What SLURM says of a job. A command that is absent or does not answer in time is as one that does not know the job. No torch."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

_ANSWER_SECONDS = 10
_RUNNING = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")


@dataclass(frozen=True, kw_only=True)
class Job:
    job_id: str
    state: str  # SLURM's word: PENDING, RUNNING, COMPLETED, CANCELLED, TIMEOUT ...
    reason: str | None = None  # why it waits or was ended
    nodes: str | None = None
    seconds_left: int | None = None  # to the time limit

    @property
    def is_running(self) -> bool:
        return self.state in _RUNNING

    @property
    def is_over(self) -> bool:
        return self.state not in _RUNNING + _WAITING


def find_job(job_id: str) -> Job | None:
    """From the queue, the accounting, or what the controller still remembers; None where none of them knows the job."""
    answers = (ask(job_id) for ask in (_squeue, _sacct, _scontrol))
    return next((job for job in answers if job is not None), None)


def _squeue(job_id: str) -> Job | None:
    line = _first_line(["squeue", "-h", "-j", job_id, "-o", "%T|%N|%L|%r"])
    if line is None or line.count("|") < 3:
        return None
    state, nodes, left, reason = line.split("|", 3)
    return Job(
        job_id=job_id, state=state, reason=_known(reason), nodes=_known(nodes), seconds_left=parse_duration(left)
    )


def _sacct(job_id: str) -> Job | None:
    line = _first_line(["sacct", "-X", "-n", "-P", "-j", job_id, "-o", "State,NodeList"])
    if line is None or "|" not in line:
        return None
    state, nodes = line.split("|", 1)
    word, *by_whom = state.split(" ", 1)  # `CANCELLED by 0`
    return Job(job_id=job_id, state=word, reason=by_whom[0] if by_whom else None, nodes=_known(nodes))


def _scontrol(job_id: str) -> Job | None:
    line = _first_line(["scontrol", "show", "job", "-o", job_id])
    fields = dict(re.findall(r"(?:^| )(JobState|Reason|NodeList)=(\S*)", line or ""))
    if "JobState" not in fields:
        return None
    return Job(
        job_id=job_id,
        state=fields["JobState"],
        reason=_known(fields.get("Reason", "")),
        nodes=_known(fields.get("NodeList", "")),
    )


def _first_line(command: Sequence[str]) -> str | None:
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.strip().splitlines()
    return lines[0].strip() if answer.returncode == 0 and lines else None


def _known(text: str) -> str | None:
    return None if text in ("", "None", "(null)", "None assigned", "N/A", "n/a") else text


def parse_duration(text: str) -> int | None:
    """Seconds of SLURM's `[days-][[hours:]minutes:]seconds`; None of UNLIMITED and the like."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", text.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
