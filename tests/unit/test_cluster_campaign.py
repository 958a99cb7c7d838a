"""Random hostile texts for every key of a cluster file and of a run: `pytest -m campaign tests/unit/test_cluster_campaign.py`.

--cases texts for each key, --seed chooses them.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hostile import CASES, Case, check_cluster_values, check_config_values, check_folder, random_texts

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(0)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cluster_values(case: Case, num_cases: int, case_seed: int, tmp_path: Path) -> None:
    check_cluster_values(case, random_texts(Random(f"{case} {case_seed}"), num_cases), tmp_path)


def test_folders(num_cases: int, case_seed: int, tmp_path: Path) -> None:
    for index, text in enumerate(random_texts(Random(f"folders {case_seed}"), num_cases)):
        (tmp_path / f"{index}").mkdir()
        check_folder(text, tmp_path / f"{index}")


def test_config_values(num_cases: int, case_seed: int, tmp_path: Path) -> None:
    for text in random_texts(Random(f"config {case_seed}"), num_cases):
        check_config_values(text, tmp_path)
