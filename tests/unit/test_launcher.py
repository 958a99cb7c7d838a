"""A process's place among the ranks, from what launchers set."""

from __future__ import annotations

import pytest

from lime_dist.errors import LayoutError
from lime_dist.launcher import Place, find_place, require_rendezvous

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
SRUN = {"SLURM_PROCID": "3", "SLURM_LOCALID": "2", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}

PLACES = [
    (TORCHRUN, Place(rank=5, local_rank=1, world_size=8)),
    (SRUN, Place(rank=3, local_rank=2, world_size=4)),
    ({**SRUN, **TORCHRUN}, Place(rank=5, local_rank=1, world_size=8)),  # torchrun started by srun
    ({}, None),
    ({**SRUN, "SLURM_STEP_ID": "4294967291x"}, None),
    ({key: value for key, value in SRUN.items() if key != "SLURM_STEP_ID"}, None),  # an sbatch script's own shell
    ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, None),
]


@pytest.mark.parametrize(("environment", "place"), PLACES)
def test_place(environment: dict[str, str], place: Place | None) -> None:
    assert find_place(environment) == place


@pytest.mark.parametrize(
    "environment", [{"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "two"}, {**SRUN, "SLURM_NTASKS": ""}]
)
def test_half_a_place_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(LayoutError, match="^environment: .*start with torchrun or srun"):
        find_place(environment)


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_ranks_must_know_where_to_meet(missing: str) -> None:
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    require_rendezvous(environment)
    for value in ({}, {missing: ""}):
        with pytest.raises(LayoutError, match=f"^environment: {missing} is not set"):
            require_rendezvous({key: there for key, there in environment.items() if key != missing} | value)
