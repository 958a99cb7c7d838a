"""A small English corpus without a network: the documentation that comes with the Python installation.

One document per topic of `help()` and one per module of the standard library (its docstrings, read from
the source without importing it). For trying things out; not a corpus to publish results on.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lime_dist.data.output_files import prepare_outputs, written_whole
from lime_dist.errors import DataError

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages"})
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, kw_only=True)
class Document:
    """A named text; the name alone decides whether it is held out."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class CorpusFile:
    """What one written file holds."""

    path: Path
    num_documents: int
    num_characters: int

    def __str__(self) -> str:
        return f"{self.path}: {self.num_documents:,} documents, {self.num_characters:,} characters"


def build_corpus(out_dir: Path, *, valid_fraction: float = 0.05, overwrite: bool = False) -> list[CorpusFile]:
    """Write `train.jsonl` and `valid.jsonl`; the latter gets about `valid_fraction` of the documents, always the same.

    Raises: DataError when a file exists, or when this Python comes without its documentation and sources.
    """
    train_path, valid_path = out_dir / "train.jsonl", out_dir / "valid.jsonl"
    prepare_outputs((train_path, valid_path), overwrite=overwrite)
    documents = [*topic_documents(), *module_documents(Path(sysconfig.get_path("stdlib")))]
    if not documents:
        raise DataError("build-corpus: this Python has neither topics nor library sources; use a full installation")
    valid = [document for document in documents if is_held_out(document.name, valid_fraction)]
    train = [document for document in documents if not is_held_out(document.name, valid_fraction)]
    return [_write_json_lines(train_path, train), _write_json_lines(valid_path, valid)]


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


def module_documents(root: Path) -> Iterator[Document]:
    """The docstrings of every module under `root`, by path; one that an earlier module had is left out."""
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.isdisjoint(relative.parts):
            name = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
            sections = [section for section in _sections(name, path) if section.docstring not in seen]
            seen.update(section.docstring for section in sections)
            if sections:
                yield Document(name=f"module {name}", text="\n\n".join(map(str, sections)) + "\n")


@dataclass(frozen=True)
class _Section:
    """One docstring under the dotted name of what it documents."""

    name: str
    docstring: str

    def __str__(self) -> str:
        return f"{self.name}\n\n{self.docstring}"


def _sections(module_name: str, path: Path) -> list[_Section]:
    """The docstrings of a source file in source order; none when it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    return list(_walk(module_name, tree))


def _walk(name: str, node: ast.Module | _Definition) -> Iterator[_Section]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield _Section(name, docstring)
    for child in node.body:
        if isinstance(child, _Definition):
            yield from _walk(f"{name}.{child.name}", child)


def _write_json_lines(path: Path, documents: Iterable[Document]) -> CorpusFile:
    num_documents = num_characters = 0
    with written_whole(path) as partial, partial.open("w", encoding="utf-8") as stream:
        for document in documents:
            stream.write(json.dumps({"name": document.name, "text": document.text}, ensure_ascii=False) + "\n")
            num_documents += 1
            num_characters += len(document.text)
    return CorpusFile(path=path, num_documents=num_documents, num_characters=num_characters)
