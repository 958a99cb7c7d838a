"""`lime-dist submit`: what it writes, what it hands to sbatch, and what it refuses before anything waits in a queue."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from checkpoint_stand_ins import write_checkpoint
from cluster_stand_ins import Bash

from lime_dist.cli.command_line import main
from lime_dist.cluster.history import read_history
from lime_dist.cluster.schema import load_cluster
from lime_dist.cluster.submit import sbatch_environment
from lime_dist.config import load_config
from lime_dist.data.indexed import IndexedWriter

REPOSITORY = Path(__file__).parents[2]
CONFIG = {
    "model": {"num_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "vocab_size": 96},
    "parallel": {"tp": 2, "pp": 2},
    "data": {"train": "train", "seq_length": 8, "global_batch_size": 8},
    "run": {"dir": "runs/a b", "steps": 2},
}
CLUSTER = {"nodes": 2, "tasks_per_node": 4, "time": "02:00:00", "partition": "low"}
COMMAND = ["submit", "run.yaml", "--cluster", "cluster.yaml"]


@pytest.fixture(autouse=True)
def bash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bash:
    """A folder with a config, a cluster file and token files; SLURM's clients stand in."""
    monkeypatch.chdir(tmp_path)
    bash = Bash(tmp_path)
    for name in ("PATH", "RECORD"):
        monkeypatch.setenv(name, bash.environment[name])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    with IndexedWriter(tmp_path / "train", vocab_size=96) as writer:
        writer.add_document(np.arange(500) % 96)
        writer.commit({"vocab_size": 96, "tokens": 500})
    return bash


def git(*arguments: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@y"]
    return subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True).stdout


def calls(bash: Bash, name: str) -> list[list[str]]:
    record = bash.folder / "record"
    found = [call.split("\0")[:-1] for call in record.read_text().split("\n\0")] if record.exists() else []
    return [call[1:] for call in found if call and call[0] == name]


def test_submit(bash: Bash, capsys: pytest.CaptureFixture[str]) -> None:
    git("init", "-b", "trunk")
    (bash.folder / "code.py").write_text("1\n")
    git("add", "code.py")
    git("commit", "-m", "x")
    (bash.folder / "code.py").write_text("2\n")
    assert main([*COMMAND, "run.steps=7", "cluster.time=03:00:00"]) == 0
    assert capsys.readouterr().out == "43\n"
    folder = bash.folder / "runs/a b/slurm"
    assert calls(bash, "sbatch") == [["--parsable", str(folder / "job.sbatch")]]
    config = load_config(folder / "config.yaml")
    assert (config.run.steps, config.parallel.dp) == (7, 2)
    assert load_cluster(folder / "cluster.yaml").time == "03:00:00"
    assert "#SBATCH --time=03:00:00\n" in (folder / "job.sbatch").read_text()
    (event,) = read_history(folder / "history.tsv")
    assert (event.job, event.restart, event.kind, event.step) == ("43", None, "submitted", 0)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", event.time)
    assert git("rev-parse", "HEAD").strip() in (folder / "git.txt").read_text()
    assert "branch trunk\n" in (folder / "git.txt").read_text() and " M code.py\n" in (folder / "git.txt").read_text()
    assert "-1\n+2\n" in (folder / "git.patch").read_text()


def test_no_repository_no_git_files(bash: Bash, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(bash.folder.parent))
    folder = bash.folder / "runs/a b/slurm"
    folder.mkdir(parents=True)
    (folder / "git.patch").write_text("of an earlier submission")
    assert main(COMMAND) == 0
    assert not list(folder.glob("git.*"))


def test_dry_run_writes_nothing(bash: Bash, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(bash.folder.rglob("*"))
    assert main([*COMMAND, "--dry-run"]) == 0
    assert sorted(bash.folder.rglob("*")) == before
    told = capsys.readouterr()
    assert told.out.startswith("#!/bin/bash\n#SBATCH ") and "would write" in told.err
    main(COMMAND)
    assert (bash.folder / "runs/a b/slurm/job.sbatch").read_text() == told.out


def test_bad_hosts_are_excluded(bash: Bash) -> None:
    (bash.folder / "bad").write_text("n7\n\nn2\n; rm\nn7\n")
    assert main([*COMMAND, "cluster.exclude_file=bad"]) == 0
    assert calls(bash, "sbatch")[0][:2] == ["--parsable", "--exclude=n2,n7"]


def test_lead_from_earlier_starts(bash: Bash, capsys: pytest.CaptureFixture[str]) -> None:
    (bash.folder / "runs/a b").mkdir(parents=True)
    records = '{"step": 1, "step_seconds": 99}\n{"step": 2, "step_seconds": 5}\n{"step": 2, "save_seconds": 20}\n'
    (bash.folder / "runs/a b/metrics.jsonl").write_text(records)
    assert main([*COMMAND, "--dry-run"]) == 0
    told = capsys.readouterr()
    assert "\nstop_lead=80\nmeasure_lead=yes\n" in told.out and "80 s before the time limit" in told.err
    assert main([*COMMAND, "--dry-run", "cluster.stop_lead_seconds=77"]) == 0
    assert "\nstop_lead=77\nmeasure_lead=no\n" in capsys.readouterr().out


MISTAKES = {
    "parallel.dp=3": r"cluster\.nodes: 2 nodes x 4 ranks are 8, but the run is tp=2 x pp=2 x dp=3; change cluster\.nodes",
    "cluster.nodes=1 cluster.tasks_per_node=3": r"cluster\.nodes: 1 nodes x 3 ranks are 3, but the run is tp=2 x pp=2 x dp=any; change",
    "cluster.nodes=4 cluster.tasks_per_node=1": (
        r"parallel\.tp: 2 does not divide cluster\.tasks_per_node=1, .* set cluster\.tp_across_nodes=true"
    ),
    "parallel.pp=5 cluster.nodes=5": r"parallel\.pp: 5 stages for model\.num_layers=4; use at most 4",
    "pipeline.num_microbatches=3": r"data\.global_batch_size: 8 must be a multiple of parallel\.dp=2 x",
    "run.device=cuda": r"run\.device: cuda with cluster\.gpus_per_node=0; set cluster\.gpus_per_node or",
    "cluster.gpus_per_node=2": r"cluster\.tasks_per_node: 4 ranks for gpus_per_node=2; set it to 2",
    "data.train=nothing": r"data\.train: nothing\.idx does not exist; make it with lime-dist data tokenize",
    "cluster.nodse=1": r"cluster\.nodse: unknown key; did you mean nodes\?",
    "run.dir=run.yaml": r"run\.dir: run\.yaml is a file; name a folder",
    "run.dir=train.bin/x": r"run\.dir: .*Not a directory; name a folder that can be written",
    "run.dir=back\\slash": r"run\.dir: .* has a backslash",
    'run.dir="a\\nb"': r"run\.dir: .* holds the control character",
}


@pytest.mark.parametrize(("overrides", "said"), MISTAKES.items())
def test_refused(bash: Bash, capsys: pytest.CaptureFixture[str], overrides: str, said: str) -> None:
    check_refused(bash, capsys, said, *overrides.split(" "))


def check_refused(bash: Bash, capsys: pytest.CaptureFixture[str], said: str, *overrides: str) -> None:
    code = main([*COMMAND, *overrides])
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and re.match(f"lime-dist: {said}", error), error
    assert not calls(bash, "sbatch")


def test_tensor_groups_across_nodes_when_allowed() -> None:
    assert main([*COMMAND, "cluster.nodes=4", "cluster.tasks_per_node=1", "cluster.tp_across_nodes=true"]) == 0


@pytest.mark.parametrize(
    "answer", ["7 RUNNING /elsewhere/job.sbatch\n43 PENDING {script}\n", "44 PENDING {script} successor\n"]
)
def test_refused_while_queued(
    bash: Bash, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    assert main(COMMAND) == 0
    (bash.folder / "record").unlink()
    script = bash.folder / "runs/a b/slurm/job.sbatch"
    monkeypatch.setenv("SQUEUE_ANSWER", answer.format(script=script))
    check_refused(bash, capsys, r"run\.dir: job 4[34] of this run is still PENDING; scancel it first")
    monkeypatch.setenv("SQUEUE_ANSWER", "7 RUNNING /elsewhere/job.sbatch\n")
    assert main(COMMAND) == 0


def test_refused_by_sbatch(bash: Bash, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    bash.add_client("sbatch", "echo 'sbatch: error: invalid partition specified: low' >&2; exit 1")
    assert main(COMMAND) == 2
    assert "lime-dist: sbatch: sbatch: error: invalid partition specified: low; change what" in capsys.readouterr().err
    assert read_history(bash.folder / "runs/a b/slurm/history.tsv") == []


def test_without_sbatch(bash: Bash, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    check_refused(bash, capsys, r"environment: sbatch is not on PATH; submit on a login node")
    assert not (bash.folder / "runs").exists()
    assert main([*COMMAND, "--dry-run"]) == 0


def test_no_torch() -> None:
    """A login node answers at once."""
    code = (
        "import sys; from lime_dist.cli.command_line import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", code, *COMMAND], check=True, env=environment)


def test_the_shells_sbatch_variables_do_not_beat_the_script(bash: Bash, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TIMELIMIT", "NO_REQUEUE", "PARTITION", "ACCOUNT"):
        monkeypatch.setenv(f"SBATCH_{name}", "site")
    kept = sbatch_environment(load_cluster(Path("cluster.yaml"), ["cluster.partition=own"]))
    assert {name for name in kept if name.startswith("SBATCH_")} == {"SBATCH_ACCOUNT"}


def test_a_finished_run_is_refused(bash: Bash, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(Path("runs/mine/checkpoints/step_000009"), 9, CONFIG)
    check_refused(bash, capsys, r"run\.steps: all 9 steps of .* are done; raise it", "run.dir=runs/mine", "run.steps=9")


def test_a_container_must_see_the_run(bash: Bash, capsys: pytest.CaptureFixture[str]) -> None:
    container = "cluster.container={{image: x.sqsh, mounts: [{}]}}"
    inside = container.format(f"'{Path.cwd()}:{Path.cwd()}'")
    assert main([*COMMAND, inside, "--dry-run"]) == 0
    capsys.readouterr()
    check_refused(
        bash, capsys, r"cluster\.container\.mounts: run\.dir /elsewhere/x is in none", inside, "run.dir=/elsewhere/x"
    )
    moved = container.format(f"'{Path.cwd()}:/workspace'")
    check_refused(bash, capsys, r"cluster\.container\.mounts: run\.dir .* is in none of them; add a mount", moved)
