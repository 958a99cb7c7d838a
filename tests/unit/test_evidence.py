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


def printed_rows(script: str, folder: Path) -> list[list[str]]:
    """What a script in launch/ prints of all runs in a folder: the cells of each line."""
    command = [sys.executable, str(REPOSITORY / "launch" / script), *map(str, sorted(folder.iterdir()))]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [re.split(r"\s{2,}", line) for line in printed.splitlines()]


def test_accuracies_are_averaged_over_seeds(tmp_path: Path) -> None:
    for variant, seed, right in [("lime", 1, 6), ("lime", 2, 8), ("llama", 1, 5)]:
        folder = tmp_path / f"{variant}-seed{seed}"
        folder.mkdir()
        part = {"accuracy": right / 10}
        report = {"group": "operands", "all": part, "groups": {"4": part}}
        (folder / "accuracy.json").write_text(json.dumps(report), encoding="utf-8")
    rows = printed_rows("mean_accuracy.py", tmp_path)
    assert rows == [
        ["variant", "seeds", "4 operands", "all"],
        ["lime", "2", "70.0 % ± 10.0", "70.0 % ± 10.0"],  # sqrt(2) * 10 over sqrt(2)
        ["llama", "1", "50.0 %", "50.0 %"],
    ]


def test_analyses_are_averaged_over_seeds_and_compared_in_pairs(tmp_path: Path) -> None:
    entropies = {("llama", 1): 1.0, ("llama", 2): 3.0, ("lime", 1): 1.5, ("lime", 2): 3.7, ("lime", 3): 9.0}
    for (variant, seed), entropy in entropies.items():
        folder = tmp_path / f"{variant}-seed{seed}"
        folder.mkdir()
        none, some = {"mean": [None, None]}, {"mean": [entropy, None if variant == "lime" else 2.0]}
        routed = {"own_share": [0.5, 0.25], "expected_source": [0.0, 0.75]} if variant == "lime" else None
        spectra = {"values": some, "raw_values": none, "hidden_states": none}
        report = {"spectra": {"entropy": spectra}, "separability": None, "routers": routed}
        (folder / "analysis.json").write_text(json.dumps(report), encoding="utf-8")
    assert printed_rows("mean_analyses.py", tmp_path) == [
        [""],
        ["entropy of values, as attention uses them"],
        ["layer", "lime", "llama", "llama - lime"],  # in the order given
        ["0", "4.733 ± 2.226", "2.000 ± 1.000", "-0.600 ± 0.100"],  # of the seeds that both have
        ["1", "-", "2.000 ± 0.000", "-"],
        [""],
        ["share of a layer's sum |R| on itself"],
        ["layer", "lime"],
        ["0", "0.500 ± 0.000"],
        ["1", "0.250 ± 0.000"],
        [""],
        ["mean source layer"],
        ["layer", "lime"],
        ["0", "0.000 ± 0.000"],
        ["1", "0.750 ± 0.000"],
    ]
