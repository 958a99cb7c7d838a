"""Reads SentencePiece `.model` files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from lime_dist.data.special_tokens import CONTROL_TEXT, UNKNOWN_TEXT, SpecialTokens
from lime_dist.errors import DataError

_SPACE = "\u2581"


class SentencePieceTokenizer:
    """A `Tokenizer`. BOS and EOS are the model's own, unless pieces are named.

    Raises: DataError for what is no SentencePiece model.
    """

    def __init__(self, path: Path, named: SpecialTokens) -> None:
        self.path = path
        try:
            self._processor = SentencePieceProcessor(model_file=str(path))
        except RuntimeError:
            raise DataError(
                f"tokenizer: {path} is not a SentencePiece model; give the .model file, or a tokenizer.json"
            ) from None
        self.bos_id = self._special_id("bos", named.bos, self._processor.bos_id())
        self.eos_id = self._special_id("eos", named.eos, self._processor.eos_id())

    @property
    def vocab_size(self) -> int:
        return self._processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._processor.encode(list(texts), num_threads=1)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode(list(ids))
        return text

    def id_texts(self) -> list[str]:
        return [self._text(token) for token in range(self.vocab_size)]

    def _special_id(self, name: str, piece: str | None, own: int) -> int | None:
        if piece is None:
            return own if own >= 0 else None
        token = self._processor.piece_to_id(piece)
        if self._processor.id_to_piece(token) != piece:  # unknown pieces have the id of <unk>
            raise DataError(f"--{name}: {self.path} has no token {piece!r}; name one of its own")
        return token

    def _text(self, token: int) -> str:
        piece: str = self._processor.id_to_piece(token)
        if self._processor.is_control(token):
            return CONTROL_TEXT
        if self._processor.is_unknown(token):
            return UNKNOWN_TEXT
        if self._processor.is_byte(token):
            value = int(piece[1:-1], 16)
            return chr(value) if value < 128 else UNKNOWN_TEXT
        return piece.replace(_SPACE, " ")
