"""Output files that appear under their name only when they are whole."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lime_dist.errors import DataError


def prepare_outputs(paths: Iterable[Path], *, overwrite: bool) -> None:
    """Create the folders of `paths`.

    Raises: DataError when one of `paths` exists and `overwrite` is not set, or when its folder cannot be made.
    """
    for path in paths:
        if path.exists() and not overwrite:
            raise DataError(f"--out: {path} exists; choose another name or add --overwrite")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"--out: cannot make the folder {path.parent} ({error.strerror}); choose another") from None


def partial_path(path: Path) -> Path:
    """Where `path` is written until it is whole: its own folder, and a name that no other process uses."""
    return path.with_name(f"{path.name}.partial-{os.getpid()}")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Lend a temporary name that becomes `path` at the end of the block, and goes away when the block raises."""
    partial = partial_path(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def with_usual_rights(path: Path) -> Iterator[None]:
    """What is written to `path` meanwhile gets the rights of any new file: safetensors gives its own to the owner alone."""
    path.touch()
    rights = path.stat().st_mode
    yield
    path.chmod(rights)
