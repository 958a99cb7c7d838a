"""Where this process stands among the ranks, read from what torchrun, srun or DeepSpeed's launcher set. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from lime_dist.errors import LayoutError


@dataclass(frozen=True, kw_only=True)
class Place:
    rank: int
    local_rank: int
    world_size: int


# torchrun and DeepSpeed's launcher set the first three names, srun the second three.
_NAMES = (("RANK", "LOCAL_RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS"))
_SLURM_RESERVED_STEPS = 0xFFFFFF00  # SLURM numbers batch and interactive steps from the top of 32 bits


def find_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place, or None when no launcher started it.

    An sbatch script's own shell has SLURM's variables but no step, so srun's names count only within a step.
    Raises: LayoutError when a launcher's variables are incomplete.
    """
    for rank, local_rank, world_size in _NAMES:
        if rank not in environment or (rank.startswith("SLURM") and not _is_srun_step(environment)):
            continue
        try:
            return Place(
                rank=int(environment[rank]),
                local_rank=int(environment.get(local_rank, "0")),
                world_size=int(environment[world_size]),
            )
        except (KeyError, ValueError):
            raise LayoutError(
                f"environment: {rank} is set but {world_size} is not a number; start with torchrun or srun"
            ) from None
    return None


def _is_srun_step(environment: Mapping[str, str]) -> bool:
    step = environment.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < _SLURM_RESERVED_STEPS


def require_rendezvous(environment: Mapping[str, str] = os.environ) -> None:
    """Raises: LayoutError unless MASTER_ADDR and MASTER_PORT say where the ranks meet."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise LayoutError(f"environment: {name} is not set; export it in the job script (torchrun does so itself)")
