"""Reads documents from text files in chunks that can be parsed in any process.

`.jsonl`, `.json` and `.ndjson` hold one JSON object a line; `.txt` is one document, or one a line when
asked; each may be compressed (`.gz`, `.zst`). `.parquet` has a document a row. All text is UTF-8.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from lime_dist.data.arrow_files import ARROW_SUFFIXES, check_column, open_zstd, read_column, require_pyarrow
from lime_dist.errors import DataError

CHUNK_BYTES = 1 << 20
_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
_COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True, kw_only=True)
class TextFormat:
    """The `field` of JSON objects, or the column, that holds the text; whether each line of a `.txt` is a document."""

    field: str = "text"
    document_per_line: bool = False


DEFAULT_FORMAT = TextFormat()


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some whole lines of one file, texts of rows, or a whole `.txt`; `file_bytes` counts what was read of the (compressed) file."""

    path: Path
    first_line: int
    lines: tuple[bytes, ...]
    file_bytes: int


def read_chunks(paths: Sequence[Path], text_format: TextFormat) -> Iterator[Chunk]:
    """Cut the files, in the given order, into chunks of about `CHUNK_BYTES`.

    Raises: DataError on a file that is missing or of an unknown kind, before any is read, and on a broken one.
    """
    for path in paths:
        if not path.is_file():
            raise DataError(f"--input: {path} is not a file; check the path")
        suffix = _text_suffix(path)
        if path.suffix in ARROW_SUFFIXES:
            require_pyarrow(path)
        if suffix == ".parquet":
            check_column(path, text_format.field)
    for path in paths:
        if path.suffix == ".parquet":
            yield from _read_rows(path, text_format.field)
        else:
            yield from _read_text(path, text_format)


def _read_rows(path: Path, column: str) -> Iterator[Chunk]:
    first_row, reported_bytes, size = 1, 0, path.stat().st_size
    for rows, share in read_column(path, column):
        position = int(size * share)
        yield Chunk(path=path, first_line=first_row, lines=tuple(rows), file_bytes=position - reported_bytes)
        first_row, reported_bytes = first_row + len(rows), position


def _read_text(path: Path, text_format: TextFormat) -> Iterator[Chunk]:
    whole_file = _text_suffix(path) == ".txt" and not text_format.document_per_line
    try:
        with path.open("rb") as raw:
            yield from _cut(path, raw, _uncompressed(path, raw), whole_file)
    except (EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"--input: cannot read {path} ({error.strerror}); check its permissions") from None
        kind = "gzip" if path.suffix == ".gz" else "zstd"
        raise DataError(f"--input: {path} is not a whole {kind} file; compress it again") from None


def _uncompressed(path: Path, raw: BinaryIO) -> BinaryIO | gzip.GzipFile:
    if path.suffix == ".zst":
        return open_zstd(raw)
    return gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw


def parse_chunk(chunk: Chunk, text_format: TextFormat) -> Iterator[str]:
    """The documents of `chunk`, empty ones included. Raises: DataError, with file and line, on what cannot be read."""
    parse = _parser(chunk.path, text_format)
    for line_number, line in enumerate(chunk.lines, start=chunk.first_line):
        try:
            text = parse(line)
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"{chunk.path}:{line_number}: half a surrogate pair; fix or drop the document") from None
        except UnicodeDecodeError as error:
            if chunk.path.suffix != ".parquet":
                line_number += error.object.count(b"\n", 0, error.start)
            raise DataError(f"{chunk.path}:{line_number}: not UTF-8 ({error.reason}); convert the file") from None
        except ValueError as error:
            raise DataError(f"{chunk.path}:{line_number}: {error}") from None
        yield text


def read_documents(paths: Sequence[Path], text_format: TextFormat) -> Iterator[str]:
    """Every document of the files, in order."""
    for chunk in read_chunks(paths, text_format):
        yield from parse_chunk(chunk, text_format)


def _text_suffix(path: Path) -> str:
    suffix = Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix
    if suffix not in (".txt", *_JSON_SUFFIXES) and path.suffix != ".parquet":
        raise DataError(
            f"--input: cannot tell what {path} holds; name it .txt, .jsonl (or those with .gz or .zst) or .parquet"
        )
    return suffix


def _cut(path: Path, raw: BinaryIO, stream: BinaryIO | gzip.GzipFile, whole_file: bool) -> Iterator[Chunk]:
    batches = iter([[stream.read()]]) if whole_file else iter(lambda: stream.readlines(CHUNK_BYTES), [])
    first_line, reported_bytes = 1, 0
    for lines in batches:
        position = raw.tell()
        yield Chunk(path=path, first_line=first_line, lines=tuple(lines), file_bytes=position - reported_bytes)
        first_line, reported_bytes = first_line + len(lines), position


def _parser(path: Path, text_format: TextFormat) -> Callable[[bytes], str]:
    suffix = _text_suffix(path)
    if suffix == ".parquet":
        return bytes.decode
    if suffix != ".txt":
        return partial(_parse_json, field=text_format.field)
    return _parse_line if text_format.document_per_line else bytes.decode


def _parse_line(line: bytes) -> str:
    return line.decode().rstrip("\r\n")


def _parse_json(line: bytes, field: str) -> str:
    if not line.strip():
        return ""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not one JSON object a line ({error.msg}); fix the line") from None
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = f"it has {', '.join(map(repr, list(record)[:8]))}" if isinstance(record, dict) else "not an object"
        raise ValueError(f"no string in the field {field!r} ({found}); name another with --field")
    return text
