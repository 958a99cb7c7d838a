"""A run that is estimated to need more than a GPU has is refused before it waits in the queue."""

from __future__ import annotations

from pathlib import Path

import pytest

from lime_dist.checkpoint.edges import ready_plan
from lime_dist.cluster.schema import ClusterConfig
from lime_dist.cluster.submit import check_memory
from lime_dist.config import load_config
from lime_dist.errors import LayoutError

PLAN = ready_plan(load_config(Path(__file__).parents[2] / "configs" / "lime_1b_gqa.yaml"), 8)
NEEDS = [stage.total_bytes for stage in PLAN.memory]


def make_cluster(gpu_memory: str | None, gpus: int = 8) -> ClusterConfig:
    return ClusterConfig(nodes=1, gpus_per_node=gpus, tasks_per_node=8, time=60, gpu_memory=gpu_memory)


def test_a_byte_too_little() -> None:
    worst = NEEDS.index(max(NEEDS))
    with pytest.raises(
        LayoutError, match=rf"^cluster\.gpu_memory: \d+, but a rank of stage {worst} needs about .*; raise"
    ):
        check_memory(PLAN, make_cluster(str(max(NEEDS) - 1)))


@pytest.mark.parametrize("cluster", [make_cluster(str(max(NEEDS))), make_cluster(None), make_cluster("1KiB", gpus=0)])
def test_enough_unknown_or_no_gpus(cluster: ClusterConfig) -> None:
    check_memory(PLAN, cluster)
