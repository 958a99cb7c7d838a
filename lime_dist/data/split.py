"""Which part of a token file trains and which is held out, and whether a part is enough. Needs no torch."""

from __future__ import annotations

import numpy as np

from lime_dist.data.indexed import TokenFiles
from lime_dist.errors import DataError

# A range of a file's documents, in file order and as fractions: (0.0, 0.98) and (0.98, 1.0) share none.
Split = tuple[float, float]
WHOLE: Split = (0.0, 1.0)


def train_split(valid_fraction: float) -> Split:
    return 0.0, 1.0 - valid_fraction


def held_out_split(valid_fraction: float) -> Split:
    return 1.0 - valid_fraction, 1.0


def require_vocabulary(files: TokenFiles, vocab_size: int, *, key: str) -> None:
    """Raises: DataError when the meta file says that the files were made for more ids than the model has."""
    if files.vocab_size is not None and files.vocab_size > vocab_size:
        raise DataError(
            f"{key}: {files.prefix} was tokenized to {files.vocab_size} ids, model.vocab_size is {vocab_size}; "
            f"set model.vocab_size={files.vocab_size} or tokenize again"
        )


def cut_documents(files: TokenFiles, split: Split, *, seq_length: int, key: str) -> np.ndarray:
    """int64 [documents + 1]: where each document of the split begins, and where the last one ends.

    Raises: DataError when the split holds less than one sample.
    """
    first, last = (round(fraction * files.num_documents) for fraction in split)
    bounds = files.document_bounds[first : last + 1]
    num_tokens = int(bounds[-1] - bounds[0])
    if num_samples(bounds, seq_length) > 0:
        return bounds
    needed = f"one sample needs {seq_length + 1}"
    if split == WHOLE:
        raise DataError(f"{key}: {files.prefix} has {num_tokens} tokens, {needed}; lower data.seq_length or add text")
    part, change = ("training", "lower") if split[0] == 0 else ("validation", "raise")
    raise DataError(
        f"data.valid_fraction: leaves {last - first} of {files.num_documents} documents of {files.prefix} for {part}, "
        f"{num_tokens} tokens, {needed}; {change} it, lower data.seq_length or add text"
    )


def num_samples(bounds: np.ndarray, seq_length: int) -> int:
    """Samples that the documents within `bounds` give an epoch; neighbours share a token."""
    return max(0, int(bounds[-1] - bounds[0]) - 1) // seq_length
