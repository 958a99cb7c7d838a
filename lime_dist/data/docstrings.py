"""The docstrings of Python sources, read by `ast` and without importing anything: one document a module."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, kw_only=True)
class Document:
    """A named text; the name alone decides whether it is held out."""

    name: str
    text: str


def module_documents(root: Path, paths: Iterable[Path], seen: set[str]) -> Iterator[Document]:
    """One document for each source file of `paths` that documents anything, named by its path under `root`.

    seen: docstrings that are left out; those of each document join them.
    """
    for path in paths:
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
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
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    return list(_walk(module_name, tree))


def _walk(name: str, node: ast.Module | _Definition) -> Iterator[_Section]:
    docstring = ast.get_docstring(node)
    if docstring:
        yield _Section(name, docstring)
    for child in node.body:
        if isinstance(child, _Definition):
            yield from _walk(f"{name}.{child.name}", child)
