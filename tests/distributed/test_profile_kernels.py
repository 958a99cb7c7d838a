"""profile.kernels in real runs: torch's operators lie in the pieces of ours that ran them."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from lime_dist.cli.command_line import main
from lime_dist.data.indexed import IndexedWriter
from lime_dist.profiling.profile_files import find_profile, read_profile
from lime_dist.profiling.timeline import read_timelines
from lime_dist.profiling.trace import write_trace

BASE = {
    "model": {"num_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "vocab_size": 96},
    "parallel": {"pp": 2},
    "pipeline": {"num_microbatches": 3, "min_message": 0},
    "optim": {"warmup_steps": 0},
    "data": {"train": "train", "seq_length": 12, "global_batch_size": 12},
    "run": {"dir": "run", "device": "cpu", "steps": 4, "timeout_seconds": 60},
    "profile": {"steps": [2, 3]},
}
CLOCK_US = 200  # by which torch.profiler's clock may be off, which it sets by the time of day when it starts


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with IndexedWriter(tmp_path / "train", vocab_size=96) as writer:
        for document in np.random.default_rng(5).integers(0, 96, (40, 40)):
            writer.add_document(document)
        writer.commit({"vocab_size": 96, "tokens": 1600})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def record(run_dir: str, *more: str) -> Path:
    assert main(["train", "run.yaml", f"run.dir={run_dir}", *more]) == 0
    return find_profile(Path(run_dir))


def outside(spans: list[tuple[float, float]], events: list[dict]) -> Iterator[dict]:
    for event in events:
        if not any(
            begin - CLOCK_US <= event["ts"] and event["ts"] + event["dur"] <= end + CLOCK_US for begin, end in spans
        ):
            yield event


def test_operators_lie_within_the_passes_that_ran_them(folder: Path) -> None:
    profile = read_profile(record("run", "profile.kernels=true"))
    (path,) = write_trace(profile, list(read_timelines(profile)), "trace.json")
    passes: dict[int, list[tuple[float, float]]] = defaultdict(list)
    products: dict[int, list[dict]] = defaultdict(list)
    for event in json.loads(path.read_text())["traceEvents"]:
        rank = event["pid"] // 10 - 1
        if event["ph"] == "X" and event["cat"] == "compute":
            passes[rank].append((event["ts"], event["ts"] + event["dur"]))
        elif event["name"] == "aten::mm":
            products[rank].append(event)
    assert set(products) == set(passes) == {0, 1}
    for rank in products:
        assert len(products[rank]) > 2 * 3 * 2 * 6, "of two steps, three microbatches and two layers"
        assert not list(outside(passes[rank], products[rank]))
        later = [event | {"ts": event["ts"] + 20 * CLOCK_US} for event in products[rank]]
        assert list(outside(passes[rank], later))


def test_only_a_profile_that_asks_for_them_has_kernels(folder: Path) -> None:
    first = record("run", "profile.kernels=true")
    names = {"rank_0.kernels.json.gz", "rank_1.kernels.json.gz"}
    assert {path.name for path in first.glob("*kernels*")} == names
    shutil.rmtree(folder / "run" / "checkpoints")
    assert record("run") == first
    assert not list(first.glob("*kernels*")), "those of the earlier recording would be taken for its own"
