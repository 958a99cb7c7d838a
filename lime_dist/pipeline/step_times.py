"""What is recorded of one step of one rank. Pure data, in ns of the rank's own monotonic clock."""

from __future__ import annotations

from dataclasses import dataclass

# Of a step, behind its operations: what was sent has left; the tied embedding's gradient and the counts; replicas' gradients and
# the norm; what all ranks tell each other; the optimiser; the run's records.
PHASES = ("flush", "gradients", "norm", "agreement", "update", "record")


@dataclass(frozen=True)
class CollectiveTimes:
    """When this rank came to a collective, and from when to when it waited for the others."""

    group_name: str
    entered: int
    wait_begun: int
    wait_ended: int


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """marks: the beginning; behind the data; behind each operation of the plan; behind each of `PHASES`.

    busy: what the training thread had had of a core by each mark; None on a GPU, whose marks are those of its stream.
    delayed: for how long it had been ready to run and had no core; None where the system does not tell.
    process_busy: as `busy`, of all threads of the process, in the step.
    arrivals: by receive, in the order posted. sent_bytes: forward and backward, as the transport counted them.
    """

    marks: list[int]
    busy: list[int] | None
    process_busy: int
    arrivals: list[int]
    collectives: list[CollectiveTimes]
    sent_bytes: tuple[int, int]
    delayed: list[int] | None = None
