"""`lime-dist init`: what a user without the checkout starts from."""

from __future__ import annotations

from pathlib import Path

import pytest

from lime_dist.cli.command_line import main

CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_samples_are_the_repositorys(tmp_path: Path) -> None:
    assert main(["init", str(tmp_path / "new")]) == 0
    written = {path.relative_to(tmp_path / "new"): path.read_text() for path in tmp_path.rglob("*.yaml")}
    assert written == {path.relative_to(CONFIGS): path.read_text() for path in CONFIGS.rglob("*.yaml")}
    assert {Path("quickstart.yaml"), Path("clusters/cpu.yaml")} <= written.keys()


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "quickstart.yaml"
    mine.write_text("mine")
    assert main(["init", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"lime-dist: init: {mine} exists already; move it away or name another folder\n"
    assert mine.read_text() == "mine" and list(tmp_path.iterdir()) == [mine]


def test_a_folder_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["init", str(tmp_path / "file" / "below")]) == 2
    assert "Not a directory; name a folder" in capsys.readouterr().err
