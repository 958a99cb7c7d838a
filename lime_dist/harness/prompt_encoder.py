"""Texts to token ids as the run's documents have them: its tokenizer, and BOS where its token files begin with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lime_dist.checkpoint.own_tokenizer import load_tokenizer_of, own_tokenizer
from lime_dist.config import Config
from lime_dist.data.meta import TokenMeta, find_meta, require_tokenizer
from lime_dist.data.tokenizer import Tokenizer, require_bos, require_eos
from lime_dist.errors import ConfigError
from lime_dist.lifecycle.launcher import warn


@dataclass(frozen=True, kw_only=True)
class PromptEncoder:
    """bos: with which every text begins; None: with none."""

    tokenizer: Tokenizer
    bos: int | None
    eos: int

    @property
    def prefix(self) -> int:
        """What an empty text stands for: something that a first token can follow."""
        return self.eos if self.bos is None else self.bos

    def encode(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]


def prompt_encoder(checkpoint: Path, config: Config, *, add_bos: bool) -> PromptEncoder:
    """Of a checkpoint's run. add_bos: whatever the meta files of `data.train` say, which may be elsewhere by now. Raises: ConfigError, DataError."""
    path = own_tokenizer(checkpoint, config)
    if path is None:
        raise ConfigError("data.tokenizer: the run names none; add data.tokenizer=FILE")
    tokenizer = load_tokenizer_of(config, path)
    metas = _train_metas(config)
    for prefix, meta in metas.items():
        require_tokenizer(path, meta.tokenizer_sha256, key="data.tokenizer", made=f"data.train {prefix}")
    if not metas and not add_bos:
        warn(
            [
                "data.train: no meta file is here, texts begin without BOS; add --add-bos if the run's documents begin with it"
            ]
        )
    begun = {meta.bos_id for meta in metas.values()}
    bos = require_bos(tokenizer) if add_bos else begun.pop() if len(begun) == 1 else None
    return PromptEncoder(tokenizer=tokenizer, bos=bos, eos=require_eos(tokenizer))


def _train_metas(config: Config) -> dict[str, TokenMeta]:
    """By prefix, of the token files that are here."""
    found = {source.path: find_meta(Path(f"{source.path}.meta.json"), key="data.train") for source in config.data.train}
    return {prefix: meta for prefix, meta in found.items() if meta is not None}
