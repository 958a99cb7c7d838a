"""A token id that the model lacks ends a run in the same way under every layout: one line, exit code 2."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from lime_dist.cli.command_line import main

BASE = {
    "model": {"num_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "vocab_size": 96},
    "data": {"train": "train", "seq_length": 8, "global_batch_size": 4},
    "run": {"dir": "run", "steps": 50, "device": "cpu", "timeout_seconds": 60},
}


@pytest.mark.parametrize("token_id", [-1, 96])
@pytest.mark.parametrize("layout", ["parallel.tp=1", "parallel.tp=2", "parallel.pp=2"])
def test_an_id_outside_the_vocabulary(
    layout: str, token_id: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of files without a meta file, whose dtype has a sign, as Megatron's tools write them."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(yaml.safe_dump(BASE))
    builder = IndexedDatasetBuilder("train.bin", dtype=np.int32)
    builder.add_document(np.where(np.arange(400) == 250, token_id, np.arange(400) % 96), [400])
    builder.finalize("train.idx")
    assert main(["train", "run.yaml", layout]) == 2
    told = capfd.readouterr().err
    line = rf"lime-dist: data\.train: train has the token id {token_id}, the model a vocabulary of 96; tokenize again"
    assert re.match(line, told.splitlines()[-1]) and "Traceback" not in told, told
