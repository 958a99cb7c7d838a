"""The image's recipe by hadolint and against the repository; its health check as it runs. Needs no container engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def problems(dockerfile: str) -> set[str]:
    """What hadolint finds, by rule, and what only this repository can know."""
    command = [shutil.which("hadolint", path=PATH), "--config", "docker/hadolint.yaml", "--no-color", "-"]
    found = subprocess.run(command, input=dockerfile, capture_output=True, text=True, cwd=ROOT)
    rules = set(re.findall(r"\b(?:DL|SC)\d{4}\b", found.stdout))
    assert bool(rules) == bool(found.returncode), found.stdout + found.stderr
    return rules | _own_problems(dockerfile)


def _own_problems(dockerfile: str) -> set[str]:
    instructions = re.findall(r"^([A-Z]+) (.*)", dockerfile, re.MULTILINE)
    (image,) = (text for name, text in instructions if name == "FROM")
    users = [text for name, text in instructions if name == "USER"]
    sources = {source for name, text in instructions if name == "COPY" for source in text.split()[:-1]}
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    found = set() if users and users[-1] not in ("root", "0") else {"runs as root"}
    found |= {f"no {source}" for source in sources if not (ROOT / source).exists()}
    found |= {f"{source} is ignored" for source in sources - allowed}
    version = re.match(r"pytorch/pytorch:(\d+\.\d+\.\d+)-cuda", image)
    return found if version and version[1] in _torch() else found | {f"torch of {image}"}


def _torch() -> SpecifierSet:
    """The versions that pip would leave as they are."""
    return SpecifierSet(re.search(r'"torch([^"]+)"', (ROOT / "pyproject.toml").read_text())[1])


def test_the_dockerfile_has_no_problems() -> None:
    assert problems(DOCKERFILE) == set()


@pytest.mark.parametrize(
    ("good", "bad", "problem"),
    (
        (r"^USER 10001$", "", "runs as root"),
        (r"^USER 10001$", "USER root", "DL3002"),
        (r"^HEALTHCHECK(.|\n)*?\n\n", "", "DL3057"),
        (r"^COPY configs configs", "COPY missing missing", "no missing"),
        (r"^COPY configs configs", "COPY tests tests", "tests is ignored"),
        (r"^FROM .*", "FROM pytorch/pytorch", "DL3006"),
        (r"^FROM .*", "FROM pytorch/pytorch:2.5.1-cuda12", "torch of pytorch/pytorch:2.5.1-cuda12"),
        (r"^WORKDIR /opt/lime_dist$", "RUN cd /opt", "DL3003"),
        (r"^ENTRYPOINT .*", "ENTRYPOINT lime-dist", "DL3025"),
    ),
)  # fmt: skip
def test_a_bad_dockerfile_is_found_out(good: str, bad: str, problem: str) -> None:
    spoilt, count = re.subn(good, bad, DOCKERFILE, flags=re.MULTILINE)
    assert count == 1
    assert problem in problems(spoilt)


@pytest.mark.slow
def test_the_health_check_trains_here(tmp_path: Path) -> None:
    environment = os.environ | {"PATH": PATH, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", ROOT / "docker" / "health.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout and done.stdout.splitlines()[-1].startswith("healthy: ")
    assert list(tmp_path.glob("tmp.*")) == [], "it leaves its work behind"


def test_the_health_check_fails_where_training_does(tmp_path: Path) -> None:
    (tmp_path / "lime-dist").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "lime-dist").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{PATH}"}
    assert subprocess.run(["bash", ROOT / "docker" / "health.sh"], env=environment, capture_output=True).returncode != 0
