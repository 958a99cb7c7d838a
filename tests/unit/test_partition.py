"""Layers to stages."""

from __future__ import annotations

import pytest

from lime_dist.errors import LayoutError
from lime_dist.plan.partition import plan_partition

COUNTS = [  # layers, stages, counts of `auto`: what is left over goes to the middle
    (4, 1, [4]),
    (8, 4, [2, 2, 2, 2]),
    (7, 3, [2, 3, 2]),
    (9, 4, [2, 3, 2, 2]),
    (10, 4, [2, 3, 3, 2]),
    (11, 4, [3, 3, 3, 2]),
    (5, 5, [1, 1, 1, 1, 1]),
]


@pytest.mark.parametrize(("num_layers", "num_stages", "counts"), COUNTS)
def test_auto_is_even(num_layers: int, num_stages: int, counts: list[int]) -> None:
    stages = plan_partition(num_layers, num_stages, "auto")
    assert [len(layers) for layers in stages] == counts
    assert [layer for layers in stages for layer in layers] == list(range(num_layers))


def test_a_list_gives_each_stages_count() -> None:
    assert plan_partition(6, 3, [1, 4, 1]) == (range(0, 1), range(1, 5), range(5, 6))


REFUSED = [
    (2, 3, "auto", "parallel.pp: 3 stages for model.num_layers=2"),
    (4, 2, [1, 1, 2], "pipeline.partition: [1, 1, 2] has 3 stages, parallel.pp is 2"),
    (4, 2, [1, 2], "pipeline.partition: [1, 2] must be counts of at least 1 that add up to model.num_layers=4"),
    (4, 2, [4, 0], "pipeline.partition: [4, 0] must be"),
    (4, 3, [5, -2, 1], "pipeline.partition: [5, -2, 1] must be"),
]


@pytest.mark.parametrize(("num_layers", "num_stages", "partition", "message"), REFUSED)
def test_what_cannot_be_is_refused(num_layers: int, num_stages: int, partition: str | list[int], message: str) -> None:
    with pytest.raises(LayoutError) as error:
        plan_partition(num_layers, num_stages, partition)
    assert str(error.value).startswith(message)
