"""The configs of the comparisons with LLaMA: each is sound, runs in one process, and its overrides make what they say."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from lime_dist.config import check_config, load_config

REPOSITORY = Path(__file__).parents[2]
CONFIGS = sorted((REPOSITORY / "configs" / "evidence").glob("*.yaml"))
SCRIPT = REPOSITORY / "launch" / "evidence.sh"
OVERRIDES = sorted(set(re.findall(r'echo "((?:depth|optim)\.[^"$]+)"', SCRIPT.read_text(encoding="utf-8"))))


def test_there_are_configs_and_overrides() -> None:
    assert [path.stem for path in CONFIGS] == ["depth"]
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
