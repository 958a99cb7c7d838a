"""The text that a run's model is analysed on: its own held-out sequences, or a file tokenized for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from lime_dist.config import Config
from lime_dist.data.documents import DEFAULT_FORMAT, read_documents
from lime_dist.data.marks import token_ids
from lime_dist.data.tokenizer import Tokenizer, require_eos
from lime_dist.errors import ConfigError, DataError
from lime_dist.training.run_data import open_held_out_data

SEQUENCES_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Text:
    """sequence(i), for i below num_sequences: int64 [seq + 1], inputs and the targets one token on, with marks (`data/marks.py`)
    where the run's own samples have them.
    """

    source: str
    seq_length: int
    num_sequences: int
    sequence: Callable[[int], numpy.ndarray]

    def batches(self, count: int, device: torch.device) -> list[Tensor]:
        """The first `count` batches [SEQUENCES_AT_ONCE, seq + 1], with marks where the run's samples have some, fewer where there is less text, all of one size."""
        size = min(SEQUENCES_AT_ONCE, self.num_sequences)
        starts = range(0, min(count * size, self.num_sequences) - size + 1, size)
        return [
            torch.from_numpy(numpy.stack([self.sequence(start + row) for row in range(size)])).to(device)
            for start in starts
        ]

    def sequences(self) -> Iterator[list[int]]:
        """The token ids of all of them, once."""
        return (token_ids(self.sequence(index)).tolist() for index in range(self.num_sequences))


def open_text(config: Config, file: Path | None, tokenizer: Tokenizer | None) -> Text:
    """tokenizer: None where there is no tokenizer. Raises: ConfigError, DataError."""
    if file is not None:
        if tokenizer is None:
            raise ConfigError("data.tokenizer: the run names none that is here; give --tokenizer to read --text")
        return _text_of_file(file, tokenizer, config.data.seq_length)
    try:
        samples = open_held_out_data(config)
    except DataError as error:
        raise DataError(f"{error} (or give --text FILE)") from None
    if samples is None:
        raise ConfigError("data.valid: the run has no held-out text; give --text FILE")
    source = "data.valid" if config.data.valid else f"the last {config.data.valid_fraction:g} of data.train"
    return Text(
        source=source,
        seq_length=config.data.seq_length,
        num_sequences=sum(samples.samples_per_epoch),
        sequence=samples.sample,
    )


def _text_of_file(file: Path, tokenizer: Tokenizer, seq_length: int) -> Text:
    """Documents joined with the end-of-sequence token between them, as in token files; a tail is left out."""
    try:
        documents = list(read_documents([file], DEFAULT_FORMAT))
    except DataError as error:
        raise DataError(str(error).replace("--input", "--text", 1)) from None
    end = require_eos(tokenizer)
    tokens = numpy.array(
        [token for document in documents for token in (*tokenizer.encode(document), end)],
        dtype=numpy.int64,
    )
    count = max(0, len(tokens) - 1) // seq_length
    if not count:
        raise DataError(
            f"--text: {file} has {len(tokens)} tokens, one sequence needs {seq_length + 1}; give a longer text"
        )
    return Text(
        source=str(file),
        seq_length=seq_length,
        num_sequences=count,
        sequence=lambda index: tokens[index * seq_length : (index + 1) * seq_length + 1],
    )
