"""Checks before ranks start: the files that a run reads. No collective."""

from __future__ import annotations

from pathlib import Path

from lime_dist.config import Config, Source
from lime_dist.data.indexed import check_files as check_token_files
from lime_dist.data.tokenizer import vocab_size as tokenizer_vocab_size
from lime_dist.errors import ConfigError, DataError


def check_files(config: Config) -> None:
    """Raises: DataError, ConfigError for a file that is missing, cut short or does not fit the model."""
    run_dir = Path(config.run.dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run.dir: {run_dir} is a file; name a folder")
    if not config.data.train:
        raise ConfigError("data.train: empty; name the prefix of a token file (from `lime-dist data tokenize`)")
    for key, sources in (("data.train", config.data.train), ("data.valid", config.data.valid)):
        for source in sources:
            _check_source(config, key, source)
    if config.data.tokenizer is not None:
        _check_tokenizer(config, Path(config.data.tokenizer))


def _check_source(config: Config, key: str, source: Source) -> None:
    files = check_token_files(source.path, key=key)
    if files.vocab_size is not None and files.vocab_size > config.model.vocab_size:
        raise DataError(
            f"{key}: {source.path} was tokenized to {files.vocab_size} ids, model.vocab_size is {config.model.vocab_size}; "
            f"set model.vocab_size={files.vocab_size} or tokenize again"
        )


def _check_tokenizer(config: Config, path: Path) -> None:
    if not path.is_file():
        raise DataError(f"data.tokenizer: {path} does not exist; train one with `lime-dist data train-tokenizer`")
    size = tokenizer_vocab_size(path)
    if size != config.model.vocab_size:
        raise DataError(
            f"model.vocab_size: {config.model.vocab_size}, but data.tokenizer {path} has {size} ids; set model.vocab_size={size}"
        )
