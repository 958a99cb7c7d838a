"""`lime-dist status` of made-up runs: on SLURM in each state of a job, and without SLURM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest

from lime_dist.cli.command_line import main
from lime_dist.cluster.queue import Job
from lime_dist.cluster.starts import UNRECORDED_END
from lime_dist.cluster.status import read_status, to_text
from lime_dist.config import Config, dump_yaml, parse_config
from lime_dist.layout import Layout
from lime_dist.lifecycle.heartbeat import Heartbeat, heartbeat_folder, write_heartbeat
from lime_dist.lifecycle.pulse import Pass

NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=timezone.utc).timestamp()
LAYOUT = Layout(pp=2, tp=2)
HISTORY = [
    ("08:00:00", 11, "-", "submitted", 0, ""),
    ("08:01:00", 11, "0", "start", 0, "n[1-2]"),
    ("09:00:00", 11, "0", "end", 40, "2 a user's mistake -> failed"),
    ("09:30:00", 12, "-", "submitted", 40, ""),
    ("09:31:00", 12, "0", "start", 40, "n[1-2]"),
    ("10:30:00", 12, "0", "end", 60, "75 SIGUSR1 at step 60 of 100 -> requeued"),
    ("10:31:00", 12, "1", "start", 60, "n[1-2]"),
    ("11:30:00", 12, "2", "start", 80, "n[2-3]"),
]


def config(layout: Layout = LAYOUT) -> Config:
    model = {"num_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "vocab_size": 96}
    parallel = {"pp": layout.pp, "tp": layout.tp, "dp": layout.dp}
    return parse_config({"model": model, "parallel": parallel, "run": {"steps": 100, "dir": "run"}})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run at step 90 of 100 with a checkpoint of step 80; no job, no heartbeats."""
    (tmp_path / "config.yaml").write_text(dump_yaml(config()))
    write_metrics(tmp_path, last_step=90)
    for name, files in (
        ("step_000080", ["meta.json"]),
        ("step_000070", ["meta.json"]),
        (".unfinished-step_000090", []),
    ):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        for file in files:
            (folder / file).touch()
            os.utime(folder / file, (NOW - 200, NOW - 200))
    return tmp_path


def write_metrics(run: Path, last_step: int) -> None:
    """Steps of two seconds each, but for the last twenty, of one; then a line that is being written."""
    lines = []
    for step in range(1, last_step + 1):
        seconds = 1.0 if step > last_step - 20 else 2.0
        record = {"step": step, "loss": 9 - step / 10, "tokens_per_second": 3000 / seconds, "step_seconds": seconds}
        lines.append(json.dumps(record | {"boundary_bytes": [1] * 300}))
    lines += [json.dumps({"step": last_step, "eval_loss": 7.0, "eval_seconds": 1.0}), '{"step": 91, "lo']
    (run / "metrics.jsonl").write_text("\n".join(lines))


def write_history(run: Path, lines: list[tuple] = HISTORY) -> None:
    (run / "slurm").mkdir(exist_ok=True)
    text = "".join(f"2026-01-31T{clock}Z\t" + "\t".join(map(str, rest)) + "\n" for clock, *rest in lines)
    (run / "slurm" / "history.tsv").write_text(text + "2026-01-31T11:59:00Z\t12\t2\tend")  # being written


def beat(
    run: Path, rank: int, *, age: float = 1.0, ended: bool = False, now: float = NOW, layout: Layout = LAYOUT
) -> None:
    heartbeat = Heartbeat(
        global_rank=rank, coordinate=layout.coordinate(rank), host=f"n{2 + rank // 2}", pid=1, job="12", step=91,
        phase="forward", at=Pass(0, 2), busy=False, done=9, moved=now - age, alive=now - age, ended=ended,
    )  # fmt: skip
    write_heartbeat(heartbeat_folder(run), heartbeat)


def answer(folder: Path, monkeypatch: pytest.MonkeyPatch, **answers: str) -> None:
    """squeue and the others answer these lines; those that are not named know no job."""
    folder.mkdir()
    for name in ("squeue", "sacct", "scontrol"):
        script = f"echo '{answers[name]}'" if name in answers else "exit 1"
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


RUNNING = "RUNNING|n[2-3]|1:02:03|None"


def test_a_running_job(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(tmp_path / "bin", monkeypatch, squeue=RUNNING)
    write_history(run)
    for rank, age in enumerate((1.0, 0.5, 1.0, 120.0)):
        beat(run, rank, age=age)
    status = read_status(run, NOW)
    assert status.state == "RUNNING" and status.job == Job(
        job_id="12", state="RUNNING", nodes="n[2-3]", seconds_left=3723
    )
    assert to_text(status).splitlines() == [
        f"run         {run}",
        "state       RUNNING, job 12 on n[2-3]",
        "step        90 of 100  loss 0.0000  3.0k tokens/s",
        "checkpoint  step 80, 3:20 ago",
        "time left   training 0:10, job 1:02:03",
        "heartbeats  4 of 4 ranks, oldest 120 s ago (rank 3)",
        "silent      rank 3 (pp=1 dp=0 tp=1) on n3, stage 1, since step 91 forward microbatch 2; "
        "no sign of life for 120 s: stopped, or its host is gone",
        "restarts    2 since the submission",
        "            2026-01-31T09:31:00Z  job 12.0  on n[1-2]: at step 60: 75 SIGUSR1 at step 60 of 100 -> requeued",
        f"            2026-01-31T10:31:00Z  job 12.1  on n[1-2]: at step 80: {UNRECORDED_END}",
        "            2026-01-31T11:30:00Z  job 12.2  on n[2-3]: running",
    ]


def test_tokens_and_utilization_of_a_run(run: Path) -> None:
    """Over the recent steps' time: a slow step weighs more."""
    lines = []
    for step, (seconds, mfu) in enumerate(((1.0, 0.5), (3.0, 0.1)), start=1):
        record = {"step": step, "loss": 2.0, "tokens_per_second": 3000.0, "step_seconds": seconds}
        lines.append(json.dumps(record | {"tokens_seen": 1_500_000_000 * step, "model_flops": 10, "mfu": mfu}))
    (run / "metrics.jsonl").write_text("\n".join(lines))
    status = read_status(run, NOW)
    assert status.tokens_seen == 3_000_000_000 and status.mfu == pytest.approx(0.2)
    assert "step        2 of 100  loss 2.0000  3.0k tokens/s  mfu 20.0%  3.0G tokens seen" in to_text(status)


def test_steps_that_went_wrong(run: Path) -> None:
    assert read_status(run, NOW).spikes is None and "spikes" not in to_text(read_status(run, NOW))
    back = {
        "step": 80,
        "spike": "returned",
        "bad_step": 88,
        "reason": "the loss is nan",
        "skipped_steps": 1,
        "returns": 1,
    }
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f"\n{json.dumps(back)}\n")
    assert (
        "spikes      1 step skipped, went back 1 time\nspikes      returned at step 88: the loss is nan; back to step 80\n"
        in (to_text(read_status(run, NOW)))
    )
    with (run / "metrics.jsonl").open("a") as file:
        record = {
            "step": 81,
            "loss": None,
            "tokens_per_second": 5.0,
            "step_seconds": 1.0,
            "skipped_steps": 2,
            "returns": 1,
        }
        file.write(f"{json.dumps(record)}\n")
    status = read_status(run, NOW)
    assert (status.step, status.loss, status.spikes.skipped_steps, status.spikes.returns) == (81, None, 2, 1)
    assert "2 steps skipped, went back 1 time" in to_text(status)


def test_json_has_the_same(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(tmp_path / "bin", monkeypatch, squeue=RUNNING)
    write_history(run)
    beat(run, 0, now=time.time())
    assert main(["status", str(run), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["state"], report["job"]["nodes"], report["job"]["seconds_left"]) == ("RUNNING", "n[2-3]", 3723)
    assert (report["step"], report["num_steps"], report["seconds_left"]) == (90, 100, 10.0)
    assert report["checkpoint"]["step"] == 80 and report["checkpoint"]["age_seconds"] > 200
    assert report["restarts"] == 2 and report["starts"][1]["ending"] == UNRECORDED_END
    assert report["starts"][0]["time"] == "2026-01-31T09:31:00Z" and report["starts"][2]["ending"] is None
    assert report["heartbeats"]["ranks"] == 1 and report["heartbeats"]["world_size"] == 4


def test_what_an_earlier_start_left_is_not_silence(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(tmp_path / "bin", monkeypatch, squeue=RUNNING)
    write_history(run)
    for rank in range(4):
        beat(run, rank, age=1860.0)  # half a minute before the last start
    status = read_status(run, NOW)
    assert status.heartbeats.silent == [] and "none of 4 ranks yet" in to_text(status)


def test_a_job_that_waits_after_its_node_failed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(tmp_path / "bin", monkeypatch, squeue="PENDING||2:00:00|BeginTime")
    write_history(run)
    beat(run, 0, age=600.0)
    status = read_status(run, NOW)
    assert "state       PENDING, job 12 (BeginTime)" in to_text(status)
    assert status.starts[-1].ending == UNRECORDED_END and status.heartbeats.silent == []


def test_a_job_that_has_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(tmp_path / "bin", monkeypatch, squeue="PENDING||2:00:00|Resources")
    write_history(tmp_path, HISTORY[:1])
    (tmp_path / "slurm" / "config.yaml").write_text(dump_yaml(config()))
    text = to_text(read_status(tmp_path, NOW))
    for line in ("PENDING, job 11 (Resources)", "step        0 of 100", "checkpoint  none yet", "training unknown, once it runs", "restarts    0"):  # fmt: skip
        assert line in text


def test_a_chain_goes_on_with_the_successor(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_history(
        run,
        [
            *HISTORY[:5],
            ("09:31:01", 12, "0", "successor", 40, "13"),
            ("10:00:00", 12, "0", "end", 60, "75 x -> chained"),
        ],
    )
    answer(tmp_path / "bin", monkeypatch, scontrol="JobId=12 JobState=FAILED Reason=NonZeroExitCode NodeList=n1")
    (tmp_path / "bin" / "squeue").write_text(
        '#!/bin/sh\ncase "$*" in *13*) echo "PENDING||1:00:00|Dependency" ;; *) exit 1 ;; esac\n'
    )
    job = read_status(run, NOW).job
    assert (job.job_id, job.state) == ("13", "PENDING")


def test_a_job_that_is_over(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(tmp_path / "bin", monkeypatch, sacct="CANCELLED by 0|n[2-3]")
    write_history(run, [*HISTORY, ("11:59:00", 12, "2", "end", 90, "75 cancelled: SIGTERM -> cancelled")])
    beat(run, 1, age=60.0)
    status = read_status(run, NOW)
    assert "state       CANCELLED, job 12 on n[2-3] (by 0)" in to_text(status)
    assert status.heartbeats.silent == [] and status.starts[-1].ending == "75 cancelled: SIGTERM -> cancelled"


@pytest.mark.parametrize(("age", "state", "ending"), [(1.0, "running", None), (60.0, "silent", UNRECORDED_END)])
def test_slurm_that_does_not_answer(
    age: float, state: str, ending: str | None, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    write_history(run)
    beat(run, 0, age=age)
    status = read_status(run, NOW)
    assert f"state       {state} (SLURM does not answer for job 12)" in to_text(status)
    assert status.starts[-1].ending == ending


WITHOUT_SLURM = [
    ([], "not started", []),
    ([(1.0, False), (2.0, False)], "running", []),
    ([(1.0, False), (60.0, False)], "running", [1]),
    ([(60.0, False), (61.0, False)], "silent", [0, 1]),
    ([(9000.0, True), (9000.0, True)], "ended", []),
    ([(1.0, False), (5.0, True)], "running", [1]),
]


@pytest.mark.parametrize(("beats", "state", "silent"), WITHOUT_SLURM)
def test_without_slurm_heartbeats_tell(
    beats: list[tuple[float, bool]], state: str, silent: list[int], run: Path
) -> None:
    for rank, (age, ended) in enumerate(beats):
        beat(run, rank, age=age, ended=ended)
    status = read_status(run, NOW)
    assert (status.state, status.job, status.job_id, status.starts) == (state, None, None, [])
    assert [line.split()[1] for line in status.heartbeats.silent] == [str(rank) for rank in silent]


def test_many_silent_ranks_are_not_all_shown(run: Path) -> None:
    large = Layout(pp=2, tp=2, dp=10)
    (run / "config.yaml").write_text(dump_yaml(config(large)))
    for rank in range(40):
        beat(run, rank, age=60.0, layout=large)
    status = read_status(run, NOW)
    assert len(status.heartbeats.silent) == 40
    assert to_text(status).count("silent      rank") == 8 and "silent      and 32 more" in to_text(status)


@pytest.mark.parametrize("command", ["status", "logs"])
def test_no_such_run(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, message in (("none", "is no folder"), ("", "no run has begun there")):
        assert main([command, str(tmp_path / folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("lime-dist: RUN: ") and message in error and error.count("\n") == 1


def test_a_login_node_needs_no_torch(run: Path) -> None:
    (run / "slurm" / "logs").mkdir(parents=True)
    (run / "slurm" / "logs" / "12.0.rank_000.log").write_text("a line\n")
    code = (
        "import sys; from lime_dist.cli.command_line import main; "
        f"assert main(['status', {str(run)!r}]) == 0 == main(['logs', {str(run)!r}]); "
        "assert not {'torch', 'megatron', 'deepspeed'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "a line" in result.stdout and "not started" in result.stdout
