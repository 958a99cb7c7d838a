"""What comes with the package beside its code: the sample configs, which `lime-dist init` copies to where they can be edited,
and the reference numbers of `lime-dist parity`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import lime_dist
from lime_dist.errors import ConfigError, DataError

SAMPLES = Path(lime_dist.__file__).parent / "configs"  # in a checkout a link to its configs/
REFERENCES = SAMPLES.with_name("reference_numbers")  # in a checkout a link to tests/golden, which has more than a wheel


def reference_names() -> list[str]:
    return sorted(path.parent.name for path in REFERENCES.glob("*/io.safetensors"))


def find_reference(path: Path) -> Path:
    """A folder, or one of the package's by its name. Raises: DataError."""
    if path.is_dir():
        return path
    if str(path) in reference_names():
        return REFERENCES / path
    raise DataError(
        f"reference {path}: no such folder; give one of reference numbers, or {' or '.join(reference_names())}"
    )


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("init", help="write the sample configs, of runs and of clusters, into a folder")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="made if it is missing; no file is overwritten")
    parser.set_defaults(run=_init)


def _init(args: argparse.Namespace) -> int:
    for path in copy_samples(args.folder):
        print(path)
    return 0


def copy_samples(folder: Path) -> list[Path]:
    """The files written. Raises: ConfigError, before any is written when one exists already."""
    copies = {source: folder / source.relative_to(SAMPLES) for source in sorted(SAMPLES.rglob("*.yaml"))}
    for copy in copies.values():
        if copy.exists():
            raise ConfigError(f"init: {copy} exists already; move it away or name another folder")
    try:
        for source, copy in copies.items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
    except OSError as error:
        raise ConfigError(f"init: {folder}: {error.strerror or error}; name a folder that can be written") from None
    return list(copies.values())
