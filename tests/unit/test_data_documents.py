"""Reading of documents: formats, gzip, chunking, and what is said about files that cannot be read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from lime_dist.data import documents
from lime_dist.data.documents import DEFAULT_FORMAT, TextFormat, read_chunks, read_documents
from lime_dist.errors import DataError

TEXTS = ["one\ntwo", "", "  spaced  out ", "naïve 日本"]


def write_json_lines(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_json_lines_keep_order_and_text(tmp_path: Path) -> None:
    first = write_json_lines(tmp_path / "a.jsonl", TEXTS)
    second = write_json_lines(tmp_path / "b.json", ["last"])
    assert list(read_documents([first, second], DEFAULT_FORMAT)) == [*TEXTS, "last"]


def test_another_field(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.ndjson", TEXTS, field="body")
    assert list(read_documents([path], TextFormat(field="body"))) == TEXTS


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_txt_is_one_document_or_one_a_line(tmp_path: Path, name: str) -> None:
    path, data = tmp_path / name, b"one\r\n  two \n\nthree\n"
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert list(read_documents([path], DEFAULT_FORMAT)) == [data.decode()]
    assert list(read_documents([path], TextFormat(document_per_line=True))) == ["one", "  two ", "", "three"]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_chunks_cover_the_file_and_its_bytes_once(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "CHUNK_BYTES", 100)
    path = write_json_lines(tmp_path / "a.jsonl", [f"document {index}" for index in range(50)])
    lines = tuple(path.read_bytes().splitlines(keepends=True))
    if suffix.endswith(".gz"):
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(gzip.compress(b"".join(lines)))
    chunks = list(read_chunks([path], DEFAULT_FORMAT))
    assert len(chunks) > 5
    assert tuple(line for chunk in chunks for line in chunk.lines) == lines
    assert [chunk.first_line for chunk in chunks] == [1 + lines.index(chunk.lines[0]) for chunk in chunks]
    assert sum(chunk.file_bytes for chunk in chunks) == path.stat().st_size


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{not json}\n", r"a\.jsonl:3: not one JSON object a line"),
        (b'["text"]\n', r"a\.jsonl:3: no string in the field 'text' \(not an object\); name another with --field"),
        (b'{"body": "x"}\n', r"a\.jsonl:3: no string in the field 'text' \(it has 'body'\); name another with --field"),
        (b'{"text": 7}\n', r"a\.jsonl:3: no string in the field 'text'"),
        (b'{"text": "\xff"}\n', r"a\.jsonl:3: not UTF-8"),
        (b'{"text": "\\ud800"}\n', r"a\.jsonl:3: half a surrogate pair"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: bytes, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "CHUNK_BYTES", 1)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line)
    with pytest.raises(DataError, match=said) as caught:
        list(read_documents([path], DEFAULT_FORMAT))
    assert "\n" not in str(caught.value)


def test_the_line_of_a_bad_byte_in_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\n\xff\n")
    with pytest.raises(DataError, match=r"a\.txt:3: not UTF-8"):
        list(read_documents([path], DEFAULT_FORMAT))


def test_a_gzip_file_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"text " * 1000)[:-10])
    with pytest.raises(DataError, match=r"a\.txt\.gz is not a whole gzip file"):
        list(read_documents([path], DEFAULT_FORMAT))


@pytest.mark.parametrize(("name", "said"), [("missing.jsonl", "is not a file"), ("a.parquet.gz", "cannot tell what")])
def test_bad_files_are_found_before_any_is_read(tmp_path: Path, name: str, said: str) -> None:
    good = write_json_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "a.parquet.gz").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=said):
        next(read_documents([good, tmp_path / name], DEFAULT_FORMAT))
