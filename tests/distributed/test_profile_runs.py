"""Profiles of runs through the command line: `profile.steps` of a training run that evaluates, saves, stops, resumes and switches
patterns, and `lime-dist profile`, which trains nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from common import overrides, write_short_documents
from safetensors.numpy import load_file

from lime_dist.cli.command_line import main
from lime_dist.config import load_config
from lime_dist.errors import USER_ERROR_EXIT_CODE
from lime_dist.profiling.analysis import Analysis
from lime_dist.profiling.profile_files import ProfileError, read_profile

BASE = {
    "model": {"num_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "vocab_size": 96},
    "pipeline": {"num_microbatches": 3, "min_message": 0},
    "optim": {"lr": 0.05, "router_lr": 0.1, "eps": 1e-3, "max_grad_norm": 0.5, "warmup_steps": 2},
    "data": {"train": "train", "valid": "valid", "seq_length": 12, "global_batch_size": 12},
    "eval": {"every": 5, "batches": 2},
    "checkpoint": {"every": 5, "keep": 9},
    "run": {"dir": "run", "device": "cpu", "steps": 8, "timeout_seconds": 60},
}
LAYOUT = "pp=3 zero=1"
# Between two looks at the clock around a step, which may be a turn of another process on the core.
BESIDE_A_STEP = 0.005


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_short_documents(folder)
    (folder / "run.yaml").write_text(yaml.safe_dump(BASE))
    os.chdir(folder)
    return folder


def run(command: str, run_dir: Path, layout: str, *more: str) -> int:
    return main([command, "run.yaml", *overrides(layout), f"run.dir={run_dir}", *more])


def steps_of(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def saved(run_dir: Path, step: int) -> dict[str, dict[str, bytes]]:
    files = (run_dir / "checkpoints" / f"step_{step:06d}").glob("*.safetensors")
    return {path.name: {key: array.tobytes() for key, array in load_file(path).items()} for path in files}


@pytest.fixture(scope="module")
def recorded(folder: Path) -> Path:
    """A run that recorded steps 4 to 6; it evaluated and saved behind step 5."""
    assert run("train", folder / "recorded", LAYOUT, "profile.steps=[4, 6]") == 0
    return folder / "recorded"


def has_profile(run_dir: Path) -> bool:
    return (run_dir / "profile").exists()


# ---- profile.steps


def test_a_recorded_run_is_the_same_run(recorded: Path, tmp_path: Path) -> None:
    assert run("train", tmp_path, LAYOUT) == 0
    for key in ("step", "loss", "grad_norm", "lr", "boundary_bytes"):
        assert [line[key] for line in steps_of(recorded)] == [line[key] for line in steps_of(tmp_path)]
    for step in (5, 8):
        assert saved(recorded, step) == saved(tmp_path, step) != {}
    assert not has_profile(tmp_path)


def test_recorded_steps_are_those_of_the_metrics(recorded: Path) -> None:
    profile = read_profile(recorded)
    assert profile.folder == recorded / "profile" / "steps_4-6" and profile.steps == (4, 5, 6)
    assert profile.plan.config == load_config(recorded / "config.yaml")
    for line, step in zip(steps_of(recorded)[3:6], profile.ranks[0].steps, strict=True):
        # In the metrics a step ends when they are written, in a profile behind that.
        seconds = (step.marks[-1] - step.marks[0]) / 1e9
        assert seconds == pytest.approx(line["step_seconds"], rel=0.01, abs=BESIDE_A_STEP)


def test_a_whole_profile_shows(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "show", str(recorded)]) == 0
    assert capsys.readouterr().out.startswith("steps 4 to 6 of tp=1 pp=3 dp=1, 1f1b, 3 microbatches")


def test_the_run_says_where_its_profile_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("train", tmp_path, "pp=2", "profile.steps=[2, 2]", "run.steps=3") == 0
    out = capfd.readouterr().out
    assert f"profile {tmp_path / 'profile' / 'steps_2-2'}; look at it with `lime-dist profile show" in out


def test_every_step_of_a_run_may_be_recorded(tmp_path: Path) -> None:
    assert run("train", tmp_path, "pp=2", "profile.steps=[1, 3]", "run.steps=3") == 0
    assert read_profile(tmp_path).steps == (1, 2, 3)


@pytest.fixture
def at_5(recorded: Path, tmp_path: Path) -> Path:
    """The run as if it had been killed between its checkpoint at step 5 and its next one."""
    shutil.copytree(recorded, tmp_path / "run")
    for path in ("checkpoints/step_000008", "profile"):
        shutil.rmtree(tmp_path / "run" / path)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("steps", "is_made"), [("[4, 6]", False), ("[5, 6]", False), ("[2, 4]", False), ("[6, 7]", True), ("[7, 8]", True)]
)
def test_a_resumed_run_records_what_lies_ahead(steps: str, is_made: bool, at_5: Path, recorded: Path) -> None:
    assert run("train", at_5, LAYOUT, f"profile.steps={steps}") == 0
    assert has_profile(at_5) == is_made
    assert [line["loss"] for line in steps_of(at_5)] == [line["loss"] for line in steps_of(recorded)]
    if is_made:
        assert list(read_profile(at_5).steps) == [*range(int(steps[1]), int(steps[4]) + 1)]


def test_a_run_that_ends_within_the_range_leaves_no_profile(tmp_path: Path) -> None:
    assert run("train", tmp_path, LAYOUT, "profile.steps=[2, 5]", "run.steps=3") == 0
    assert [line["step"] for line in steps_of(tmp_path)] == [1, 2, 3]
    with pytest.raises(ProfileError, match="no profile there"):
        read_profile(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["[1, 2]", "[3, 4]"])
def test_a_profile_before_or_behind_a_switch_has_the_pattern_of_its_steps(steps: str, tmp_path: Path) -> None:
    more = ["depth.switch_at={2: first:1}", f"profile.steps={steps}", "run.steps=4"]
    assert run("train", tmp_path, "pp=3", *more) == 0
    plan = read_profile(tmp_path).plan
    expected = "full" if steps == "[1, 2]" else "first:1"
    assert plan.transfer.pattern.name == expected
    for each in Analysis.read(tmp_path).account.boundaries:
        assert each.sent_bytes == each.planned_bytes


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["budget:30000", "within_stage", "edges:edges.yaml"])
def test_a_pattern_that_was_chosen_is_read_back(pattern: str, tmp_path: Path) -> None:
    """From bytes, stages or a file: the profile has the edges themselves."""
    Path("edges.yaml").write_text("3: [0, 2]")
    assert run("train", tmp_path, "pp=2", f"depth.pattern={pattern}", "profile.steps=[2, 2]", "run.steps=2") == 0
    for each in Analysis.read(tmp_path).account.boundaries:
        assert each.sent_bytes == each.planned_bytes


# ---- lime-dist profile


@pytest.mark.parametrize("layout", ["pp=3", pytest.param("dp=2 zero=3", marks=pytest.mark.slow), "pp=2 v=2 zero=1"])
def test_a_run_of_its_own(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("profile", tmp_path, layout, "--steps=2") == 0
    screen = capsys.readouterr().out
    assert screen.startswith("steps 4 to 5 of ") and "critical path of the step" in screen
    assert max(map(len, screen.splitlines())) <= 120
    # Nothing but the profile is kept.
    assert not (tmp_path / "metrics.jsonl").exists() and not (tmp_path / "checkpoints").exists()
    assert read_profile(tmp_path).steps == (4, 5)

    assert main(["profile", "show", str(tmp_path)]) == 0
    assert capsys.readouterr().out == screen
    assert main(["profile", "show", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["ranks"]) == read_profile(tmp_path).plan.layout.world_size
    assert all(boundary["measured_bytes_per_second"] > 0 for boundary in report["boundaries"])
    assert len(report["boundaries"]) == {"pp=3": 4, "dp=2 zero=3": 0, "pp=2 v=2 zero=1": 4}[layout]


def test_it_can_be_recorded_again_over_the_last_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On fewer ranks: what is there of the others is not read."""
    assert run("profile", tmp_path, "pp=3", "--steps=1") == 0
    assert run("profile", tmp_path, "pp=2", "--steps=1") == 0
    assert capsys.readouterr().out.count("critical path") == 2
    assert read_profile(tmp_path).plan.layout.pp == 2


def test_it_leaves_a_run_that_is_there_alone(recorded: Path, tmp_path: Path) -> None:
    shutil.copytree(recorded, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert run("profile", tmp_path / "run", LAYOUT, "--steps=1") == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    assert run("train", tmp_path / "run", LAYOUT, "run.steps=9") == 0, "it goes on from its own checkpoint"
    assert [line["step"] for line in steps_of(tmp_path / "run")] == [*range(1, 10)]


def test_data_that_is_not_there_is_told_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("profile", tmp_path, "pp=2", "data.train=nowhere") == USER_ERROR_EXIT_CODE
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "nowhere" in err


def test_a_folder_that_cannot_be_written_is_told_in_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing can be made in /proc, not even by root."""
    assert run("profile", Path("/proc/run"), "pp=2", "--steps=1") == USER_ERROR_EXIT_CODE
    out, err = capfd.readouterr()
    assert out == "" and "Traceback" not in err
    assert err.splitlines()[-1].startswith(
        "lime-dist: run.dir: /proc/run/profile/steps_4-4: No such file or directory; name"
    )
