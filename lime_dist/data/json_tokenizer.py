"""Reads `tokenizer.json` files, those of Hugging Face's `tokenizers` library.

The library is an optional dependency: it brings a client of a model hub and nine packages with that, which the ranks
of a cluster need not have.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lime_dist.data.special_tokens import CONTROL_TEXT, UNKNOWN_TEXT, SpecialTokens, find_named
from lime_dist.errors import DataError, one_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

_NO_CHARACTER = "\U0010ffff"  # is in no text, so in no vocabulary


class JsonTokenizer:
    """A `Tokenizer`: the library's ids, without what its post-processor would add and without its truncation and padding.

    Special tokens that are spelled out in a text get their ids, as the library does it; decoding leaves them out.
    Raises: DataError for what is no tokenizer.json, for special tokens that it lacks, and where the library is missing.
    """

    def __init__(self, path: Path, named: SpecialTokens) -> None:
        self.path = path
        self._library = _read(path)
        self._library.no_truncation()
        self._library.no_padding()
        added = self._library.get_added_tokens_decoder()
        self._special = {token: text.content for token, text in added.items() if text.special}
        self.bos_id = self._special_id("bos", named.bos)
        self.eos_id = self._special_id("eos", named.eos)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id: ids may leave some out."""
        return max(self._library.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._library.decode(list(ids), skip_special_tokens=True)

    def id_texts(self) -> list[str]:
        """Decoded behind a letter, as many decoders drop the space that a text begins with."""
        before = self.encode("a")
        skipped = len(self.decode(before))
        rows = [[*before, token] for token in range(self.vocab_size)]
        texts = [text[skipped:] for text in self._library.decode_batch(rows, skip_special_tokens=True)]
        for token in self._special:
            texts[token] = CONTROL_TEXT
        for token in self._special.keys() & set(self.encode(_NO_CHARACTER)):  # the one for what is unknown
            texts[token] = UNKNOWN_TEXT
        return texts

    def _special_id(self, name: str, given: str | None) -> int | None:
        found = find_named(self.path, name, given, self._special.values())
        if found is None or found.token is None:
            return None
        token: int | None = self._library.token_to_id(found.token)
        if token is None:
            raise DataError(f"{found.source}: {self.path} has no token {found.token!r}; name one of its own")
        return token


def _read(path: Path) -> Library:
    # A thread for each text batch is ours; more threads within would ignore --workers, and do not survive a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from tokenizers import Tokenizer as Library
    except ImportError:
        raise DataError(f"tokenizer: {path} needs the tokenizers library; pip install 'lime_dist[hf]'") from None
    try:
        return Library.from_file(str(path))
    except Exception as error:  # of no narrower type
        raise DataError(
            f"tokenizer: {path} is not a tokenizer.json ({one_line(error)[:120]}); give the tokenizer.json, or a SentencePiece .model"
        ) from None
