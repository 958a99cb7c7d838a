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
    first, last = _documents_of(files, split)
    bounds = files.document_bounds[first : last + 1]
    num_tokens = int(bounds[-1] - bounds[0])
    if num_samples(bounds, seq_length) > 0:
        return bounds
    needed = f"one sample needs {seq_length + 1}"
    if split == WHOLE:
        raise DataError(f"{key}: {files.prefix} has {num_tokens} tokens, {needed}; lower data.seq_length or add text")
    left, change = _left_by_fraction(files, split)
    raise DataError(f"{left}, {num_tokens} tokens, {needed}; {change} it, lower data.seq_length or add text")


def whole_documents(files: TokenFiles, split: Split, *, seq_length: int, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Where the documents of the split that have tokens begin and end, of which each fits a sample.

    Raises: DataError when there is none, or one does not fit.
    """
    first, last = _documents_of(files, split)
    bounds = files.document_bounds[first : last + 1]
    lengths = np.diff(bounds)
    longest = int(lengths.max(initial=0))
    if longest > seq_length + 1:
        raise DataError(
            f"{key}: {files.prefix} has a document of {longest} tokens, a sample of whole documents holds {seq_length + 1}; "
            f"set data.seq_length={longest - 1} or data.samples=stream"
        )
    if longest == 0 and split == WHOLE:
        raise DataError(f"{key}: {files.prefix} has no document with tokens; add text")
    if longest == 0:
        left, change = _left_by_fraction(files, split)
        raise DataError(f"{left}; {change} it or add text")
    return bounds[:-1][lengths > 0], bounds[1:][lengths > 0]


def _documents_of(files: TokenFiles, split: Split) -> tuple[int, int]:
    """The first document, and the one behind the last."""
    first, last = (round(fraction * files.num_documents) for fraction in split)
    return first, last


def _left_by_fraction(files: TokenFiles, split: Split) -> tuple[str, str]:
    """What is wrong with a part that is too small, and how its fraction is to change."""
    first, last = _documents_of(files, split)
    part, change = ("training", "lower") if split[0] == 0 else ("validation", "raise")
    return (
        f"data.valid_fraction: leaves {last - first} of {files.num_documents} documents of {files.prefix} for {part}",
        change,
    )


def num_samples(bounds: np.ndarray, seq_length: int) -> int:
    """Samples that the documents within `bounds` give an epoch; neighbours share a token."""
    return max(0, int(bounds[-1] - bounds[0]) - 1) // seq_length
