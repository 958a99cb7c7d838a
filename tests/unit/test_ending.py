"""The outcome file: the first rank that knows is believed."""

from __future__ import annotations

from pathlib import Path

import pytest

from lime_dist.cli.command_line import main
from lime_dist.lifecycle.ending import NEVER_RESTART, OUTCOME_VARIABLE, REQUEUE, read_outcome, write_outcome


def test_the_first_outcome_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "outcomes" / "7.0"
    monkeypatch.setenv(OUTCOME_VARIABLE, str(path))
    assert read_outcome(path) is None
    write_outcome(REQUEUE, "SIGUSR1 at step 4 of 9")
    write_outcome(1, RuntimeError("connection\nclosed"))
    assert read_outcome(path) == (75, "SIGUSR1 at step 4 of 9")
    assert path.read_text() == "75 SIGUSR1 at step 4 of 9\n"


def test_what_another_process_has_told_is_no_news(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank repeats nothing, and keeps nothing of its own to itself."""
    monkeypatch.setenv(OUTCOME_VARIABLE, str(tmp_path / "outcome"))
    assert write_outcome(NEVER_RESTART, "data.train: missing")
    assert not write_outcome(NEVER_RESTART, "data.train: missing")
    assert write_outcome(NEVER_RESTART, "data.train: damaged") and write_outcome(1, "data.train: missing")
    (tmp_path / "outcome").write_text("")  # by one that died as it wrote
    assert write_outcome(NEVER_RESTART, "data.train: missing")


def test_torchrun_gives_ranks_a_folder_in_common(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OUTCOME_VARIABLE, raising=False)
    for rank, is_news in ((0, True), (1, False)):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0" / str(rank) / "error.json"))
        assert write_outcome(NEVER_RESTART, "data.train: missing") is is_news
    assert [path.name for path in (tmp_path / "attempt_0").iterdir()] == ["outcome"]


def test_an_error_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OUTCOME_VARIABLE, str(tmp_path / "outcome"))
    write_outcome(1, RuntimeError("first\nsecond  line"))
    assert read_outcome(tmp_path / "outcome") == (1, "first second line")


def test_no_file_without_a_launcher_that_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OUTCOME_VARIABLE, raising=False)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.chdir(tmp_path)
    write_outcome(1, "why")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "done 3", "\n"])
def test_half_an_outcome_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "outcome").write_text(text)
    assert read_outcome(tmp_path / "outcome") is None


def test_a_user_error_is_told_to_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(OUTCOME_VARIABLE, str(tmp_path / "outcome"))
    assert main(["train", str(tmp_path / "missing.yaml")]) == NEVER_RESTART
    code, reason = read_outcome(tmp_path / "outcome")
    assert code == NEVER_RESTART and f"lime-dist: {reason}\n" == capsys.readouterr().err
