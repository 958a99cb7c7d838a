"""The documentation of installed packages: docstrings, the descriptions in their metadata, and text files.

License texts, test folders and tables of numbers are left out. What is found depends on what is installed.
"""

from __future__ import annotations

import email
from collections.abc import Iterable, Iterator
from pathlib import Path

from lime_dist.data.docstrings import Document, module_documents

_SKIPPED_FOLDERS = frozenset({"test", "tests", "testing", "testdata", "data", "licenses", "license", "LICENSES"})
_LEGAL = ("license", "licence", "copying", "notice", "authors", "copyright", "thirdparty", "third_party", "patents")
_TEXT_SUFFIXES = (".rst", ".md", ".txt")
_MIN_LETTERS = 0.6  # of a text file's characters, spaces apart: below are tables of numbers and lists of paths
_MIN_REPEAT = 80  # characters: shorter paragraphs, such as headings of sections, may repeat


def package_documents(root: Path, seen: set[str]) -> Iterator[Document]:
    """Docstrings by module, then descriptions by package, then documentation files by path under `root`.

    seen: docstrings that are left out; all that are found join them.
    """
    sources = sorted(path for suffix in ("py", "pyi") for path in root.rglob(f"*.{suffix}") if _is_wanted(root, path))
    yield from module_documents(root, sources, seen)
    for path in sorted(root.glob("*.dist-info/METADATA")):
        yield from _description(path)
    for path in sorted(path for path in root.rglob("*") if path.suffix in _TEXT_SUFFIXES and _is_wanted(root, path)):
        yield from _text_file(root, path)


def without_repeats(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents without the paragraphs that an earlier document, or they themselves, had already."""
    seen: set[str] = set()
    for document in documents:
        kept = []
        for paragraph in document.text.split("\n\n"):
            if len(paragraph) >= _MIN_REPEAT:
                if paragraph.strip() in seen:
                    continue
                seen.add(paragraph.strip())
            kept.append(paragraph)
        text = "\n\n".join(kept).strip()
        if text:
            yield Document(name=document.name, text=text + "\n")


def _is_wanted(root: Path, path: Path) -> bool:
    relative = path.relative_to(root)
    folders = relative.parts[:-1]
    return (
        _SKIPPED_FOLDERS.isdisjoint(folders)
        and not any(folder.endswith((".dist-info", ".egg-info")) for folder in folders)
        and not relative.name.lower().startswith(_LEGAL)
    )


def _description(path: Path) -> Iterator[Document]:
    """The README that a package's metadata carries, behind its header or in it."""
    message = email.message_from_string(_read(path))
    text = (str(message.get_payload()) or str(message.get("Description", ""))).strip()
    if text:
        yield Document(name=f"description {message['Name']}", text=text + "\n")


def _text_file(root: Path, path: Path) -> Iterator[Document]:
    text = _read(path).strip()
    visible = sum(not character.isspace() for character in text)
    if visible and sum(character.isalpha() for character in text) >= _MIN_LETTERS * visible:
        yield Document(name=f"file {path.relative_to(root).as_posix()}", text=text + "\n")


def _read(path: Path) -> str:
    """The text of a file; none when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
