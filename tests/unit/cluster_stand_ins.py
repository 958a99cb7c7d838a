"""SLURM's clients as tiny executables that record how they were called, for running a rendered script in real bash; and
`beat STEP`, the heartbeats of the four ranks of a run called `run`."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from lime_dist.cluster.schema import ClusterConfig
from lime_dist.cluster.script import Submission, render_script

RECORD = """#!/bin/bash
{ flock 9; printf '%s\\0' "${0##*/}" "$@" $'\\n' >&9; } 9>>"$RECORD"
"""
CLIENTS = {
    # SRUN: what the ranks do, as bash
    "srun": 'if [[ " $* " = *" preflight "* ]]; then exit "${PREFLIGHT_CODE:-0}"; fi; eval "$SRUN"',
    "sbatch": 'echo "${SBATCH_ANSWER-43}"; exit "${SBATCH_CODE:-0}"',
    "scancel": "",
    "squeue": 'printf "%s" "${SQUEUE_ANSWER:-}"',
    "beat": """mkdir -p run/heartbeat; for rank in 0 1 2 3; do echo "{\\"step\\": $1}" >"run/heartbeat/rank_0000$rank.json"; done""",
    "scontrol": """case "$1 $2" in
  "show hostnames") printf 'n1\\nn2\\n' ;;
  "show job") echo "JobId=$3 JobName=x JobState=${STATE:-RUNNING} Requeue=1 Restarts=0 ${JOB:-Reason=None PreemptTime=None}" ;;
  requeue*) exit "${REQUEUE_CODE:-0}" ;;
esac""",
}


@dataclass(frozen=True)
class Ended:
    code: int
    text: str  # stdout and stderr
    calls: list[list[str]]  # of the clients, in order

    def called(self, name: str, *first: str) -> list[list[str]]:
        """Arguments of each call of a client, of those that begin with `first`."""
        return [call[1:] for call in self.calls if call[0] == name and tuple(call[1 : 1 + len(first)]) == first]


class Bash:
    """Runs scripts in a folder with the clients first on PATH."""

    def __init__(self, folder: Path):
        self.folder, self._record = folder, folder / "record"
        self.environment = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "RECORD": str(self._record),
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_NNODES": "2",
            "SRUN": "exit 0",
        }
        (folder / "bin").mkdir()
        for name, text in CLIENTS.items():
            self.add_client(name, text)

    def add_client(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"{RECORD}{text}\n")
        path.chmod(0o755)

    def run(self, script: Path, *arguments: str, **environment: str) -> Ended:
        return self.finish(self.start(script, *arguments, **environment))

    def start(self, script: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        self._record.write_text("")
        return subprocess.Popen(
            ["bash", str(script), *arguments],
            env=self.environment | environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def finish(self, process: subprocess.Popen[str]) -> Ended:
        try:
            text, _ = process.communicate(timeout=60)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # what a test leaves behind would run for ever
            raise
        calls = [call.split("\0")[:-1] for call in self._record.read_text().split("\n\0")]
        return Ended(process.returncode, text, [call for call in calls if call])

    def interrupt(self, process: subprocess.Popen[str], number: signal.Signals, ready: Path) -> Ended:
        """Signal the script as soon as its ranks have made `ready`."""
        wait_for(ready)
        process.send_signal(number)
        return self.finish(process)


def wait_for(path: Path, timeout_seconds: float = 30) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


class Run:
    """A run's folder with a rendered script in it, as `lime-dist submit` leaves it."""

    def __init__(self, bash: Bash, cluster: ClusterConfig, name: str = "run"):
        self.bash = bash
        self.submission = Submission(
            run_dir=bash.folder / name, folder=bash.folder, python="python", stop_lead_seconds=60
        )
        text = render_script(cluster, self.submission)
        folder = self.submission.slurm_dir
        (folder / "logs").mkdir(parents=True)
        (folder / "outcomes").mkdir()
        self.script = self.submission.script
        self.script.write_text(text, encoding="utf-8")
        self.add_history("submitted", restart="-")

    def add_history(self, event: str, step: int = 0, restart: str = "0", detail: str = "") -> None:
        with self.submission.history.open("a") as file:
            file.write(f"2026-01-31T12:00:00Z\t42\t{restart}\t{event}\t{step}\t{detail}\n")

    def add_checkpoint(self, step: int, complete: bool = True) -> None:
        folder = self.submission.run_dir / "checkpoints" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        if complete:
            (folder / "meta.json").write_text("{}")

    def history(self) -> list[list[str]]:
        """[event, restart, step, detail] of each line."""
        lines = [line.split("\t") for line in self.submission.history.read_text().splitlines()]
        return [[event, restart, step, detail] for _, _, restart, event, step, detail in lines]

    def start(self, *arguments: str, **environment: str) -> Ended:
        return self.bash.run(self.script, *arguments, **environment)
