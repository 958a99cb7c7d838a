"""Folders that appear under their name only when they are whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lime_dist.errors import ConfigError


@contextmanager
def new_folder(option: str, path: Path) -> Iterator[Path]:
    """Lend a folder beside `path`, which `option` gave, that becomes `path` at the end of the block and goes when it raises.

    Raises: ConfigError where `path` holds something already or cannot be written.
    """
    path = Path(os.path.abspath(path))
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        if os.path.lexists(path) and (path.is_symlink() or not path.is_dir() or any(path.iterdir())):
            raise ConfigError(f"{option}: {path} exists; name a new folder")
        partial.mkdir(parents=True)
        yield partial
        partial.rename(path)
    except OSError as error:
        raise ConfigError(f"{option}: {path}: {error.strerror or error}; name a folder that can be written") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
