"""The token files of a run: what trains and what is held out. Knows no ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lime_dist.checkpoint.own_tokenizer import tokenizer_file
from lime_dist.config import Config
from lime_dist.data.checksums import file_digest
from lime_dist.data.dataset import TokenSamples
from lime_dist.data.meta import find_meta
from lime_dist.data.split import WHOLE, Split, held_out_split, train_split

Between = Callable[[], None]  # called after each token file, as opening one may take long


def training_tokenizer(config: Config) -> str | None:
    """SHA-256 of the tokenizer that made the training text; None where nothing says so."""
    metas = (find_meta(Path(f"{source.path}.meta.json"), key="data.train") for source in config.data.train)
    known = (meta.tokenizer_sha256 for meta in metas if meta is not None and meta.tokenizer_sha256 is not None)
    own = tokenizer_file(config)
    return next(known, None) or (file_digest(own) if own is not None else None)


def open_training_data(config: Config, between: Between = lambda: None) -> TokenSamples:
    return _open(config, config.data.train, train_split(config.data.valid_fraction), "data.train", between)


def open_held_out_data(config: Config, between: Between = lambda: None) -> TokenSamples | None:
    """`data.valid`, or the documents kept back from `data.train`, or None."""
    if config.data.valid:
        return _open(config, config.data.valid, WHOLE, "data.valid", between)
    if config.data.valid_fraction:
        return _open(config, config.data.train, held_out_split(config.data.valid_fraction), "data.train", between)
    return None


def _open(config: Config, sources: list, split: Split, key: str, between: Between) -> TokenSamples:
    return TokenSamples(
        [(source.path, source.weight) for source in sources],
        seq_length=config.data.seq_length,
        seed=config.run.seed,
        split=split,
        samples=config.data.samples,
        vocab_size=config.model.vocab_size,
        key=key,
        between=between,
    )
