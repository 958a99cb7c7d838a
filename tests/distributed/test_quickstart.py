"""launch/quickstart.sh as a newcomer runs it, with a few steps, into a folder of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not Path(sys.executable).with_name("lime-dist").exists(), reason="lime-dist is not installed here")
@pytest.mark.timeout(600)
def test_the_run_is_where_it_was_asked_for(tmp_path: Path) -> None:
    """Trained, evaluated, continued and pictured there; the data stays where other runs find it."""
    for name in ("launch", "configs"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/bin").symlink_to(Path(sys.executable).parent)
    (tmp_path / "venv/.lime_dist_installed").touch()
    few = ("run.steps=3", "optim.warmup_steps=1", "eval.batches=1", "eval.every=0")
    ended = subprocess.run(
        ["bash", "launch/quickstart.sh", "run.dir=mine/first", *few],
        cwd=tmp_path,
        env=os.environ | {"VENV": "venv"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    run = tmp_path / "mine/first"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000003"]
    assert (run / "analysis.html").is_file() and (run / "config.yaml").is_file()
    told = ended.stdout
    assert "mine/first/checkpoints/step_000003" in told and "The function returns" in told
    assert told.splitlines()[-1].startswith("The run is in mine/first ")
    assert [path.name for path in (tmp_path / "runs/quickstart").iterdir()] == ["data"]
