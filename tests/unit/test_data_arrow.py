"""Parquet and zstd as inputs: the documents of the same text in .jsonl, damage in one line, memory that does not grow."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from lime_dist.cli.command_line import main
from lime_dist.data import arrow_files
from lime_dist.data.documents import DEFAULT_FORMAT, TextFormat, read_chunks, read_documents
from lime_dist.data.tokenizer import train_tokenizer
from lime_dist.errors import DataError

pyarrow = pytest.importorskip("pyarrow", reason="the extra lime_dist[arrow] is not installed")
from pyarrow import parquet  # noqa: E402

TEXTS = [f"document {index} holds\nsome words, naïve ones too: {'more ' * (index % 7)}" for index in range(1500)]
JSON_LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def write(path: Path, column: str = "text") -> Path:
    """TEXTS, in the form that the name says."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.table({"id": [0] * len(TEXTS), column: TEXTS}), path, row_group_size=400)
    else:
        text = JSON_LINES if ".jsonl" in path.suffixes else "\n".join(TEXTS).encode()
        half = len(text) // 2  # two frames, as a compressor of several threads writes them
        path.write_bytes(b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in (text[:half], text[half:])))
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst"])
def test_the_documents_are_those_of_json_lines(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    assert list(read_documents([path], DEFAULT_FORMAT)) == TEXTS
    chunks = list(read_chunks([path], DEFAULT_FORMAT))
    assert sum(chunk.file_bytes for chunk in chunks) == path.stat().st_size


def test_text_in_zstd(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt.zst")
    assert list(read_documents([path], DEFAULT_FORMAT)) == ["\n".join(TEXTS)]
    assert list(read_documents([path], TextFormat(document_per_line=True))) == "\n".join(TEXTS).split("\n")


def test_rows_of_other_kinds(tmp_path: Path) -> None:
    texts = ["one", None, "", "two"]
    for kind in (pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        parquet.write_table(pyarrow.table({"body": pyarrow.array(texts).cast(kind)}), tmp_path / "a.parquet")
        assert list(read_documents([tmp_path / "a.parquet"], TextFormat(field="body"))) == ["one", "", "", "two"]


def test_a_few_rows_are_held_at_a_time(tmp_path: Path) -> None:
    sizes = [len(chunk.lines) for chunk in read_chunks([write(tmp_path / "a.parquet")], DEFAULT_FORMAT)]
    assert sum(sizes) == len(TEXTS) and max(sizes) <= arrow_files._BATCH_ROWS


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_bytes(JSON_LINES)
    return train_tokenizer([tmp_path / "a.jsonl"], tmp_path / "tokenizer", vocab_size=300, workers=1)


def tokenize(tokenizer: Path, path: Path, out: Path, *options: str) -> int:
    return main(["data", "tokenize", "--input", str(path), "--tokenizer", str(tokenizer), "--out", str(out), *options])


def test_token_files_are_the_same(tmp_path: Path, tokenizer: Path) -> None:
    """Whatever form the text has, and however many threads."""
    assert tokenize(tokenizer, tmp_path / "a.jsonl", tmp_path / "expected", "--workers", "1") == 0
    for name, workers in (("a.parquet", 1), ("a.parquet", 3), ("a.jsonl.zst", 3)):
        out = tmp_path / f"{name}-{workers}"
        assert tokenize(tokenizer, write(tmp_path / name), out, "--workers", str(workers)) == 0
        for suffix in ("bin", "idx"):
            assert Path(f"{out}.{suffix}").read_bytes() == (tmp_path / f"expected.{suffix}").read_bytes()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def spoil(path: Path) -> None:
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(data[:middle] + b"\xff" * 2000 + data[middle + 2000 :])


DAMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("a.parquet", cut, r" is not a whole Parquet file \("),
    ("a.parquet", spoil, r"( is not a whole Parquet file \(|:\d+: not UTF-8)"),
    ("a.jsonl.zst", cut, " is not a whole zstd file; compress it again"),
    ("a.jsonl.zst", spoil, " is not a whole zstd file; compress it again"),
]


@pytest.mark.parametrize(("name", "damage", "said"), DAMAGES)
def test_damage_is_one_line_and_leaves_nothing(
    name: str,
    damage: Callable[[Path], None],
    said: str,
    tmp_path: Path,
    tokenizer: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path / name)
    damage(path)
    before = set(tmp_path.iterdir())
    capsys.readouterr()
    assert tokenize(tokenizer, path, tmp_path / "tokens") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"lime-dist: (--input: )?{path}{said}", line), line
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("body", r"has no column 'body' \(it has 'id', 'text'\); name another with --field"),
        ("id", "holds int64, not text"),
    ],
)
def test_columns_that_are_no_text(tmp_path: Path, field: str, said: str) -> None:
    """Before any input is read."""
    inputs = [tmp_path / "first.jsonl", write(tmp_path / "a.parquet")]
    inputs[0].write_bytes(b"no JSON")
    with pytest.raises(DataError, match=said):
        next(read_chunks(inputs, TextFormat(field=field)))


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_files, "find_spec", lambda name: None)
    for name in ("a.parquet", "a.jsonl.zst"):
        with pytest.raises(DataError, match=rf"{name} needs pyarrow; pip install 'lime_dist\[arrow\]'"):
            next(read_chunks([write(tmp_path / name)], DEFAULT_FORMAT))
