"""Is run.dir one and the same folder on every host? Rank 0 makes a folder in it, each host leaves a file there.

All of it is removed again. Knows no ranks' meeting: whoever calls says when.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from lime_dist.errors import ConfigError

VISIBLE_SECONDS = 5.0  # a network file system may show a new name late


def make_folder(run_dir: Path, name: str) -> str | None:
    """By rank 0; what is wrong, or None. Raises: ConfigError for a full disk, which is no host's fault."""
    try:
        (run_dir / name).mkdir(parents=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConfigError(f"run.dir: {run_dir}: {error.strerror}; free some space there") from None
        return f"run.dir {run_dir} is not writable there ({error.strerror})"
    return None


def leave_file(run_dir: Path, name: str, rank: int) -> str | None:
    """By each other host, into the folder that rank 0 made; what is wrong, or None."""
    if not _appears(run_dir / name):
        return f"run.dir {run_dir} is not the shared folder there (what rank 0 writes into it does not appear)"
    try:
        (run_dir / name / str(rank)).write_text(str(rank))
    except OSError as error:
        return f"run.dir {run_dir} is not writable there ({error.strerror})"
    return None


def find_missing(run_dir: Path, name: str, ranks: Iterable[int]) -> list[int]:
    """By rank 0: those whose file does not appear whole."""
    return [rank for rank in ranks if not _appears(run_dir / name / str(rank), str(rank))]


def remove_folder(run_dir: Path, name: str) -> None:
    shutil.rmtree(run_dir / name, ignore_errors=True)


def _appears(path: Path, text: str | None = None) -> bool:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not _is_there(path, text):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _is_there(path: Path, text: str | None) -> bool:
    try:
        return path.exists() if text is None else path.read_text() == text
    except OSError:
        return False
