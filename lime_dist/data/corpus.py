"""A small English corpus without a network: the documentation that comes with the Python installation.

One document per topic of `help()` and one per module of the standard library (its docstrings), and on request the
documentation of the installed packages. For trying things out; not a corpus to publish results on.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lime_dist.data.docstrings import Document, module_documents
from lime_dist.data.output_files import prepare_outputs, written_whole
from lime_dist.data.package_docs import package_documents, without_repeats
from lime_dist.errors import DataError

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages"})


@dataclass(frozen=True, kw_only=True)
class CorpusFile:
    """What one written file holds."""

    path: Path
    num_documents: int
    num_characters: int

    def __str__(self) -> str:
        return f"{self.path}: {self.num_documents:,} documents, {self.num_characters:,} characters"


def build_corpus(
    out_dir: Path, *, valid_fraction: float = 0.05, packages: bool = False, overwrite: bool = False
) -> list[CorpusFile]:
    """Write `train.jsonl` and `valid.jsonl`; the latter gets about `valid_fraction` of the documents, always the same.

    packages: take the installed packages' documentation too, each paragraph of the corpus once.

    Raises: DataError when a file exists, or when this Python comes without its documentation and sources.
    """
    train_path, valid_path = out_dir / "train.jsonl", out_dir / "valid.jsonl"
    prepare_outputs((train_path, valid_path), overwrite=overwrite)
    documents = list(without_repeats(_all_documents()) if packages else _standard_documents(set()))
    if not documents:
        raise DataError("build-corpus: this Python has neither topics nor library sources; use a full installation")
    valid = [document for document in documents if is_held_out(document.name, valid_fraction)]
    train = [document for document in documents if not is_held_out(document.name, valid_fraction)]
    return [_write_json_lines(train_path, train), _write_json_lines(valid_path, valid)]


def _all_documents() -> Iterator[Document]:
    seen: set[str] = set()
    yield from _standard_documents(seen)
    for root in sorted({Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}):
        yield from package_documents(root, seen)


def _standard_documents(seen: set[str]) -> Iterator[Document]:
    yield from topic_documents()
    yield from library_documents(Path(sysconfig.get_path("stdlib")), seen)


def is_held_out(name: str, valid_fraction: float) -> bool:
    """A stable hash of the name, so that adding documents moves no other document to the other side."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < valid_fraction * 2**64


def topic_documents() -> Iterator[Document]:
    """The texts behind `help("topic")`, by name."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name in sorted(topics):
        yield Document(name=f"topic {name}", text=topics[name].strip() + "\n")


def library_documents(root: Path, seen: set[str]) -> Iterator[Document]:
    """The docstrings of every module of the standard library under `root`; see `module_documents` for `seen`."""
    paths = (path for path in sorted(root.rglob("*.py")) if _SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts))
    return module_documents(root, paths, seen)


def _write_json_lines(path: Path, documents: Iterable[Document]) -> CorpusFile:
    num_documents = num_characters = 0
    with written_whole(path) as partial, partial.open("w", encoding="utf-8") as stream:
        for document in documents:
            stream.write(json.dumps({"name": document.name, "text": document.text}, ensure_ascii=False) + "\n")
            num_documents += 1
            num_characters += len(document.text)
    return CorpusFile(path=path, num_documents=num_documents, num_characters=num_characters)
