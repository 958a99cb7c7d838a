"""`lime-dist init`: the sample configs that come with the package, copied to where they can be edited."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import lime_dist
from lime_dist.errors import ConfigError

SAMPLES = Path(lime_dist.__file__).parent / "configs"  # in a checkout a link to its configs/


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
