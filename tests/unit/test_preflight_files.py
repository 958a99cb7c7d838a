"""What is refused of a run's files before ranks start, and what is only warned of."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from lime_dist.config import parse_config
from lime_dist.data.indexed import IndexedWriter
from lime_dist.data.tokenize import tokenize_files
from lime_dist.data.tokenizer import train_tokenizer
from lime_dist.errors import DataError
from lime_dist.preflight.input_files import check_files

VOCAB_SIZE = 290
BASE = {
    "model": {"num_layers": 2, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "vocab_size": VOCAB_SIZE},
    "data": {"train": "train", "seq_length": 8, "global_batch_size": 4},
    "eval": {"batches": 2},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tokenizers of one size, with the same text in the ids of each: `train` and `valid`, `other`."""
    folder = tmp_path_factory.mktemp("files")
    for name, word in (("tokenizer", "one"), ("strange", "sixteen")):
        (folder / "text.txt").write_text("".join(f"line {word} {index}\n" for index in range(200)))
        train_tokenizer([folder / "text.txt"], folder / name, vocab_size=VOCAB_SIZE, workers=1)
    for name, tokenizer in (("train", "tokenizer"), ("valid", "tokenizer"), ("other", "strange")):
        tokenize_files([folder / "text.txt"], folder / f"{tokenizer}.model", folder / name)
    write_tokens(folder / "documents", [30] * 50)
    write_tokens(folder / "short", [8])
    for suffix in ("bin", "idx"):
        shutil.copy(folder / f"train.{suffix}", folder / f"bare.{suffix}")
    return folder


def write_tokens(prefix: Path, lengths: list[int]) -> None:
    with IndexedWriter(prefix, vocab_size=VOCAB_SIZE) as writer:
        for length in lengths:
            writer.add_document(np.arange(length))
        writer.commit({"vocab_size": VOCAB_SIZE, "tokens": sum(lengths)})


@pytest.fixture(autouse=True)
def in_files(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)


REFUSED = {
    "data.tokenizer=strange.model": (
        r"data\.tokenizer: strange\.model is not the tokenizer that made data\.train train \(sha256 \w+, not \w+\); name that"
    ),
    "data.train=other data.valid=valid data.tokenizer=strange.model": (
        r"data\.tokenizer: strange\.model is not the tokenizer that made data\.valid valid "
    ),
    "data.valid=other": r"data\.valid: other was made by another tokenizer than data\.train train; run lime-dist data tok",
    "data.train=[train,other]": r"data\.train: other was made by another tokenizer than data\.train train; run",
    "data.train=documents data.valid_fraction=0.005": (
        r"data\.valid_fraction: leaves 0 of 50 documents of documents for validation, 0 tokens, one .* needs 9; raise it, "
    ),
    "data.train=documents data.valid_fraction=0.999": (
        r"data\.valid_fraction: leaves 0 of 50 documents of documents for training, 0 tokens, one .* needs 9; lower it, "
    ),
    "data.train=documents data.valid_fraction=0.1 data.seq_length=150": (
        r"data\.valid_fraction: leaves 5 of 50 documents .* for validation, 150 tokens, one sample needs 151; raise it, lower "
    ),
    "data.train=short": r"data\.train: short has 8 tokens, one sample needs 9; lower data\.seq_length or add text",
    "data.train=documents data.samples=padded": (
        r"data\.train: documents has a document of 30 tokens, a sample of whole documents holds 9; set data\.seq_length=29 or"
    ),
    "data.train=short data.valid=documents data.samples=packed": (
        r"data\.valid: documents has a document of 30 tokens, a sample of whole documents holds 9; set data\.seq_length=29 or"
    ),
    "data.train=documents data.samples=padded data.seq_length=29 data.valid_fraction=0.005": (
        r"data\.valid_fraction: leaves 0 of 50 documents of documents for validation; raise it or add text"
    ),
    "data.valid=short": r"data\.valid: short has 8 tokens, one sample needs 9; lower data\.seq_length or add text",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_refused(overrides: str) -> None:
    with pytest.raises(DataError, match=f"^{REFUSED[overrides]}"):
        check_files(parse_config(BASE, overrides.split()))


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "data.valid=valid data.tokenizer=tokenizer.model",
        "data.train=documents data.tokenizer=tokenizer.model",
        "data.train=documents data.valid_fraction=0.1",
        "data.train=documents data.valid_fraction=0.1 data.seq_length=149 data.global_batch_size=1 eval.batches=1",
        "data.train=short data.seq_length=7",
        "data.train=short data.samples=padded",
        "data.train=documents data.samples=packed data.seq_length=60 data.valid_fraction=0.4",
    ],
)
def test_accepted_without_a_word(overrides: str, capsys: pytest.CaptureFixture[str]) -> None:
    check_files(parse_config(BASE, overrides.split()))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ("data.train=bare", "lime-dist: warning: data.train: bare has no checksums in a .meta.json, "),
        (
            "data.train=documents data.valid_fraction=0.1 data.samples=packed data.seq_length=59",
            "lime-dist: warning: eval.batches: 2 batches are 8 samples, the held-out text has 3, so some count more than once",
        ),
        (
            "data.train=documents data.valid_fraction=0.02",
            "lime-dist: warning: eval.batches: 2 batches are 8 samples, the held-out text has 3, so some count more than once",
        ),
    ],
)
def test_warned_of_by_one_rank(
    overrides: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse_config(BASE, overrides.split())
    check_files(config)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_files(config)
    assert capsys.readouterr().err == ""
