"""Who may write to a run's folder: the start that took it last. No torch.

A node that the scheduler has given up may still run: cut off, its ranks go on while the job has begun again
elsewhere. The run is the later start's; the earlier one finds that out before it saves and ends.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from lime_dist.errors import LimeDistError

OWNER_FILE = "owner"  # is in every folder that a run has begun in


class RunTaken(LimeDistError):
    """Another start has taken over the run's folder."""


class Ownership:
    """One start's claim on a run's folder; held by one rank."""

    def __init__(self, run_dir: Path):
        """Take the run over from whoever had it."""
        self._path = run_dir / OWNER_FILE
        job = os.environ.get("SLURM_JOB_ID", "no job")
        self._claim = f"process {os.getpid()} on {socket.gethostname()}, job {job}, since {time.time_ns()}"
        replacement = self._path.with_name(f".owner-{os.getpid()}-{time.time_ns()}")
        replacement.write_text(self._claim)
        os.replace(replacement, self._path)

    def check(self) -> None:
        """Raises: RunTaken when a later start has the run."""
        try:
            owner = self._path.read_text()
        except FileNotFoundError:
            raise RunTaken(
                f"run.dir: {self._path.parent} was removed or moved; this start ends without saving"
            ) from None
        if owner != self._claim:
            raise RunTaken(f"run.dir: {self._path.parent} was taken over by {owner}; this start ends without saving")
