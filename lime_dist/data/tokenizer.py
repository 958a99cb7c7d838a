"""Tokenizers: what they all do, how a file is read, and SentencePiece models made of text.

The models that we make give every text back: no normalisation, bytes for unknown characters, so that
`decode(encode(text)) == text` for all text but U+2581, SentencePiece's own mark for a space.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from sentencepiece import SentencePieceTrainer, set_random_generator_seed

from lime_dist.data.documents import DEFAULT_FORMAT, TextFormat, read_documents
from lime_dist.data.json_tokenizer import JsonTokenizer
from lime_dist.data.output_files import prepare_outputs, written_whole
from lime_dist.data.sentencepiece_tokenizer import SentencePieceTokenizer
from lime_dist.data.special_tokens import AS_THE_FILE_SAYS, SpecialTokens, is_json, unnamed
from lime_dist.errors import DataError

# SentencePiece drops sentences longer than 4,192 bytes; a character has at most four.
_MAX_SENTENCE_CHARACTERS = 1000
# SentencePiece refuses to sample less.
_MIN_LINES = 101
_ERRORS_ONLY = 2
_SAMPLING_SEED = 0
_NUM_SPECIAL, _NUM_BYTES = 3, 256
_SPACE = "\u2581"
# What gives every text back.
_OPTIONS: dict[str, Any] = dict(
    byte_fallback=True,
    normalization_rule_name="identity",
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
    unk_id=0,
    bos_id=1,
    eos_id=2,
    pad_id=-1,
    minloglevel=_ERRORS_ONLY,
)


class Tokenizer(Protocol):
    """Text to token ids and back, whatever kind of file says how. Several threads may use it at a time."""

    @property
    def path(self) -> Path: ...

    @property
    def vocab_size(self) -> int:
        """How many ids a model needs to have."""

    @property
    def bos_id(self) -> int | None:
        """Begins a document; None where nothing says which token does."""

    @property
    def eos_id(self) -> int | None:
        """Ends a document; None where nothing says which token does."""

    def encode(self, text: str) -> list[int]:
        """Adds neither BOS nor EOS."""

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each, without the interpreter's lock, in the calling thread."""

    def decode(self, ids: Sequence[int]) -> str:
        """Leaves special tokens out."""

    def id_texts(self) -> list[str]:
        """The text of each id, with its spaces: a line break for special tokens, U+FFFD for some byte of a character."""


def load_tokenizer(path: Path | str, named: SpecialTokens = AS_THE_FILE_SAYS) -> Tokenizer:
    """A `tokenizer.json` by its ending, any other file as a SentencePiece model.

    named: BOS and EOS where they are not to be what the file says. Raises: DataError when the file is missing or no tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"tokenizer: {path} is a folder; name the .model or tokenizer.json in it")
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise DataError(f"tokenizer: {path} {problem}; make it with lime-dist data train-tokenizer")
    return JsonTokenizer(path, named) if is_json(path) else SentencePieceTokenizer(path, named)


def require_bos(tokenizer: Tokenizer) -> int:
    """Raises: DataError, which says how to name it."""
    return _required(tokenizer, "bos", tokenizer.bos_id)


def require_eos(tokenizer: Tokenizer) -> int:
    """Raises: DataError, which says how to name it."""
    return _required(tokenizer, "eos", tokenizer.eos_id)


def _required(tokenizer: Tokenizer, name: str, token: int | None) -> int:
    if token is None:
        raise DataError(unnamed(tokenizer.path, name))
    return token


def train_tokenizer(
    inputs: Sequence[Path],
    prefix: Path,
    *,
    vocab_size: int,
    model_type: str = "bpe",
    character_coverage: float = 0.9995,
    text_format: TextFormat = DEFAULT_FORMAT,
    max_lines: int = 5_000_000,
    workers: int = 4,
    overwrite: bool = False,
) -> Path:
    """Train on the lines of `inputs` (a sample of `max_lines` where there are more) and write `PREFIX.model`.

    The same inputs and `workers` give the same file. Ids: 0 unknown, 1 beginning, 2 end of document, then 256 bytes.
    Raises: DataError on unreadable input, or when the text allows no vocabulary of this size.
    """
    model_path = prefix.with_name(f"{prefix.name}.model")
    prepare_outputs([model_path], overwrite=overwrite)
    if max_lines < _MIN_LINES:
        raise DataError(f"--max-lines {max_lines} is too few; at least {_MIN_LINES}")
    model = io.BytesIO()
    failures: list[DataError] = []
    set_random_generator_seed(_SAMPLING_SEED)
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_sentences(read_documents(inputs, text_format), failures),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            input_sentence_size=max_lines,
            num_threads=workers,
            **_OPTIONS,
        )
    except RuntimeError as error:
        raise failures[0] if failures else _explained(error, vocab_size) from None
    with written_whole(model_path) as partial:
        partial.write_bytes(model.getvalue())
    return model_path


def list_tokenizer(model_path: Path, *, words: Sequence[str], characters: str) -> Path:
    """Write a tokenizer that is given its vocabulary: an id for each of `words`, spaces before them included, and
    for each of `characters`. A text is cut into the longest words that match, from the left.

    Ids: as of `train_tokenizer`, then the words in their order.
    """
    characters = "".join(dict.fromkeys(f" {characters}"))
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([characters]),
        model_writer=model,
        vocab_size=_NUM_SPECIAL + _NUM_BYTES + len(words) + len(characters),
        model_type="char",
        character_coverage=1.0,
        user_defined_symbols=[word.replace(" ", _SPACE) for word in words],
        num_threads=1,
        **_OPTIONS,
    )
    with written_whole(model_path) as partial:
        partial.write_bytes(model.getvalue())
    return model_path


def _sentences(documents: Iterable[str], failures: list[DataError]) -> Iterator[str]:
    """The lines of the documents, long ones in parts. Keeps what is raised, which SentencePiece turns into a text."""
    try:
        for document in documents:
            for line in document.splitlines():
                for start in range(0, len(line), _MAX_SENTENCE_CHARACTERS):
                    yield line[start : start + _MAX_SENTENCE_CHARACTERS]
    except DataError as error:
        failures.append(error)
        raise


def _explained(error: RuntimeError, vocab_size: int) -> Exception:
    """A failure of SentencePiece with its fix where it comes from the text or the flags, and as it is otherwise."""
    message = str(error)
    if match := re.search(r"Vocabulary size too high .*<= (\d+)", message):
        return DataError(f"--vocab-size {vocab_size} is too large for this text; at most {match[1]}, or add text")
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return DataError(
            f"--vocab-size {vocab_size} is too small for the characters of this text; "
            f"at least {match[1]}, or lower --character-coverage"
        )
    if "sentences_.empty()" in message:
        return DataError("--input: the files hold no text; check --field and the paths")
    return error
