"""A process's place among the ranks, from what launchers set."""

from __future__ import annotations

import socket

import pytest

from lime_dist.errors import LayoutError
from lime_dist.layout import Layout
from lime_dist.lifecycle.launcher import (
    Place,
    find_place,
    host_name,
    launch_kernels_in_order,
    require_address,
    require_rendezvous,
)

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


STEP = {**SRUN, "SLURM_STEP_NODELIST": "n[07-09],m1", "SLURM_JOB_ID": "4711"}


def rendezvous(**changes: str) -> tuple[str, int]:
    environment = STEP | changes
    require_rendezvous(environment)
    return environment["MASTER_ADDR"], int(environment["MASTER_PORT"])


def test_a_bare_step_works_out_where_to_meet() -> None:
    """At its first host; at the same port on all ranks and at another one in each step and job."""
    host, port = rendezvous()
    assert host == "n07" and 10000 <= port < 30000
    assert rendezvous(SLURM_PROCID="0", SLURM_LOCALID="0") == (host, port)
    steps = [rendezvous(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step))[1] for job in range(100) for step in range(90)]
    assert len(set(steps)) == len(steps) and 10000 <= min(steps) and max(steps) < 30000


def test_what_is_set_is_kept() -> None:
    assert rendezvous(MASTER_ADDR="10.0.0.7", MASTER_PORT="29500") == ("10.0.0.7", 29500)
    assert rendezvous(MASTER_ADDR="10.0.0.7") == ("10.0.0.7", rendezvous()[1])


@pytest.mark.parametrize("missing", ["SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_STEP_ID"])
def test_outside_a_step_nothing_is_worked_out(missing: str) -> None:
    with pytest.raises(LayoutError, match="^environment: MASTER_ADDR is not set"):
        require_rendezvous({key: value for key, value in STEP.items() if key != missing})


def test_slurms_name_of_a_host_comes_first() -> None:
    assert host_name({"SLURMD_NODENAME": "n2"}) == "n2"
    assert host_name({}) == socket.gethostname()


def test_rank_0_asks_for_the_meeting_place() -> None:
    """It runs there: a name that it does not know, no host knows. Another host that does not is a bad host."""
    unknown = {"MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "29500"}
    require_address(Place(rank=0, local_rank=0, world_size=2), {"MASTER_ADDR": "127.0.0.1"})
    require_address(Place(rank=1, local_rank=0, world_size=2), unknown)
    with pytest.raises(LayoutError, match="^environment: MASTER_ADDR=no-such-host.invalid does not resolve on"):
        require_address(Place(rank=0, local_rank=0, world_size=2), unknown)


@pytest.mark.parametrize("rank", ["-1", "2", "5"])
def test_a_rank_outside_the_world_is_refused(rank: str) -> None:
    with pytest.raises(LayoutError, match=f"^environment: RANK={rank} is not below WORLD_SIZE=2; start with torchrun"):
        find_place({"RANK": rank, "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("layout", "given", "expected"),
    [
        (Layout(), {}, {}),
        (Layout(tp=2), {}, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
        (Layout(tp=2), {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}),
        (Layout(tp=2, pp=2), {}, {}),
    ],
)
def test_one_queue_for_tensor_ranks_of_one_stage(
    layout: Layout, given: dict[str, str], expected: dict[str, str]
) -> None:
    launch_kernels_in_order(layout, given)
    assert given == expected


def test_one_queue_for_several_stages_is_warned_of(capfd: pytest.CaptureFixture[str]) -> None:
    launch_kernels_in_order(Layout(pp=2), {"CUDA_DEVICE_MAX_CONNECTIONS": "1"})
    assert "CUDA_DEVICE_MAX_CONNECTIONS=1 with parallel.pp above 1 may hang" in capfd.readouterr().err
