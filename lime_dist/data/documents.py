"""Reads documents from text files in chunks that can be parsed in any process.

`.jsonl`, `.json` and `.ndjson` hold one JSON object a line; `.txt` is one document, or one a line when
asked; each may be gzipped (`.gz`). All text is UTF-8.
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

from lime_dist.errors import DataError

CHUNK_BYTES = 1 << 20
_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")


@dataclass(frozen=True, kw_only=True)
class TextFormat:
    """The JSON `field` that holds the text, and whether each line of a `.txt` is a document."""

    field: str = "text"
    document_per_line: bool = False


DEFAULT_FORMAT = TextFormat()


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some whole lines of one file, or a whole `.txt`; `file_bytes` counts what was read of the (compressed) file."""

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
        _text_suffix(path)
    for path in paths:
        whole_file = _text_suffix(path) == ".txt" and not text_format.document_per_line
        try:
            with path.open("rb") as raw:
                stream = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
                yield from _cut(path, raw, stream, whole_file)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            raise DataError(f"--input: {path} is not a whole gzip file; compress it again") from None
        except OSError as error:
            raise DataError(f"--input: cannot read {path} ({error.strerror}); check its permissions") from None


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
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in (".txt", *_JSON_SUFFIXES):
        raise DataError(f"--input: cannot tell what {path} holds; name it .txt or .jsonl (or .txt.gz, .jsonl.gz)")
    return suffix


def _cut(path: Path, raw: BinaryIO, stream: BinaryIO | gzip.GzipFile, whole_file: bool) -> Iterator[Chunk]:
    batches = iter([[stream.read()]]) if whole_file else iter(lambda: stream.readlines(CHUNK_BYTES), [])
    first_line, reported_bytes = 1, 0
    for lines in batches:
        position = raw.tell()
        yield Chunk(path=path, first_line=first_line, lines=tuple(lines), file_bytes=position - reported_bytes)
        first_line, reported_bytes = first_line + len(lines), position


def _parser(path: Path, text_format: TextFormat) -> Callable[[bytes], str]:
    if _text_suffix(path) != ".txt":
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
