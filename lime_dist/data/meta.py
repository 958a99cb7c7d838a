"""What `PREFIX.meta.json` says of a token file: its vocabulary, tokenizer and task, and the files' checksums.

Files made by Megatron's own tools have none, and those of earlier versions lack the checksums.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from lime_dist.data.checksums import RULE, file_digest
from lime_dist.errors import DataError

_MAX_BYTES = 1 << 20
_AGAIN = "run lime-dist data tokenize again"


@dataclass(frozen=True, kw_only=True)
class TokenMeta:
    """`checksums`: by "bin", "idx" and, of files with a loss mask, "mask". None: not known.

    task: the synthetic task whose examples the documents are. bos_id: the BOS with which every document begins.
    """

    vocab_size: int
    num_tokens: int
    tokenizer_sha256: str | None = None
    checksums: Mapping[str, str] | None = None
    task: str | None = None
    bos_id: int | None = None


def meta_values(
    *,
    vocab_size: int,
    tokenizer_sha256: str,
    num_documents: int,
    num_tokens: int,
    bos_id: int | None = None,
    task: str | None = None,
) -> dict[str, Any]:
    """What a meta file says, but for the checksums. bos_id: the BOS with which every document begins."""
    values = {
        "vocab_size": vocab_size,
        "tokenizer_sha256": tokenizer_sha256,
        "documents": num_documents,
        "tokens": num_tokens,
        "bos_id": bos_id,
        "task": task,
    }
    return {key: value for key, value in values.items() if value is not None}


def meta_text(values: Mapping[str, Any], checksums: Mapping[str, str]) -> str:
    """The meta file itself; checksums: as of `TokenMeta`."""
    return json.dumps({**values, RULE: dict(checksums)}, indent=2) + "\n"


def find_meta(path: Path, *, key: str) -> TokenMeta | None:
    """None where the file does not exist. Raises: DataError, which names `key`, for one that cannot be used."""
    if not path.exists():
        return None
    values = _read_object(path, key)
    vocab_size, num_tokens = values.get("vocab_size"), values.get("tokens")
    if not (_is_count(vocab_size) and _is_count(num_tokens)):
        raise DataError(f"{key}: {path} does not state vocab_size and tokens; {_AGAIN}")
    tokenizer, checksums = values.get("tokenizer_sha256"), values.get(RULE)
    if not isinstance(tokenizer, str | None) or not _are_checksums(checksums):
        raise DataError(f"{key}: {path} has no usable tokenizer_sha256 or {RULE}; {_AGAIN}")
    task = values.get("task")
    if not isinstance(task, str | None):
        raise DataError(f"{key}: {path} names no usable task; run lime-dist data build-task again")
    bos_id = values.get("bos_id")
    if bos_id is not None and (type(bos_id) is not int or bos_id < 0):
        raise DataError(f"{key}: {path} has no usable bos_id; {_AGAIN}")
    return TokenMeta(
        vocab_size=vocab_size,
        num_tokens=num_tokens,
        tokenizer_sha256=tokenizer,
        checksums=checksums,
        task=task,
        bos_id=bos_id,
    )


def require_tokenizer(tokenizer: Path, sha256: str | None, *, key: str, made: str) -> None:
    """See that `tokenizer` is the file that a meta file's `tokenizer_sha256` is of; None says nothing.

    `key` names the tokenizer and `made` what was made with it, for the message. Raises: DataError.
    """
    try:
        found = file_digest(tokenizer)
    except OSError as error:
        raise DataError(f"{key}: {tokenizer} cannot be read ({error.strerror}); correct the path") from None
    if sha256 is not None and found != sha256:
        raise DataError(
            f"{key}: {tokenizer} is not the tokenizer that made {made} (sha256 {found[:12]}, not {sha256[:12]}); "
            f"name that one, or {_AGAIN} with this one"
        )


def _read_object(path: Path, key: str) -> dict[str, Any]:
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{key}: {path} is not a meta file of lime-dist data tokenize; {_AGAIN}")
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{key}: {path} cannot be read ({error.strerror}); change its permissions") from None
    except (ValueError, RecursionError):
        raise DataError(f"{key}: {path} does not state vocab_size and tokens in JSON; {_AGAIN}") from None
    return values if isinstance(values, dict) else {}


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and value > 0


def _are_checksums(value: object) -> bool:
    return value is None or (
        isinstance(value, dict)
        and value.keys() in ({"bin", "idx"}, {"bin", "idx", "mask"})
        and all(isinstance(text, str) for text in value.values())
    )
