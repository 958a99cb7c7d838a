"""metrics.jsonl, TensorBoard and the progress line, and what becomes of them when a run is resumed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lime_dist.training.metrics import Metrics
from lime_dist.training.spikes import SpikeEvent, SpikeState

KEYS = [
    "step", "loss", "grad_norm", "lr", "router_lr", "tokens_per_second", "tokens_seen", "model_flops", "step_seconds",
    "boundary_bytes", "peak_resident_bytes", "time",
]  # fmt: skip


def record(run_dir: Path, steps: range, *, loss: float, num_steps: int = 6, log_every: int = 1, **more: float) -> None:
    """A run's `steps`, as after a resume at the step before; every loss is `loss`."""
    metrics = Metrics(run_dir, first_step=steps.start - 1, num_steps=num_steps, log_every=log_every, **more)
    for step in steps:
        metrics.step(
            step=step,
            loss=loss,
            grad_norm=2.0,
            lr=0.5,
            tokens=1000,
            tokens_seen=1000 * step,
            model_flops=3_000_000,
            step_seconds=0.25,
            boundary_bytes=[1500, 2_000_000],
            router_lr=5.0,
            peak_memory={"peak_resident_bytes": 3 * 2**30},
        )
        if step % 2 == 0:
            metrics.evaluation(step=step, eval_loss=loss, eval_seconds=0.5)
    metrics.close()


def read(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_a_step(tmp_path: Path) -> None:
    before = round(time.time(), 3)
    record(tmp_path, range(1, 3), loss=4.5)
    first, second, evaluation = read(tmp_path)
    assert list(first) == KEYS and (first["step"], second["step"]) == (1, 2)
    assert before <= first["time"] <= second["time"] <= evaluation["time"] <= round(time.time(), 3)
    assert first | {"step": 2, "tokens_seen": 2000, "time": second["time"]} == second
    assert (first["tokens_seen"], first["model_flops"]) == (1000, 3_000_000)
    assert (first["loss"], first["grad_norm"], first["lr"], first["step_seconds"]) == (4.5, 2.0, 0.5, 0.25)
    assert first["tokens_per_second"] == 4000 and first["boundary_bytes"] == [1500, 2_000_000]
    assert (first["router_lr"], first["peak_resident_bytes"]) == (5.0, 3 * 2**30)
    assert evaluation == {"step": 2, "eval_loss": 4.5, "eval_seconds": 0.5, "time": evaluation["time"]}


def test_lines_after_the_resumed_step_go(tmp_path: Path) -> None:
    record(tmp_path, range(1, 6), loss=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # the line that a killed run was writing
    record(tmp_path, range(4, 7), loss=2.0)
    lines = read(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines if "loss" in line] == [1.0] * 3 + [2.0] * 3
    assert [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line] == [
        (2, 1.0),
        (4, 2.0),
        (6, 2.0),
    ]


def test_tensorboard_follows(tmp_path: Path) -> None:
    record(tmp_path, range(1, 6), loss=1.0)
    record(tmp_path, range(4, 7), loss=2.0)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = board.Scalars("train/loss")
    assert [(point.step, point.value) for point in points] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]
    assert [point.value for point in board.Scalars("boundary_bytes/1-2")] == [2_000_000] * 6
    assert [point.step for point in board.Scalars("eval/loss")] == [2, 4, 6]


def test_what_tensorboard_has_beside_the_losses(tmp_path: Path) -> None:
    record(tmp_path, range(1, 3), loss=1.0)
    metrics = Metrics(tmp_path, first_step=2, num_steps=6, log_every=1)
    metrics.config("run:\n  steps: 6\n", step=2)
    metrics.saved(step=2, folder=tmp_path, seconds=2.0, wait_seconds=0.5)
    metrics.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name, value in (("router_lr", 5.0), ("peak_resident_bytes", 3 * 2**30)):
        assert [point.value for point in board.Scalars(f"train/{name}")] == [value] * 2
    assert [point.value for point in board.Scalars("train/tokens_seen")] == [1000, 2000]
    for name, value in (("save_seconds", 2.0), ("save_wait_seconds", 0.5)):
        assert [(point.step, point.value) for point in board.Scalars(f"checkpoint/{name}")] == [(2, value)]
    (text,) = board.Tensors("config/text_summary")
    assert (text.step, text.tensor_proto.string_val) == (2, [b"    run:\n      steps: 6\n"])


def test_utilization(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, range(1, 3), loss=4.5, peak_flops=48e6)
    assert [line["mfu"] for line in read(tmp_path) if "loss" in line] == [3e6 / (0.25 * 48e6)] * 2
    assert capsys.readouterr().out.count("  4.0k tok/s  mfu 25.0%  sent ") == 2
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [point.value for point in board.Scalars("train/mfu")] == [0.25] * 2
    assert [point.value for point in board.Scalars("train/tokens_seen")] == [1000, 2000]


def test_progress_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, range(1, 11), loss=4.5, num_steps=310, log_every=10)
    said = [line for line in capsys.readouterr().out.splitlines() if "held-out" not in line]
    assert said == [
        "step  10/310  loss 4.5000  grad 2.000  lr 5.00e-01  4.0k tok/s  sent 1.9MiB, most 1>2 1.9MiB  left 1:15"
    ]


def long_line(
    run_dir: Path, capsys: pytest.CaptureFixture[str], *, peak_flops: float | None = None, **facts: Any
) -> str:
    """The first step of a long and large run, whose numbers are wide."""
    known: dict[str, Any] = {
        "num_steps": 500_000, "loss": 10.12345, "grad_norm": 9.876, "tokens": 4_000_000, "model_flops": 0, "step_seconds": 4.01,
    }  # fmt: skip
    known |= facts
    metrics = Metrics(run_dir, first_step=0, num_steps=known.pop("num_steps"), log_every=1, peak_flops=peak_flops)
    metrics.step(step=1, lr=1e-3, tokens_seen=known["tokens"], **known)
    metrics.close()
    (line,) = capsys.readouterr().out.splitlines()
    assert len(line) <= 120
    return line


def bytes_of(num_stages: int, most: int = 61) -> list[int]:
    return [12_345_678_901 + (boundary == most) for boundary in range(num_stages - 1)]


@pytest.mark.parametrize(
    ("num_stages", "said"), ((1, ""), (2, "sent 11.5GiB"), (64, "sent 724.4GiB, most 61>62 11.5GiB"))
)
def test_progress_lines_fit_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], num_stages: int, said: str
) -> None:
    line = long_line(tmp_path, capsys, num_steps=90_000, boundary_bytes=bytes_of(num_stages))
    assert line.partition(" tok/s")[2] == (f"  {said}" if said else "") + "  left 100:14:56"


def test_what_finds_no_room_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The busiest boundary first, then the bytes: they are in metrics.jsonl, and the same at every step."""
    facts = {"peak_flops": 16 * 989e12, "model_flops": 26_145_000_000_000_000}
    line = long_line(tmp_path, capsys, boundary_bytes=bytes_of(64), **facts)
    assert line.endswith(" tok/s  mfu 41.2%  sent 724.4GiB  left 556:56:36")
    line = long_line(tmp_path, capsys, num_steps=90_000, boundary_bytes=bytes_of(512, most=500))
    assert line.endswith(" tok/s  sent 5.7TiB, most 500>501 11.5GiB  left 100:14:56")
    line = long_line(tmp_path, capsys, num_steps=90_000, boundary_bytes=bytes_of(512, most=500), **facts)
    assert line.endswith(" tok/s  mfu 41.2%  sent 5.7TiB  left 100:14:56")


def test_the_widest_progress_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = long_line(
        tmp_path,
        capsys,
        peak_flops=1e3,
        num_steps=10**9,
        loss=123456.789,
        grad_norm=123456.789,
        tokens=999_400 * 100,
        model_flops=10**6,
        step_seconds=100.0,
        boundary_bytes=[999_400_000_000_000] * 511,
    )
    assert line == (
        "step          1/1000000000  loss 1.235e+05  grad 1.23e+05  lr 1.00e-03  999.4k tok/s  mfu 1e+03%  left 27777777:45:00"
    )


def test_the_last_step_is_always_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record(tmp_path, range(1, 4), loss=4.5, num_steps=3, log_every=10)
    out = capsys.readouterr().out
    assert "step 3/3  loss 4.5000" in out and "step 2/3  loss" not in out
    assert "step 2/3  held-out loss 4.5000" in out


def test_the_last_evaluation_is_known(tmp_path: Path) -> None:
    """Of those that are left: a start that goes back has lost the later ones."""
    record(tmp_path, range(1, 6), loss=1.0)
    for first_step, evaluated in ((5, 4), (3, 2), (1, None), (0, None)):
        metrics = Metrics(tmp_path, first_step=first_step, num_steps=6, log_every=1)
        assert metrics.evaluated_step == evaluated
        metrics.close()


def test_a_profile_that_cannot_be_read_yet_does_not_end_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = Metrics(tmp_path, first_step=0, num_steps=1, log_every=1)
    metrics.profiled(tmp_path / "profile" / "steps_1-2")
    assert "no profile there" in capsys.readouterr().err
    metrics.close()


def test_what_was_done_about_a_bad_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = SpikeState(num_skipped=3, num_returns=1, samples_passed_over=24)
    event = SpikeEvent(step=4, bad_step=9, action="returned", reason="the loss is nan", outcome="back", state=state)
    metrics = Metrics(tmp_path, first_step=0, num_steps=9, log_every=1)
    metrics.spike(event)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()  # before the end, which may not come
    assert [(point.step, point.value) for point in board.Scalars("spikes/skipped_steps")] == [(4, 3)]
    assert [point.step for point in board.Tensors("spikes/text_summary")] == [4]
    assert read(tmp_path) == [
        {
            "step": 4, "spike": "returned", "bad_step": 9, "reason": "the loss is nan", "skipped_steps": 3, "returns": 1,
            "samples_passed_over": 24, "time": read(tmp_path)[0]["time"],
        }
    ]  # fmt: skip
    assert capsys.readouterr().out == "step 9: the loss is nan; back\n"
    metrics.close()
