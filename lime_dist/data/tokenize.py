"""Text files to a token file, over several threads; the result does not depend on their number.

Tokenizers encode without the interpreter's lock. What needs it, parsing and making arrays, is a tenth of the work:
more than about ten threads gain little.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lime_dist.data.checksums import file_digest
from lime_dist.data.documents import DEFAULT_FORMAT, Chunk, TextFormat, parse_chunk, read_chunks
from lime_dist.data.indexed import IndexedWriter
from lime_dist.data.meta import meta_values
from lime_dist.data.special_tokens import AS_THE_FILE_SAYS, SpecialTokens, unnamed
from lime_dist.data.tokenizer import load_tokenizer, require_bos, require_eos
from lime_dist.errors import DataError

_CHUNKS_PER_WORKER = 4


@dataclass(frozen=True, kw_only=True)
class Packing:
    """What documents begin and end with; the paper has BOS and EOS. named: those, where not as the tokenizer says."""

    add_bos: bool = False
    append_eos: bool = True
    named: SpecialTokens = AS_THE_FILE_SAYS


EOS_ONLY = Packing()


@dataclass(frozen=True, kw_only=True)
class TokenizeReport:
    """What was written."""

    prefix: Path
    dtype: str
    num_documents: int
    num_tokens: int
    num_empty: int

    def __str__(self) -> str:
        skipped = f", {self.num_empty:,} empty documents skipped" if self.num_empty else ""
        return f"{self.prefix}: {self.num_documents:,} documents, {self.num_tokens:,} tokens ({self.dtype}){skipped}"


def tokenize_files(
    inputs: Sequence[Path],
    tokenizer_path: Path,
    prefix: Path,
    *,
    text_format: TextFormat = DEFAULT_FORMAT,
    packing: Packing = EOS_ONLY,
    workers: int = 1,
    overwrite: bool = False,
) -> TokenizeReport:
    """Write every document of `inputs`, in order, to the token file at `prefix`.

    Raises: DataError on unreadable or malformed text, existing output, or when no document has text.
    """
    encoder = Encoder(tokenizer_path, text_format, packing)
    num_documents = num_tokens = num_empty = 0
    with IndexedWriter(prefix, vocab_size=encoder.vocab_size, overwrite=overwrite) as writer:
        for encoded in _with_progress(_encode_all(inputs, encoder, workers), inputs):
            for tokens in encoded.documents:
                writer.add_document(tokens)
                num_documents += 1
                num_tokens += len(tokens)
            num_empty += encoded.num_empty
        if num_documents == 0:
            raise DataError("--input: no document has text; check --field and the paths")
        writer.commit(
            meta_values(
                vocab_size=encoder.vocab_size,
                tokenizer_sha256=file_digest(tokenizer_path),
                num_documents=num_documents,
                num_tokens=num_tokens,
                bos_id=encoder.bos_id,
            )
        )
    return TokenizeReport(
        prefix=prefix,
        dtype=writer.dtype.name,
        num_documents=num_documents,
        num_tokens=num_tokens,
        num_empty=num_empty,
    )


@dataclass(frozen=True, kw_only=True)
class EncodedChunk:
    """The documents of a chunk as token ids, each int32 [num_tokens]."""

    documents: list[np.ndarray]
    num_empty: int
    file_bytes: int


class Encoder:
    """Turns chunks of text into token ids; several threads may use it at a time.

    bos_id: None for documents without. Raises: DataError when the tokenizer lacks a token that `packing` adds.
    """

    def __init__(self, tokenizer_path: Path, text_format: TextFormat, packing: Packing = EOS_ONLY) -> None:
        self._tokenizer = load_tokenizer(tokenizer_path, packing.named)
        self.text_format = text_format
        self.bos_id = require_bos(self._tokenizer) if packing.add_bos else None
        if packing.append_eos and self._tokenizer.eos_id is None:
            raise DataError(f"{unnamed(tokenizer_path, 'eos')}, or add --no-append-eos")
        self._prefix = [] if self.bos_id is None else [self.bos_id]
        self._suffix = [require_eos(self._tokenizer)] if packing.append_eos else []

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    def encode(self, chunk: Chunk) -> EncodedChunk:
        texts = list(parse_chunk(chunk, self.text_format))
        filled = [text for text in texts if text.strip()]
        token_ids = self._tokenizer.encode_all(filled)
        return EncodedChunk(
            documents=[np.array(self._prefix + ids + self._suffix, dtype=np.int32) for ids in token_ids],
            num_empty=len(texts) - len(filled),
            file_bytes=chunk.file_bytes,
        )


def _encode_all(inputs: Sequence[Path], encoder: Encoder, workers: int) -> Iterator[EncodedChunk]:
    """Encode the chunks of the files, in order, of which a few for each worker are read ahead."""
    pending: deque[Future[EncodedChunk]] = deque()
    with ThreadPoolExecutor(workers) as executor:
        try:
            for chunk in read_chunks(inputs, encoder.text_format):
                pending.append(executor.submit(encoder.encode, chunk))
                if len(pending) == workers * _CHUNKS_PER_WORKER:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            executor.shutdown(cancel_futures=True)


def _with_progress(encoded: Iterator[EncodedChunk], inputs: Sequence[Path]) -> Iterator[EncodedChunk]:
    """Shows the bytes of the input files that are done, on a terminal only."""
    total_bytes = sum(path.stat().st_size for path in inputs if path.is_file())
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="tokenize", disable=None) as bar:
        for chunk in encoded:
            bar.update(chunk.file_bytes)
            yield chunk
