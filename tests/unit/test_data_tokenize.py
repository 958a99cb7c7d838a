"""Text to token files: content, order, independence of the number of workers, and failures that leave nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from lime_dist.data import documents
from lime_dist.data.checksums import RULE, block_digest
from lime_dist.data.documents import DEFAULT_FORMAT
from lime_dist.data.indexed import check_files, open_tokens
from lime_dist.data.tokenize import Encoder, Packing, tokenize_files
from lime_dist.data.tokenizer import load_tokenizer, train_tokenizer
from lime_dist.errors import DataError

TEXTS = [f"document {index}\n  reads   document {index * 7}\n" for index in range(60)]
EMPTY_AT = (0, 13, 59)
EOS_ID = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two text files, some of whose documents are empty, and a tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    lines = [json.dumps({"text": " \n" if index in EMPTY_AT else text}) + "\n" for index, text in enumerate(TEXTS)]
    (folder / "a.jsonl").write_text("".join(lines[:40]))
    (folder / "b.jsonl").write_text("".join(lines[40:]))
    train_tokenizer([folder / "a.jsonl"], folder / "tokenizer", vocab_size=290)
    return folder


def tokenize(folder: Path, prefix: Path, **options: object) -> None:
    tokenize_files([folder / "a.jsonl", folder / "b.jsonl"], folder / "tokenizer.model", prefix, **options)


def stored_documents(prefix: Path) -> list[np.ndarray]:
    files = check_files(str(prefix))
    return np.split(open_tokens(files), files.document_bounds[1:-1])


def test_every_document_comes_back_in_order(folder: Path, tmp_path: Path) -> None:
    report = tokenize_files([folder / "a.jsonl", folder / "b.jsonl"], folder / "tokenizer.model", tmp_path / "t")
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    stored = stored_documents(tmp_path / "t")
    assert all(tokens[-1] == EOS_ID for tokens in stored)
    texts = [tokenizer.decode(tokens[:-1].tolist()) for tokens in stored]
    assert texts == [text for index, text in enumerate(TEXTS) if index not in EMPTY_AT]
    assert (report.num_documents, report.num_empty, report.num_tokens) == (57, 3, sum(map(len, stored)))
    assert "3 empty documents skipped" in str(report)


def test_meta_file(folder: Path, tmp_path: Path) -> None:
    tokenize(folder, tmp_path / "t")
    assert json.loads((tmp_path / "t.meta.json").read_text()) == {
        "vocab_size": 290,
        "tokenizer_sha256": hashlib.sha256((folder / "tokenizer.model").read_bytes()).hexdigest(),
        "documents": 57,
        "tokens": check_files(str(tmp_path / "t")).num_tokens,
        RULE: {suffix: block_digest(tmp_path / f"t.{suffix}") for suffix in ("bin", "idx")},
    }


def test_the_number_of_workers_does_not_show(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "CHUNK_BYTES", 200)  # some 25 chunks, more than the workers may hold at once
    tokenize(folder, tmp_path / "one")
    tokenize(folder, tmp_path / "two", workers=2)
    for suffix in ("bin", "idx", "meta.json"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()


def test_without_the_end_token(folder: Path, tmp_path: Path) -> None:
    tokenize(folder, tmp_path / "t", packing=Packing(append_eos=False))
    assert all(EOS_ID not in tokens for tokens in stored_documents(tmp_path / "t"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_malformed_line_is_named_and_nothing_is_left(folder: Path, tmp_path: Path, workers: int) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n{"body": "no text"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: no string in the field 'text'"):
        tokenize_files([path], folder / "tokenizer.model", tmp_path / "t", workers=workers)
    assert list(tmp_path.iterdir()) == [path]


def test_text_that_is_empty_throughout(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("  \n")
    with pytest.raises(DataError, match="--input: no document has text"):
        tokenize_files([path], folder / "tokenizer.model", tmp_path / "t")
    assert list(tmp_path.iterdir()) == [path]


def test_a_tokenizer_without_end_token(folder: Path, tmp_path: Path) -> None:
    from sentencepiece import SentencePieceTrainer

    with (tmp_path / "bare.model").open("wb") as stream:
        SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=stream, vocab_size=40, eos_id=-1, minloglevel=2
        )
    with pytest.raises(DataError, match="--no-append-eos"):
        Encoder(tmp_path / "bare.model", DEFAULT_FORMAT)
    assert Encoder(tmp_path / "bare.model", DEFAULT_FORMAT, Packing(append_eos=False)).vocab_size == 40
