"""Files that a user asks for by an option of a command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lime_dist.errors import ConfigError


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """For what writes `path`, which `option` gave. Raises: ConfigError where it cannot be written."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{option}: {path}: {error.strerror or error}; give a file that can be written") from None
