"""Checks before ranks start: the files that a run reads. No collective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lime_dist.checkpoint.checking import read_meta
from lime_dist.checkpoint.edges import first_weights, resume_folder
from lime_dist.checkpoint.own_tokenizer import tokenizer_file
from lime_dist.config import Config
from lime_dist.data.indexed import TokenFiles
from lime_dist.data.indexed import check_files as check_token_files
from lime_dist.data.meta import require_tokenizer
from lime_dist.data.sample_kinds import SOURCES
from lime_dist.data.sample_source import SampleSource, SourceOptions
from lime_dist.data.split import WHOLE, Split, held_out_split, require_vocabulary, train_split
from lime_dist.data.tokenizer import load_tokenizer
from lime_dist.errors import ConfigError, DataError
from lime_dist.lifecycle.launcher import warn


def check_files(config: Config) -> None:
    """Raises: DataError, ConfigError for a file that is missing, damaged, too short or does not fit.

    What is doubtful but usable is warned of on stderr, by one rank.
    """
    run_dir = Path(config.run.dir)
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run.dir: {run_dir} is a file; name a folder")
    if not config.data.train:
        raise ConfigError("data.train: empty; name the prefix of a token file (from `lime-dist data tokenize`)")
    train = [_read_source(config, "data.train", source.path) for source in config.data.train]
    valid = [_read_source(config, "data.valid", source.path) for source in config.data.valid]
    _check_tokenizers(config, [*train, *valid])
    _open_samples(config, train, train_split(config.data.valid_fraction))
    warnings = [_no_checksums(source) for source in (*train, *valid) if not source.files.has_checksums]
    if valid or config.data.valid_fraction:
        held_out = (valid, WHOLE) if valid else (train, held_out_split(config.data.valid_fraction))
        warnings += _short_evaluation(config, _open_samples(config, *held_out))
    warn(warnings)


@dataclass(frozen=True, kw_only=True)
class TrainingText:
    """num_tokens: of the documents that train. samples_per_epoch: of each source, before it starts again."""

    num_tokens: int
    samples_per_epoch: tuple[int, ...]


def find_training_text(config: Config) -> TrainingText | None:
    """None where it cannot be read, or holds no sample."""
    try:
        sources = [_read_source(config, "data.train", source.path) for source in config.data.train]
        opened = _open_samples(config, sources, train_split(config.data.valid_fraction))
    except (DataError, OSError):
        return None
    return (
        TrainingText(
            num_tokens=sum(one.num_tokens for one in opened),
            samples_per_epoch=tuple(one.samples_per_epoch for one in opened),
        )
        if opened
        else None
    )


@dataclass(frozen=True)
class _Source:
    key: str
    files: TokenFiles

    def __str__(self) -> str:
        return f"{self.key} {self.files.prefix}"


def _read_source(config: Config, key: str, prefix: str) -> _Source:
    source = _Source(key, check_token_files(prefix, key=key))
    require_vocabulary(source.files, config.model.vocab_size, key=key)
    return source


def _check_tokenizers(config: Config, sources: Sequence[_Source]) -> None:
    """One tokenizer made all sources, and it is the run's where that has one."""
    path = tokenizer_file(config)
    if path is not None:
        _check_vocabulary(config, path)
        for source in sources:
            require_tokenizer(path, source.files.tokenizer_sha256, key="data.tokenizer", made=str(source))
    known = [source for source in sources if source.files.tokenizer_sha256 is not None]
    for source in known[1:]:
        if source.files.tokenizer_sha256 != known[0].files.tokenizer_sha256:
            raise DataError(
                f"{source.key}: {source.files.prefix} was made by another tokenizer than {known[0]}; "
                "run lime-dist data tokenize again with one tokenizer for all"
            )
    if known:
        _check_checkpoint(config, known[0])


def _check_checkpoint(config: Config, source: _Source) -> None:
    """What the run goes on from was trained on text of the same tokenizer."""
    folder = resume_folder(config) or first_weights(config)
    trained_with = read_meta(folder).origin.tokenizer if folder is not None else None
    if trained_with is not None and trained_with != source.files.tokenizer_sha256:
        raise DataError(
            f"{source.key}: {source.files.prefix} was made by another tokenizer than the text that checkpoint {folder} was "
            "trained on; name token files of that tokenizer, or another run.dir"
        )


def _check_vocabulary(config: Config, path: Path) -> None:
    if not path.is_file():
        raise DataError(f"data.tokenizer: {path} does not exist; train one with `lime-dist data train-tokenizer`")
    size = load_tokenizer(path).vocab_size
    if size != config.model.vocab_size:
        raise DataError(
            f"model.vocab_size: {config.model.vocab_size}, but data.tokenizer {path} has {size} ids; set model.vocab_size={size}"
        )


def _open_samples(config: Config, sources: Sequence[_Source], split: Split) -> list[SampleSource[Any]]:
    """Raises: DataError where a source has less than one sample, or a document that fits none."""
    return [
        SOURCES[config.data.samples](
            source.files,
            SourceOptions(
                seq_length=config.data.seq_length,
                split=split,
                entropy=(config.run.seed, position),
                vocab_size=config.model.vocab_size,
                key=source.key,
            ),
        )
        for position, source in enumerate(sources)
    ]


# ---- warnings


def _no_checksums(source: _Source) -> str:
    return (
        f"{source.key}: {source.files.prefix} has no checksums in a .meta.json, damage is found only where the index "
        "contradicts itself; lime-dist data adopt writes them"
    )


def _short_evaluation(config: Config, held_out: Sequence[SampleSource[Any]]) -> list[str]:
    num_held_out = sum(source.samples_per_epoch for source in held_out)
    needed = config.eval.batches * config.data.global_batch_size
    if needed <= num_held_out:
        return []
    return [
        f"eval.batches: {config.eval.batches} batches are {needed} samples, the held-out text has {num_held_out}, so some "
        "count more than once; lower eval.batches or hold out more text"
    ]
