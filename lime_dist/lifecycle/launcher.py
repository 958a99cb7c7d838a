"""Where this process stands among the ranks, read from what torchrun, srun or DeepSpeed's launcher set. No torch."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass

from lime_dist.cluster.nodelist import expand_nodelist, step_nodelist
from lime_dist.errors import LayoutError
from lime_dist.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Place:
    rank: int
    local_rank: int
    world_size: int


# torchrun and DeepSpeed's launcher set the first three names, srun the second three.
_NAMES = (("RANK", "LOCAL_RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"))
_SLURM_RESERVED_STEPS = 0xFFFFFF00  # SLURM numbers batch and interactive steps from the top of 32 bits
SECRET_VARIABLE = "LIME_DIST_JOB_SECRET"
_FIRST_PORT, _NUM_PORTS, _STEPS_APART = 10000, 20000, 97


def find_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place, or None when no launcher started it.

    An sbatch script's own shell has SLURM's variables but no step, so srun's names count only within a step.
    Raises: LayoutError when a launcher's variables are incomplete.
    """
    for rank, local_rank, world_size in _NAMES:
        if rank not in environment or (rank.startswith("SLURM") and not _is_srun_step(environment)):
            continue
        try:
            place = Place(
                rank=int(environment[rank]),
                local_rank=int(environment.get(local_rank, "0")),
                world_size=int(environment[world_size]),
            )
        except (KeyError, ValueError):
            raise LayoutError(
                f"environment: {rank} is set but {world_size} is not a number; start with torchrun or srun"
            ) from None
        if not 0 <= place.rank < place.world_size:
            raise LayoutError(
                f"environment: {rank}={place.rank} is not below {world_size}={place.world_size}; start with torchrun or srun"
            )
        return place
    return None


def is_launched() -> bool:
    """Whether a launcher started this process, rightly or not."""
    return any(rank in os.environ for rank, *_ in _NAMES)


def own_place() -> Place:
    """The place of a process that a launcher has started."""
    place = find_place()
    assert place is not None
    return place


def _is_srun_step(environment: Mapping[str, str]) -> bool:
    step = environment.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < _SLURM_RESERVED_STEPS


def require_rendezvous(environment: MutableMapping[str, str] = os.environ) -> None:
    """See that MASTER_ADDR and MASTER_PORT say where the ranks meet; within a bare srun step, work out what is missing.

    Raises: LayoutError when that is not possible.
    """
    if _is_srun_step(environment):
        for name, value in _step_rendezvous(environment).items():
            environment[name] = environment.get(name) or value
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise LayoutError(f"environment: {name} is not set; export it in the job script (torchrun does so itself)")


def _step_rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """The first host of the step, where SLURM places rank 0, and a port that all its ranks derive alike.

    Steps of a job differ in it, and so do jobs that follow one another; all lie below the ports that Linux gives out.
    """
    hosts, job = step_nodelist(environment), environment.get("SLURM_JOB_ID", "")
    if not hosts or not job.isdigit():
        return {}
    port = _FIRST_PORT + (int(job) * _STEPS_APART + int(environment["SLURM_STEP_ID"])) % _NUM_PORTS
    return {"MASTER_ADDR": expand_nodelist(hosts)[0], "MASTER_PORT": str(port)}


def require_address(place: Place, environment: Mapping[str, str] = os.environ) -> None:
    """See that the meeting place has an address. Rank 0's host asks for its own name: if it has none, no host finds it.

    Raises: LayoutError on rank 0.
    """
    address = environment["MASTER_ADDR"]
    try:
        if place.rank == 0:
            socket.getaddrinfo(address, None)
    except OSError:
        raise LayoutError(
            f"environment: MASTER_ADDR={address} does not resolve on {host_name(environment)}; set an address that all nodes "
            "know (in a cluster file under export)"
        ) from None


def host_name(environment: Mapping[str, str] = os.environ) -> str:
    """What SLURM calls this host, so that it can be told to leave it out; else its own name."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def new_job_secret() -> str:
    """By whoever launches, another one for each start, into `SECRET_VARIABLE` of every rank."""
    return secrets.token_hex(32)


def job_secret(environment: Mapping[str, str] = os.environ) -> bytes | None:
    """With which ranks sign what they tell one another before there are groups; None when the launcher has made none."""
    return environment.get(SECRET_VARIABLE, "").encode() or None


def launch_kernels_in_order(layout: Layout, environment: MutableMapping[str, str] = os.environ) -> None:
    """For tensor ranks of one stage one queue to the GPU, unless the user has set how many; before CUDA starts.

    Megatron's linear layers launch a collective before the product that is to hide it, and rely on this order. Blackwell
    keeps to it with more queues, which the user may then give it. With several stages a receive that is posted ahead would
    hold up in that one queue the pass whose result its sender waits for.
    """
    if layout.pp > 1 and environment.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
        warn(
            [
                "environment: CUDA_DEVICE_MAX_CONNECTIONS=1 with parallel.pp above 1 may hang on GPUs, where receives are posted ahead; unset it"
            ]
        )
    elif layout.tp > 1 and layout.pp == 1:
        environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def warn(warnings: Iterable[str]) -> None:
    """A line each on standard error, by one process of a run: rank 0, or whoever starts the ranks."""
    place = find_place()
    if place is None or place.rank == 0:
        for warning in warnings:
            print(f"lime-dist: warning: {warning}", file=sys.stderr, flush=True)
