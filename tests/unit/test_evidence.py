"""The configs of the comparisons with LLaMA: each is sound, runs in one process, and its overrides make what they say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lime_dist.config import check_config, load_config

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted((REPOSITORY / "configs" / "evidence").glob("*.yaml"))
SCRIPT = REPOSITORY / "launch" / "evidence.sh"
OVERRIDES = sorted(set(re.findall(r'echo "((?:depth|optim)\.[^"$]+)"', SCRIPT.read_text(encoding="utf-8"))))


def test_there_are_configs_and_overrides() -> None:
    assert [path.stem for path in CONFIGS] == ["arithmetic", "depth"]
    assert "depth.router=none" in OVERRIDES and "depth.pattern=first:2" in OVERRIDES


@pytest.mark.parametrize("override", OVERRIDES)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_variants_are_sound_and_differ(path: Path, override: str) -> None:
    plain, variant = (check_config(load_config(path, overrides), 1) for overrides in ([], [override]))
    assert plain.layout.world_size == variant.layout.world_size == 1
    assert plain.pattern != variant.pattern
    assert plain.optim == variant.optim and plain.data == variant.data and plain.model == variant.model


def test_an_unknown_part_is_named() -> None:
    ended = subprocess.run(["bash", str(SCRIPT), "width"], capture_output=True, text=True)
    assert ended.returncode == 2
    assert "width: no such part" in ended.stderr


def test_accuracies_are_averaged_over_seeds(tmp_path: Path) -> None:
    for variant, seed, right in [("lime", 1, 6), ("lime", 2, 8), ("llama", 1, 5)]:
        folder = tmp_path / f"{variant}-seed{seed}"
        folder.mkdir()
        part = {"accuracy": right / 10}
        report = {"group": "operands", "all": part, "groups": {"4": part}}
        (folder / "accuracy.json").write_text(json.dumps(report), encoding="utf-8")
    script = REPOSITORY / "launch" / "mean_accuracy.py"
    printed = subprocess.run(
        [sys.executable, str(script), *map(str, sorted(tmp_path.iterdir()))], capture_output=True, text=True, check=True
    ).stdout
    rows = [re.split(r"\s{2,}", line) for line in printed.splitlines()]
    assert rows == [
        ["variant", "seeds", "4 operands", "all"],
        ["lime", "2", "70.0 % ± 10.0", "70.0 % ± 10.0"],  # sqrt(2) * 10 over sqrt(2)
        ["llama", "1", "50.0 %", "50.0 %"],
    ]
