"""Which tokens begin and end a document (BOS, EOS): named by the user, by a file beside the tokenizer, or by custom."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lime_dist.errors import DataError, shown

CONFIG_NAME = "tokenizer_config.json"
# What a special token stands for where texts are searched, and a token whose text is not known, such as some byte.
CONTROL_TEXT, UNKNOWN_TEXT = "\n", "\ufffd"
_MAX_BYTES = 1 << 26
_BOS_NAMES = ("<s>", "<bos>", "[BOS]", "<|bos|>", "<|begin_of_text|>", "<|startoftext|>", "<|endoftext|>")
_EOS_NAMES = ("</s>", "<eos>", "[EOS]", "<|eos|>", "<|end_of_text|>", "<|endoftext|>")
_COMMON_NAMES = {"bos": _BOS_NAMES, "eos": _EOS_NAMES}
_WORDS = {"bos": "beginning", "eos": "end"}


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """The tokens that the user names; None: as the tokenizer says."""

    bos: str | None = None
    eos: str | None = None


AS_THE_FILE_SAYS = SpecialTokens()


@dataclass(frozen=True)
class Named:
    """A special token's text, None for a tokenizer that has none, and who says so."""

    token: str | None
    source: str


def find_named(tokenizer: Path, name: str, given: str | None, special: Collection[str]) -> Named | None:
    """What `name` ("bos" or "eos") is: as given, as `tokenizer_config.json` says, or the only one of the common names
    among the tokenizer's `special` tokens. None: none or several of them are there. Raises: DataError.
    """
    if given is not None:
        return Named(given, f"--{name}")
    path = tokenizer.with_name(CONFIG_NAME)
    config, key = _read_config(path), f"{name}_token"
    if key in config:
        return Named(_text_of(config[key], path, key), f"{path}: {key}")
    present = [token for token in _COMMON_NAMES[name] if token in special]
    return Named(present[0], "its name") if len(present) == 1 else None


def unnamed(tokenizer: Path, name: str) -> str:
    """That nothing says what `name` is, and how to say it."""
    fix = (
        f'write {{"{name}_token": "TOKEN"}} to {CONFIG_NAME} beside it'
        if is_json(tokenizer)
        else "use a model that does"
    )
    return (
        f"tokenizer: {tokenizer} names no {_WORDS[name]}-of-sequence token; {fix}, "
        f"or give --{name} TOKEN where the command takes it"
    )


def is_json(tokenizer: Path) -> bool:
    """Whether it is a tokenizer.json, by its ending, and no SentencePiece model."""
    return tokenizer.suffix == ".json"


def _read_config(path: Path) -> dict[str, Any]:
    """Empty where there is none."""
    if not path.exists():
        return {}
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            raise DataError(f"tokenizer: {path} is not a tokenizer's configuration; remove it or copy it again")
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"tokenizer: {path} cannot be read ({error.strerror}); change its permissions") from None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise DataError(f"tokenizer: {path} is not a JSON object; remove it or copy it again")
    return values


def _text_of(value: object, path: Path, key: str) -> str | None:
    """A token is written as its text, or as an object that has it as `content`."""
    if value is None:
        return None
    token = value.get("content") if isinstance(value, dict) else value
    if isinstance(token, str):
        return token
    raise DataError(f"tokenizer: {path}: {key} is {shown(value)}; write the token's text")
