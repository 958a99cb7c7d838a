"""The copy of its tokenizer that a run keeps in its folder, so that the folder is whole wherever it lies."""

from __future__ import annotations

import shutil
from pathlib import Path

from lime_dist.data.checksums import file_digest
from lime_dist.data.output_files import written_whole
from lime_dist.data.special_tokens import CONFIG_NAME, is_json

SENTENCEPIECE_NAME, JSON_NAME = "tokenizer.model", "tokenizer.json"


def keep_tokenizer(tokenizer: Path, run_dir: Path) -> None:
    """Copy it to `run_dir`, and what names the special tokens of a tokenizer.json too. Raises: OSError."""
    if is_json(tokenizer):
        names_special = tokenizer.with_name(CONFIG_NAME)
        if names_special.is_file():
            _copy(names_special, run_dir / CONFIG_NAME)
        else:
            (run_dir / CONFIG_NAME).unlink(missing_ok=True)
    _copy(tokenizer, run_dir / (JSON_NAME if is_json(tokenizer) else SENTENCEPIECE_NAME))


def find_kept_tokenizer(run_dir: Path, sha256: str | None = None) -> Path | None:
    """The copy that is there. sha256: of the one that is looked for, where that is known; runs of both kinds may have begun here."""
    copies = (path for path in (run_dir / SENTENCEPIECE_NAME, run_dir / JSON_NAME) if path.is_file())
    return next((path for path in copies if sha256 in (None, file_digest(path))), None)


def _copy(source: Path, copy: Path) -> None:
    """Where another file is there, or none."""
    if not copy.is_file() or file_digest(copy) != file_digest(source):
        with written_whole(copy) as partial:
            shutil.copyfile(source, partial)
