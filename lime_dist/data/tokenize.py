"""Text files to a token file, over several worker processes; the result does not depend on their number."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lime_dist.data.documents import DEFAULT_FORMAT, Chunk, TextFormat, parse_chunk, read_chunks
from lime_dist.data.indexed import IndexedWriter
from lime_dist.data.tokenizer import load_tokenizer
from lime_dist.errors import DataError

_CHUNKS_PER_WORKER = 4


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
    append_eos: bool = True,
    workers: int = 1,
    overwrite: bool = False,
) -> TokenizeReport:
    """Write every document of `inputs`, in order, to the token file at `prefix`.

    With `workers` > 1 a calling script needs the `if __name__ == "__main__"` guard (processes are spawned).
    Raises: DataError on unreadable or malformed text, existing output, or when no document has text.
    """
    encoder = Encoder(tokenizer_path, text_format, append_eos=append_eos)
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
            {
                "vocab_size": encoder.vocab_size,
                "tokenizer_sha256": hashlib.sha256(tokenizer_path.read_bytes()).hexdigest(),
                "documents": num_documents,
                "tokens": num_tokens,
            }
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
    """Turns chunks of text into token ids; can be sent to another process.

    Raises: DataError when `append_eos` and the tokenizer has no such token.
    """

    def __init__(self, tokenizer_path: Path, text_format: TextFormat, *, append_eos: bool) -> None:
        self._processor = load_tokenizer(tokenizer_path)
        self.text_format = text_format
        self._suffix = [self._processor.eos_id()] if append_eos else []
        if self._suffix == [-1]:
            raise DataError(f"--append-eos: {tokenizer_path} has no end-of-sequence token; add --no-append-eos")

    @property
    def vocab_size(self) -> int:
        return self._processor.get_piece_size()

    def encode(self, chunk: Chunk) -> EncodedChunk:
        texts = list(parse_chunk(chunk, self.text_format))
        filled = [text for text in texts if text.strip()]
        token_ids = self._processor.encode(filled, num_threads=1)
        return EncodedChunk(
            documents=[np.array(ids + self._suffix, dtype=np.int32) for ids in token_ids],
            num_empty=len(texts) - len(filled),
            file_bytes=chunk.file_bytes,
        )


def _encode_all(inputs: Sequence[Path], encoder: Encoder, workers: int) -> Iterator[EncodedChunk]:
    """Encode the chunks of the files, in order; a dead worker raises BrokenProcessPool."""
    chunks = read_chunks(inputs, encoder.text_format)
    if workers == 1:
        yield from map(encoder.encode, chunks)
        return
    spawn = multiprocessing.get_context("spawn")  # forking a process in which torch has threads can hang
    with ProcessPoolExecutor(workers, spawn, initializer=_start_worker, initargs=(encoder,)) as executor:
        try:
            yield from _in_order(executor, chunks, limit=workers * _CHUNKS_PER_WORKER)
        finally:
            executor.shutdown(cancel_futures=True)


def _in_order(executor: ProcessPoolExecutor, chunks: Iterator[Chunk], *, limit: int) -> Iterator[EncodedChunk]:
    """Results in the order of `chunks`, of which at most `limit` are read ahead."""
    pending: deque[Future[EncodedChunk]] = deque()
    for chunk in chunks:
        pending.append(executor.submit(_encode_in_worker, chunk))
        if len(pending) == limit:
            yield pending.popleft().result()
    for future in pending:
        yield future.result()


_worker_encoder: Encoder  # set once in each worker process


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder


def _encode_in_worker(chunk: Chunk) -> EncodedChunk:
    return _worker_encoder.encode(chunk)


def _with_progress(encoded: Iterator[EncodedChunk], inputs: Sequence[Path]) -> Iterator[EncodedChunk]:
    """Shows the bytes of the input files that are done, on a terminal only."""
    total_bytes = sum(path.stat().st_size for path in inputs if path.is_file())
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="tokenize", disable=None) as bar:
        for chunk in encoded:
            bar.update(chunk.file_bytes)
            yield chunk
