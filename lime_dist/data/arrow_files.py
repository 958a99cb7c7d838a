"""What pyarrow reads for us: a text column of a Parquet file, and what zstd has compressed. Knows no documents.

pyarrow is loaded when an input needs it; it is not of every install.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lime_dist.errors import DataError, one_line

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

ARROW_SUFFIXES = (".parquet", ".zst")
_BATCH_ROWS = 256  # what is held of a Parquet file, beside a page of the column
_BUFFER_BYTES = 1 << 20


def require_pyarrow(path: Path) -> None:
    """Raises: DataError."""
    if find_spec("pyarrow") is None:
        raise DataError(f"--input: {path} needs pyarrow; pip install 'lime_dist[arrow]'")


def open_zstd(raw: BinaryIO) -> io.BufferedReader:
    """The text of all frames. Its reads raise OSError without a number where it is cut short or damaged."""
    import pyarrow

    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
    return io.BufferedReader(stream, _BUFFER_BYTES)


def check_column(path: Path, column: str) -> None:
    """Raises: DataError where `path` is no Parquet file or has no such column of text."""
    from pyarrow import types

    with _opened(path) as file:
        schema = file.schema_arrow
        if column not in schema.names:
            found = ", ".join(map(repr, schema.names[:8]))
            raise DataError(f"--input: {path} has no column {column!r} (it has {found}); name another with --field")
        kind = schema.field(column).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(kind) or types.is_large_string(kind)):
            raise DataError(f"--input: column {column!r} of {path} holds {kind}, not text; name another with --field")


def read_column(path: Path, column: str) -> Iterator[tuple[list[bytes], float]]:
    """Some rows at a time, empty where they are null, and the share of the file's rows that is done. Raises: DataError."""
    import pyarrow

    done = 0
    with _opened(path) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[column], use_threads=False):
            texts = batch.column(0).cast(pyarrow.large_string()).cast(pyarrow.large_binary())
            done += len(texts)
            yield [text or b"" for text in texts.to_pylist()], done / file.metadata.num_rows


@contextmanager
def _opened(path: Path) -> Iterator[ParquetFile]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"--input: {path} is not a whole Parquet file ({one_line(error)}); write it again") from None
