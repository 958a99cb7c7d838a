"""A run whose newest checkpoint is damaged by chance goes on by itself from the one before it, and ends as one that nobody
disturbed. What damage cannot be told from a whole checkpoint changes nothing.

`--cases` counts tenths of a case: a start takes seconds.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from checkpoint_damage import (
    cut_or_lengthen,
    flip_any_bit,
    mutate_header,
    mutate_json,
    put_in_place,
    swap_tensors,
    zero_bytes,
)
from disturbed_runs import tensors_of

import lime_dist.training.run  # noqa: F401  (before ranks are forked: its imports take seconds)
from lime_dist.cli.command_line import main
from lime_dist.data.indexed import IndexedWriter

CONFIG = {
    "model": {"num_layers": 6, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "vocab_size": 96},
    "parallel": {"pp": 3},
    "pipeline": {"num_microbatches": 2},
    "optim": {"warmup_steps": 0, "lr_schedule": "constant"},
    "data": {"train": "train", "seq_length": 8, "global_batch_size": 4},
    "checkpoint": {"every": 1},
    "run": {"device": "cpu", "timeout_seconds": 60},
}
DAMAGES = (
    mutate_json,
    mutate_header,
    flip_any_bit,
    flip_any_bit,
    zero_bytes,
    swap_tensors,
    cut_or_lengthen,
    put_in_place,
)


def train(run_dir: Path, steps: int) -> int:
    return main(["train", "run.yaml", f"run.dir={run_dir}", f"run.steps={steps}"])


@pytest.mark.campaign
def test_every_automatic_resume_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_cases: int, case_seed: int, capfd: pytest.CaptureFixture[str]
) -> None:
    with IndexedWriter(tmp_path / "train", vocab_size=96) as writer:
        writer.add_document(np.minimum(np.random.default_rng(5).zipf(1.3, 2000), 95))
        writer.commit({"vocab_size": 96, "tokens": 2000})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(tmp_path)
    whole = tmp_path / "whole"
    assert train(whole, 2) == 0
    shutil.copytree(whole, tmp_path / "two")
    assert train(whole, 3) == 0
    expected, counts = tensors_of(whole / "checkpoints/step_000003"), Counter()
    for case in range(max(1, num_cases // 10)):
        draw, run = random.Random(f"{case_seed}/{case}"), tmp_path / str(case)
        shutil.copytree(tmp_path / "two", run)
        what = draw.choice(DAMAGES)(run / "checkpoints/step_000002", draw)
        capfd.readouterr()
        assert train(run, 3) == 0, f"case {case} ({what})"
        told = capfd.readouterr()
        assert "Traceback" not in told.err, f"case {case} ({what})"
        assert tensors_of(run / "checkpoints/step_000003") == expected, f"case {case} ({what})"
        counts["from the one before" if "step_000001, step 1 of 3" in told.out else "from the damaged one"] += 1
        shutil.rmtree(run)
    print(dict(counts))
    assert num_cases < 100 or counts["from the one before"] > counts["from the damaged one"]
