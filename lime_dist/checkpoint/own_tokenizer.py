"""The tokenizer of a checkpoint, which is the copy in its run's folder, and of a run that starts. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from lime_dist.checkpoint.checking import read_meta
from lime_dist.checkpoint.reader import find_run
from lime_dist.config import Config
from lime_dist.data.kept_tokenizer import find_kept_tokenizer
from lime_dist.data.meta import require_tokenizer
from lime_dist.data.special_tokens import AS_THE_FILE_SAYS, SpecialTokens
from lime_dist.data.tokenizer import Tokenizer, load_tokenizer
from lime_dist.errors import DataError


def own_tokenizer(folder: Path, config: Config) -> Path | None:
    """Of the checkpoint `folder`; None where nothing names one. The file of the config may lie elsewhere by now.

    Raises: DataError where another file than made its text lies there.
    """
    sha256, run_dir = read_meta(folder).origin.tokenizer, find_run(folder)
    kept = None if run_dir is None else find_kept_tokenizer(run_dir, sha256)
    if kept is not None or config.data.tokenizer is None:
        return kept
    path = Path(config.data.tokenizer)
    if path.is_file():
        made = f"the text that checkpoint {folder} was trained on"
        require_tokenizer(path, sha256, key="data.tokenizer", made=made)
    return path


def tokenizer_file(config: Config) -> Path | None:
    """`data.tokenizer`, or, where that file is not here, the copy that the run keeps in its folder."""
    if config.data.tokenizer is None:
        return None
    path = Path(config.data.tokenizer)
    kept = None if path.is_file() else find_kept_tokenizer(Path(config.run.dir))
    return kept or path


def load_tokenizer_of(config: Config, path: Path, named: SpecialTokens = AS_THE_FILE_SAYS) -> Tokenizer:
    """Raises: DataError when it is no tokenizer, or has another number of ids than the model."""
    tokenizer = load_tokenizer(path, named)
    if tokenizer.vocab_size != config.model.vocab_size:
        raise DataError(
            f"--tokenizer: {path} has {tokenizer.vocab_size} ids, the model {config.model.vocab_size}; give the run's own"
        )
    return tokenizer
