"""launch/environment.sh, which the quickstart and tests/run.sh begin with: what it says before it is silent for minutes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
# A Python whose -c exits with VERSION_CHECK, and whose environments have a pip that installs nothing.
PYTHON = """\
#!/bin/bash
case "$1" in
  -c) exit "${VERSION_CHECK:-0}" ;;
  -m) if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi ;;
esac
"""


def source(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    python = folder / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    if not (folder / "pyproject.toml").exists():
        (folder / "pyproject.toml").touch()
    command = ["bash", "-euc", f"source {LAUNCH / 'environment.sh'}; echo ready"]
    named = {"PYTHON": str(python), "VENV": str(folder / "venv")}
    return subprocess.run(command, cwd=folder, env=os.environ | named | environment, capture_output=True, text=True)


def test_it_says_once_that_it_installs(tmp_path: Path) -> None:
    first, second = source(tmp_path), source(tmp_path)
    said = f"Installing PyTorch and lime_dist into {tmp_path / 'venv'}; this takes some minutes.\n"
    assert (first.returncode, first.stdout, first.stderr) == (0, "ready\n", said)
    assert (second.returncode, second.stdout, second.stderr) == (0, "ready\n", "")


@pytest.mark.parametrize("environment", [{"VERSION_CHECK": "1"}, {"PYTHON": "/nowhere/python3"}], ids=str)
def test_no_python_of_use(tmp_path: Path, environment: dict[str, str]) -> None:
    done = source(tmp_path, **environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1] == "Python 3.10 or newer is needed; set PYTHON=/path/to/python3"
    assert not (tmp_path / "venv").exists()
