"""Files that may come from anybody, and files that must outlast a power cut. Needs no torch."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from lime_dist.errors import CheckpointError, one_line

_MAX_JSON_BYTES = 256 * 2**20
_MAX_MESSAGE = 300  # characters of what others say is wrong


def refuse(path: Path, problem: str) -> NoReturn:
    raise CheckpointError(f"checkpoint {path}: {problem}; name another checkpoint")


def brief(error: BaseException) -> str:
    """The error's text on one line, cut where a value in it is long."""
    return one_line(error)[:_MAX_MESSAGE]


def file_size(path: Path) -> int:
    """Bytes of a regular file. Raises: CheckpointError for anything else, which might block, or lead out of the folder."""
    try:
        status = path.lstat()
    except OSError as error:
        refuse(path, error.strerror or "cannot be read")
    if not stat.S_ISREG(status.st_mode):
        refuse(path, "no regular file")
    return status.st_size


def read_bytes(path: Path) -> bytes:
    """Of a small regular file. Raises: CheckpointError."""
    if file_size(path) > _MAX_JSON_BYTES:
        refuse(path, f"larger than {_MAX_JSON_BYTES >> 20} MiB")
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return file.read(_MAX_JSON_BYTES)
    except OSError as error:
        refuse(path, error.strerror or "cannot be read")


def parse_json(path: Path, text: bytes) -> Any:
    """What `text`, read from `path`, says. Raises: CheckpointError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        refuse(path, "cut short or not JSON")


def read_json(path: Path) -> Any:
    """Raises: CheckpointError."""
    return parse_json(path, read_bytes(path))


def write_bytes(path: Path, content: bytes) -> None:
    """Written through to the disk, so that a rename after it never uncovers an empty file."""
    path.write_bytes(content)
    flush_to_disk(path)


def flush_to_disk(path: Path) -> None:
    """A file's bytes, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
