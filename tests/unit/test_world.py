"""Which GPU a rank takes."""

from __future__ import annotations

import pytest

from lime_dist.training.world import pick_gpu

CASES = [
    ({}, 3, 8, 3),
    ({"SLURM_GPUS_ON_NODE": "8"}, 3, 8, 3),
    ({"SLURM_GPUS_ON_NODE": "8"}, 3, 1, 0),  # --gpus-per-task=1: each task sees its own only
    ({"SLURM_GPUS_ON_NODE": "8"}, 0, 1, 0),
    ({"SLURM_GPUS_ON_NODE": "1"}, 1, 1, 1),  # one GPU for two ranks, which is refused
    ({"CUDA_VISIBLE_DEVICES": "2"}, 1, 1, 1),
]


@pytest.mark.parametrize(("environment", "local_rank", "visible", "index"), CASES)
def test_gpu_of_a_rank(environment: dict[str, str], local_rank: int, visible: int, index: int) -> None:
    assert pick_gpu(local_rank, visible, environment) == index
