"""A SentencePiece model as the `tokenizer.json` that `AutoTokenizer` reads, with the same ids for every text.

It takes what `lime-dist data` makes: no normalisation, no space put before a text, bytes for unknown characters. Other
models are refused. Pure data: neither transformers nor tokenizers is needed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2  # needs protobuf

from lime_dist.data.special_tokens import is_json
from lime_dist.data.tokenizer import load_tokenizer
from lime_dist.errors import DataError

_SPACE = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6  # SentencePiece's kinds of pieces
_UNIGRAM, _BPE, _CHAR = 1, 2, 4  # and of models
# The pieces that no text is cut into, as a text may spell them.
_SPELLED = "<(?=(?:unk|/?s|0x[0-9A-F]{2})>)"


def tokenizer_files(path: Path, seq_length: int) -> dict[str, dict[str, Any]]:
    """File name -> JSON. Raises: DataError for a model that has no equal there."""
    if is_json(path):
        return _json_files(path, seq_length)
    model = _read(path)
    special = {kind: _first_of(model, kind) for kind in (model.trainer_spec.bos_id, model.trainer_spec.eos_id)}
    begin, end = special[model.trainer_spec.bos_id], special[model.trainer_spec.eos_id]
    unknown = next(piece.piece for piece in model.pieces if piece.type == _UNKNOWN)
    return {
        "tokenizer.json": _tokenizer(model),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": begin,
            "eos_token": end,
            "unk_token": unknown,
            "pad_token": end,  # there is none of its own; padding is masked
            "padding_side": "left",
            "split_special_tokens": True,  # a text that spells </s> is a text
            "clean_up_tokenization_spaces": False,
            "model_max_length": seq_length,
        },
    }


def token_ids(path: Path) -> dict[str, int]:
    """`bos_token_id` and `eos_token_id`, those that the tokenizer has. Raises: DataError."""
    tokenizer = load_tokenizer(path)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return {key: number for key, number in ids.items() if number is not None}


def _json_files(path: Path, seq_length: int) -> dict[str, dict[str, Any]]:
    """Of a tokenizer that has the form already."""
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    texts = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    config = {key.removesuffix("_id"): texts[number] for key, number in token_ids(path).items()}
    padding = {"pad_token": config["eos_token"]} if "eos_token" in config else {}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"} | padding
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": {**config, "model_max_length": seq_length}}


def _read(path: Path) -> Any:
    model: Any = getattr(sentencepiece_model_pb2, "ModelProto")()  # noqa: B009 - made when the module is imported
    try:
        model.ParseFromString(path.read_bytes())
    except Exception:  # protobuf's own, of which releases have different ones
        raise DataError(f"tokenizer: {path} is not a SentencePiece model; give the .model file") from None
    trained, normalizer = model.trainer_spec, model.normalizer_spec
    kinds = {piece.type for piece in model.pieces}
    for problem, holds in (
        ("is no BPE, unigram or char model", trained.model_type in (_UNIGRAM, _BPE, _CHAR)),
        ("has no bytes for unknown characters (byte_fallback)", trained.byte_fallback),
        ("normalises texts", not normalizer.precompiled_charsmap and not normalizer.remove_extra_whitespaces),
        ("puts a space before texts (add_dummy_prefix)", not normalizer.add_dummy_prefix),
        ("leaves spaces as they are (escape_whitespaces)", normalizer.escape_whitespaces),
        (
            "has pieces of other kinds",
            _UNKNOWN in kinds and kinds <= {_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE},
        ),
        ("has symbols of its own in a unigram model", trained.model_type != _UNIGRAM or _USER_DEFINED not in kinds),
    ):
        if not holds:
            raise DataError(
                f"tokenizer: {path} {problem}, which is not converted; give --tokenizer none to leave it out"
            )
    return model


def _first_of(model: Any, index: int) -> str | None:
    return model.pieces[index].piece if 0 <= index < len(model.pieces) else None


def _tokenizer(model: Any) -> dict[str, Any]:
    is_unigram = model.trainer_spec.model_type == _UNIGRAM
    split = {"type": "Split", "pattern": {"Regex": _SPELLED}, "behavior": "MergedWithPrevious", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(index, piece) for index, piece in enumerate(model.pieces) if _is_added(piece)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        "pre_tokenizer": split if is_unigram else None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": _unigram(model) if is_unigram else _bpe(model),
    }


def _is_added(piece: Any) -> bool:
    return piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)


def _added(index: int, piece: Any) -> dict[str, Any]:
    """Symbols of the user's own are found first, the longest that fits, in the text as it is normalised."""
    own = piece.type == _USER_DEFINED
    switches = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": own, "special": not own}
    return {"id": index, "content": piece.piece, **switches}


def _unigram(model: Any) -> dict[str, Any]:
    """Only normal pieces have scores; the others get the least, which leaves the score of an unknown character as it is."""
    least = min(piece.score for piece in model.pieces if piece.type == _NORMAL)
    vocab = [[piece.piece, piece.score if piece.type == _NORMAL else least] for piece in model.pieces]
    (unknown,) = (index for index, piece in enumerate(model.pieces) if piece.type == _UNKNOWN)
    return {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": True}


def _bpe(model: Any) -> dict[str, Any]:
    """A char model is one without merges."""
    normal = {piece.piece: piece.score for piece in model.pieces if piece.type == _NORMAL}
    merges = _merges(normal) if model.trainer_spec.model_type == _BPE else ()
    (unknown,) = (piece.piece for piece in model.pieces if piece.type == _UNKNOWN)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": {piece.piece: index for index, piece in enumerate(model.pieces)},
        "merges": [list(pair) for pair in merges],
    }


def _merges(scores: dict[str, float]) -> Iterator[tuple[str, str]]:
    """Every pair that makes a piece, the piece with the highest score first: SentencePiece merges by scores alone."""
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        yield from _pairs(piece, scores)


def _pairs(piece: str, known: Collection[str]) -> Iterator[tuple[str, str]]:
    """Where s1 + s2 and s2 + s3 make the same piece, SentencePiece merges the left ones; so the pair that can only be left
    stands first: one behind which the piece goes on as it began."""

    def is_right(cut: int) -> bool:
        return piece[cut:] != piece[:-cut]

    for cut in sorted(range(1, len(piece)), key=is_right):
        if piece[:cut] in known and piece[cut:] in known:
            yield piece[:cut], piece[cut:]
