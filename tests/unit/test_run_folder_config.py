"""A run's folder in place of CONFIG: its config.yaml, and the folder itself as run.dir wherever it lies by now."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoint_stand_ins import write_checkpoint

from lime_dist.cli.command_line import main
from lime_dist.config import dump_yaml, load_config, parse_config
from lime_dist.errors import ConfigError

RUN: dict[str, Any] = {
    "model": {"num_layers": 6, "hidden_size": 8, "intermediate_size": 12, "num_heads": 2, "vocab_size": 16},
    "parallel": {"pp": 3},
    "data": {"global_batch_size": 1, "seq_length": 8},
    "optim": {"warmup_steps": 0},
    "run": {"dir": "runs/old", "device": "cpu", "steps": 9},
}


@pytest.fixture(autouse=True)
def moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of 5 steps, with the edges of last:2, which lies elsewhere than where it began."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/moved")
    tree = {**RUN, "depth": {"pattern": "last:2"}}
    write_checkpoint(folder / "checkpoints" / "step_000005", step=5, tree=tree)
    (folder / "config.yaml").write_text(dump_yaml(parse_config(tree)))
    return folder


def test_it_is_the_runs_config_with_its_folder(moved: Path) -> None:
    old = load_config(moved / "config.yaml")
    assert old.run.dir == str(Path("runs/old").absolute())
    assert load_config(moved).run.dir == load_config("runs/moved/").run.dir == "runs/moved"
    assert load_config(moved, [f"run.dir={old.run.dir}"]) == old
    assert load_config(moved, ["parallel.pp=2"]).parallel.pp == 2
    shutil.copytree(moved, "1")  # a name that YAML reads as a number
    assert load_config("1").run.dir == "1"


@pytest.mark.parametrize("beside", ["owner", "plan.json"])
def test_where_it_began_from_is_not_asked_again(beside: str, moved: Path) -> None:
    """Else a run would begin anew, or go back to another run's checkpoint, whenever it is started by its folder."""
    file = moved / "config.yaml"
    tree = {**RUN, "checkpoint": {"resume": "never", "every": 2}}
    file.write_text(dump_yaml(parse_config(tree)))
    assert load_config(file).checkpoint.resume == "never"  # a config like others
    (moved / beside).touch()
    for path in (moved, file):
        config = load_config(path)
        assert (config.run.dir, config.checkpoint.resume, config.checkpoint.every) == (str(moved), "auto", 2)
    assert load_config(file, ["checkpoint.resume=never", "run.dir=runs/new"]).checkpoint.resume == "never"


def test_plan_of_a_run(moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan with which it would go on: what its own checkpoint says of switches counts."""
    assert main(["plan", str(moved), "depth.switch_at={5: top_p:0.5}", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["chosen_edges"]["how"] == f"by the routers of {moved}/checkpoints/step_000005"
    assert main(["plan", str(moved), "--compare", "first:1"]) == 0
    assert "pattern last:2, policy least" in capsys.readouterr().out.splitlines()[0]


def test_a_dry_run_of_a_run(moved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(moved), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert (
        yaml.safe_load(out.partition("\nlayout ")[0])["run"]["dir"] == str(moved.absolute()) and "pattern last:2" in out
    )


def test_the_twin_of_a_run(moved: Path) -> None:
    assert main(["twin", str(moved), "--out", "twin.yaml"]) == 0
    twin = load_config("twin.yaml")
    assert (twin.depth.router, twin.run.dir) == ("none", "runs/moved_llama")


@pytest.mark.parametrize(
    "command", ("plan {} --json", "train {} --dry-run", "eval {}", "eval {} --task", "twin {} --out x.yaml")
)
def test_other_folders_are_refused_in_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.format("runs").split()) == 2
    said = "lime-dist: config runs: a folder without config.yaml; give a YAML file, or the folder of a run that began\n"
    assert capsys.readouterr() == ("", said)


def test_a_damaged_config_is_named(moved: Path) -> None:
    (moved / "config.yaml").write_text(yaml.safe_dump(RUN | {"run": 3}))
    with pytest.raises(ConfigError, match="^run: must be a section with keys"):
        load_config(moved)
    (moved / "config.yaml").write_text("run: [")
    with pytest.raises(ConfigError, match=f"^config {moved}/config.yaml: not valid YAML"):
        load_config(moved)
