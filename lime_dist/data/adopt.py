"""Takes over token files of Megatron's own tools (`preprocess_data.py`): reads all of them and writes the meta file that they lack."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lime_dist.data.checksums import block_digest, file_digest
from lime_dist.data.indexed import AGAIN, TokenFiles, check_files, open_tokens
from lime_dist.data.meta import meta_text, meta_values
from lime_dist.data.output_files import prepare_outputs, written_whole
from lime_dist.data.special_tokens import AS_THE_FILE_SAYS, SpecialTokens
from lime_dist.data.tokenizer import Tokenizer, load_tokenizer
from lime_dist.errors import DataError, shown

_KEY = "PREFIX"
_FOREIGN_AGAIN = "copy it again, or run preprocess_data.py again"
_BLOCK_TOKENS = 1 << 24
_SHOWN_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class TokenFacts:
    """What all tokens of a file show. num_begun, num_ended: documents that begin with BOS and end with EOS; num_filled: have tokens."""

    largest_id: int
    num_filled: int
    num_begun: int
    num_ended: int

    @property
    def all_begun(self) -> bool:
        return self.num_begun == self.num_filled


@dataclass(frozen=True, kw_only=True)
class AdoptReport:
    """What was found. beginning: the first tokens as text, by which a wrong tokenizer is seen."""

    files: TokenFiles
    facts: TokenFacts
    vocab_size: int
    beginning: str

    def __str__(self) -> str:
        files, facts = self.files, self.facts
        return (
            f"{files.prefix}: {files.num_documents:,} documents of {files.num_sequences:,} sequences, {files.num_tokens:,} tokens "
            f"({files.dtype.name}), the largest id {facts.largest_id:,} of {self.vocab_size:,}\n"
            f"{facts.num_begun:,} documents begin with BOS, {facts.num_ended:,} end with EOS; the first tokens: {shown(self.beginning)}"
        )


def adopt_files(
    prefix: str,
    tokenizer_path: Path,
    *,
    out: str | None = None,
    named: SpecialTokens = AS_THE_FILE_SAYS,
    overwrite: bool = False,
) -> AdoptReport:
    """Check the token files at `prefix` whole, and write `PREFIX.meta.json` as `lime-dist data tokenize` would have.

    out: a prefix elsewhere, for a folder that is not to be written to; it gets links to the files, and the meta file.
    Raises: DataError for files that are damaged, of a kind that is not trained on, or of ids that the tokenizer lacks.
    """
    tokenizer = load_tokenizer(tokenizer_path, named)
    files = _check(prefix)
    links = _links(files, out or prefix)
    meta_path = Path(f"{out or prefix}.meta.json")
    prepare_outputs([*links, meta_path], overwrite=overwrite)
    facts = _read_all(files, tokenizer)
    text = meta_text(
        meta_values(
            vocab_size=tokenizer.vocab_size,
            tokenizer_sha256=file_digest(tokenizer_path),
            num_documents=files.num_documents,
            num_tokens=files.num_tokens,
            bos_id=tokenizer.bos_id if facts.all_begun else None,
        ),
        {suffix: block_digest(Path(f"{prefix}.{suffix}")) for suffix in _suffixes(files)},
    )
    _write(meta_path, text, links)
    beginning = tokenizer.decode(open_tokens(files)[:_SHOWN_TOKENS].tolist())
    return AdoptReport(files=files, facts=facts, vocab_size=tokenizer.vocab_size, beginning=beginning)


def _check(prefix: str) -> TokenFiles:
    stem, _, suffix = prefix.rpartition(".")
    if suffix in ("bin", "idx"):
        raise DataError(f"{_KEY}: {prefix} is one file of a pair; give {stem}")
    try:
        return check_files(prefix, key=_KEY, reads_meta=False)
    except DataError as error:
        raise DataError(str(error).replace(AGAIN, _FOREIGN_AGAIN)) from None


def _suffixes(files: TokenFiles) -> tuple[str, ...]:
    return ("bin", "idx", "mask") if files.has_mask else ("bin", "idx")


def _links(files: TokenFiles, out: str) -> dict[Path, Path]:
    """The links that `out` needs, and what each leads to; none to a file that is there already under that name. `.idx` is last."""
    pairs = [(Path(f"{out}.{suffix}"), Path(f"{files.prefix}.{suffix}")) for suffix in reversed(_suffixes(files))]
    return {link: file.resolve() for link, file in pairs if not (link.exists() and link.samefile(file))}


def _write(meta_path: Path, text: str, links: dict[Path, Path]) -> None:
    """The `.idx` comes last: without it the others count as missing."""
    try:
        for link, file in links.items():
            if link.suffix != ".idx":
                _link(link, file)
        with written_whole(meta_path) as partial:
            partial.write_text(text)
        for link, file in links.items():
            if link.suffix == ".idx":
                _link(link, file)
    except OSError as error:
        folder = meta_path.parent
        raise DataError(f"--out: {folder} cannot be written to ({error.strerror}); give a prefix elsewhere") from None


def _link(link: Path, file: Path) -> None:
    with written_whole(link) as partial:
        partial.symlink_to(file)


def _read_all(files: TokenFiles, tokenizer: Tokenizer) -> TokenFacts:
    """Raises: DataError, which says where, for an id that the tokenizer lacks."""
    bounds = files.document_bounds
    filled = bounds[1:] > bounds[:-1]
    firsts, lasts = bounds[:-1][filled], bounds[1:][filled] - 1
    largest = num_begun = num_ended = 0
    for start, block in _blocks(files):
        _require_known(files, tokenizer, start, block)
        largest = max(largest, int(block.max()))
        num_begun += _count(block, firsts, start, tokenizer.bos_id)
        num_ended += _count(block, lasts, start, tokenizer.eos_id)
    return TokenFacts(largest_id=largest, num_filled=len(firsts), num_begun=num_begun, num_ended=num_ended)


def _blocks(files: TokenFiles) -> Iterator[tuple[int, np.ndarray]]:
    """Parts of the tokens, each with the place of its first. Shows the bytes that are read, on a terminal only."""
    tokens = open_tokens(files)
    with tqdm(total=tokens.nbytes, unit="B", unit_scale=True, desc="adopt", disable=None) as bar:
        for start in range(0, len(tokens), _BLOCK_TOKENS):
            block = np.asarray(tokens[start : start + _BLOCK_TOKENS])
            yield start, block
            bar.update(block.nbytes)


def _require_known(files: TokenFiles, tokenizer: Tokenizer, start: int, block: np.ndarray) -> None:
    if 0 <= block.min() and block.max() < tokenizer.vocab_size:
        return
    place = int(np.argmax((block < 0) | (block >= tokenizer.vocab_size)))
    document = int(np.searchsorted(files.document_bounds, start + place, side="right")) - 1
    raise DataError(
        f"{_KEY}: {files.prefix}.bin has the token id {block[place]} at token {start + place} (document {document}), "
        f"{tokenizer.path} has {tokenizer.vocab_size} ids; name the tokenizer that made the files"
    )


def _count(block: np.ndarray, places: np.ndarray, start: int, token: int | None) -> int:
    """How many of `places`, which ascend, are within the block and hold `token`."""
    if token is None:
        return 0
    first, last = np.searchsorted(places, [start, start + len(block)])
    return int((block[places[first:last] - start] == token).sum())
