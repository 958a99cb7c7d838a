"""A training submitted with `lime-dist submit`, as its user sees it: the job, the history, the losses."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml
from cluster import ENDED, Cluster, Process
from training import TP2_PP2, curve, steps_done

from lime_dist.checkpoint.reader import find_latest, read_meta
from lime_dist.lifecycle.ending import read_outcome

LIME_DIST = (sys.executable, "-m", "lime_dist.cli")
SITE = {
    "nodes": 2, "tasks_per_node": 2, "cpus_per_task": 1, "time": "00:10:00", "partition": "low", "gpu_request": "none",
    "preflight": False,  # two of the tests have it on: it costs a start of all ranks
}  # fmt: skip
RANK = r"^\S*python\S* -m lime_dist\.cli train"
CHECK = r"^\S*python\S* -m lime_dist\.cli preflight"


@dataclass(frozen=True)
class Event:
    """A line of history.tsv."""

    time: str
    job: str
    restart: str
    event: str
    step: int
    detail: str

    @classmethod
    def parse(cls, line: str) -> Event:
        time_, job, restart, event, step, detail = line.split("\t")
        return cls(time_, job, restart, event, int(step), detail)

    @property
    def decision(self) -> str:
        """Of an `end` line: finished, requeued, chained, gave-up, cancelled or failed."""
        return self.detail.rpartition(" -> ")[2]


class Submission:
    """One run and its newest submission."""

    def __init__(self, cluster: Cluster, desk: Path, name: str):
        self.cluster, self.desk, self.dir = cluster, desk, desk / "runs" / name

    def submit(self, *overrides: str, **site: object) -> Submission:
        """overrides: of the config; site: of the cluster file. Raises: ClusterError when it is refused."""
        file = self.desk / f"{self.dir.name}.yaml"
        file.write_text(yaml.safe_dump(SITE | site))
        settings = [*(overrides or TP2_PP2), f"run.dir={self.dir}"]
        command = [*LIME_DIST, "submit", "run.yaml", "--cluster", str(file), *settings]
        self.job = int(self.cluster.run(command, cwd=self.desk).stdout)
        return self

    # ---- waiting

    def reach(self, step: int) -> None:
        """Wait until the run has done `step` updates in all."""
        self.cluster.wait_until(lambda: steps_done(self.dir) >= step, f"step {step}", job_id=self.job, timeout=300)

    def ended(self, timeout: float = 400) -> dict[str, str]:
        """The job in its last state."""
        return self.cluster.wait_for(self.job, ENDED, timeout=timeout)

    def pending(self, timeout: float = 60) -> None:
        """The job has left its nodes and waits to start again."""
        self.cluster.wait_for(self.job, ["PENDING"], timeout=timeout)

    def hurry(self) -> None:
        """Leave out the two minutes that SLURM waits before it starts a job again."""
        self.pending()
        time.sleep(2)  # a start in the second of the requeue is refused ("job credential revoked")
        self.cluster.run(["scontrol", "update", f"JobId={self.job}", "StartTime=now"])

    # ---- what is there

    @property
    def curve(self) -> list[tuple[int, float]]:
        return curve(self.dir)

    @property
    def history(self) -> list[Event]:
        return [Event.parse(line) for line in (self.dir / "slurm" / "history.tsv").read_text().splitlines()]

    def events(self, kind: str) -> list[Event]:
        return [event for event in self.history if event.event == kind]

    @property
    def decisions(self) -> list[str]:
        """In the order of the starts. One whose node was cut off may tell its end after the next one's."""
        ends = sorted(self.events("end"), key=lambda event: (int(event.job), event.restart))
        return [event.decision for event in ends]

    @property
    def saved_step(self) -> int:
        """The newest complete checkpoint's; 0 without any."""
        folder = find_latest(self.dir / "checkpoints")
        return read_meta(folder).step if folder else 0

    def outcome(self, restart: int = 0) -> tuple[int, str] | None:
        return read_outcome(self.dir / "slurm" / "outcomes" / f"{self.job}.{restart}")

    @property
    def log(self) -> str:
        return (self.dir / "slurm" / "logs" / f"{self.job}.out").read_text()

    def ranks(self) -> list[Process]:
        """The processes of this run, the first node's first."""
        return self._processes(RANK)

    def checks(self) -> list[Process]:
        """The processes of its preflight."""
        return self._processes(CHECK)

    def _processes(self, pattern: str) -> list[Process]:
        found = [process for process in self.cluster.processes(pattern) if str(self.dir) in process.command]
        return sorted(found, key=lambda process: (process.node, process.pid))

    @property
    def nodes(self) -> list[str]:
        listed = self.cluster.job(self.job)["NodeList"]
        return self.cluster.run(["scontrol", "show", "hostnames", listed]).stdout.split()
