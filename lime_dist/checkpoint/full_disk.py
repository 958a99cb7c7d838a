"""What is told where the disk takes no more. Needs no ranks and no torch."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from lime_dist.checkpoint.reader import find_latest
from lime_dist.errors import CheckpointError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.ENOTDIR)


class FullDisk(CheckpointError):
    """The disk takes nothing more until someone sees to it; the checkpoints that are there stay. reason: in a few words."""

    def __init__(self, text: str, reason: str):
        super().__init__(text)
        self.reason = reason


@contextmanager
def naming_full_disk(run_dir: Path, checkpoints: Path) -> Iterator[None]:
    """For what a run writes besides checkpoints. Raises: FullDisk."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise full_disk(f"run.dir: {run_dir}", os.strerror(error.errno), checkpoints) from None


def full_disk(what: str, reason: str, checkpoints: Path) -> FullDisk:
    last = find_latest(checkpoints)
    return FullDisk(
        f"{what}: {reason}; free space or name another run.dir, then start again"
        f" (the last whole checkpoint is {last.name if last else 'none'})",
        reason,
    )


def disk_problem(error: BaseException) -> str | None:
    """In words, when the disk takes nothing more; None for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError) and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found[1])
    return os.strerror(number) if number in (*FULL_DISK, *_NOT_WRITABLE) else None
