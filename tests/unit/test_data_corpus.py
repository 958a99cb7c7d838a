"""The corpus of Python's and its packages' documentation: what is taken, what is skipped, and the stable split."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from lime_dist.data.corpus import build_corpus, is_held_out, library_documents
from lime_dist.data.docstrings import Document
from lime_dist.data.package_docs import package_documents, without_repeats
from lime_dist.errors import DataError

MODULE = '''"""What the module is."""
class Thing:
    """What a thing is."""
    def act(self):
        """What acting does."""
def bare(): pass
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A standard library of five files, two of which must not be read."""
    root = tmp_path / "library"
    for folder in (root / "package", root / "package" / "tests", root / "site-packages"):
        folder.mkdir(parents=True)
    (root / "alpha.py").write_text(MODULE)
    (root / "broken.py").write_text('"""Cut short.')
    (root / "latin.py").write_bytes('# coding: latin-1\n"""Café."""'.encode("latin-1"))
    (root / "package" / "__init__.py").write_text('"""What the package is."""\ndef act():\n    """What acting does."""')
    (root / "package" / "tests" / "case.py").write_text('"""A test."""')
    (root / "site-packages" / "other.py").write_text('"""Somebody else\'s."""')
    return root


def test_modules_are_read_once_and_tests_not_at_all(library: Path) -> None:
    documents = {document.name: document.text for document in library_documents(library, set())}
    assert list(documents) == ["module alpha", "module latin", "module package"]
    assert documents["module alpha"] == (
        "alpha\n\nWhat the module is.\n\nalpha.Thing\n\nWhat a thing is.\n\nalpha.Thing.act\n\nWhat acting does.\n"
    )
    assert documents["module latin"] == "latin\n\nCafé.\n"
    assert documents["module package"] == "package\n\nWhat the package is.\n", "a repeated docstring was kept"


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A site-packages folder with one package, its metadata, and what must not be read."""
    root = tmp_path / "packages"
    texts = {
        "thing/__init__.py": '"""What the thing is."""\ndef act():\n    """What acting does."""',
        "thing/compiled.pyi": 'def fast() -> None:\n    """What the compiled function does."""',
        "thing/tests/case.py": '"""A test."""',
        "thing/guide.rst": "Guide\n=====\n\nHow to use the thing.",
        "thing/table.txt": "1.0 2.0 3.0\n" * 20,
        "thing/LICENSE.txt": "Permission is granted.",
        "thing/data/words.txt": "some words of a test",
        "thing-1.0.dist-info/METADATA": "Metadata-Version: 2.4\nName: thing\nVersion: 1.0\n\n# Thing\n\nCafé.\n",
        "thing-1.0.dist-info/top_level.txt": "thing",
        "thing-1.0.dist-info/licenses/COPYING.md": "Permission is granted.",
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    (root / "thing" / "broken.md").write_bytes(b"\xff\xfe")
    return root


def test_packages_give_docstrings_descriptions_and_text_files(packages: Path) -> None:
    documents = {document.name: document.text for document in package_documents(packages, {"What acting does."})}
    assert documents == {
        "module thing": "thing\n\nWhat the thing is.\n",
        "module thing.compiled": "thing.compiled.fast\n\nWhat the compiled function does.\n",
        "description thing": "# Thing\n\nCafé.\n",
        "file thing/guide.rst": "Guide\n=====\n\nHow to use the thing.\n",
    }


def test_a_long_paragraph_is_kept_once_in_the_whole_corpus() -> None:
    license_text, heading = "Permission is hereby granted. " * 10, "Parameters"
    documents = [
        Document(name="a", text=f"One.\n\n{license_text}\n\n{heading}\n"),
        Document(name="b", text=f"{license_text}\n"),
        Document(name="c", text=f"{heading}\n\nThree.\n\n{license_text}\n"),
    ]
    assert {document.name: document.text for document in without_repeats(documents)} == {
        "a": f"One.\n\n{license_text}\n\n{heading}\n",
        "c": f"{heading}\n\nThree.\n",
    }


def test_with_packages_the_documents_of_the_library_stay_where_they_were(
    library: Path, packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"stdlib": library, "purelib": packages, "platlib": packages}
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folders[name]))
    build_corpus(tmp_path / "library_only", valid_fraction=0.2)
    build_corpus(tmp_path / "with_packages", valid_fraction=0.2, packages=True)
    for name in ("train.jsonl", "valid.jsonl"):
        few, many = (_names(tmp_path / folder / name) for folder in ("library_only", "with_packages"))
        assert few == [document for document in many if document in few]
    everything = _names(tmp_path / "with_packages" / "train.jsonl") + _names(tmp_path / "with_packages" / "valid.jsonl")
    assert len(everything) == len(set(everything)) and "description thing" in everything


def _names(path: Path) -> list[str]:
    return [json.loads(line)["name"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_larger_fraction_holds_out_more_and_moves_nothing_back() -> None:
    names = [f"module {index}" for index in range(2000)]
    small, large = ({name for name in names if is_held_out(name, fraction)} for fraction in (0.05, 0.2))
    assert small < large
    assert 60 < len(small) < 140 and 320 < len(large) < 480


def test_build_is_deterministic_and_holds_out_whole_documents(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(library))
    written = build_corpus(tmp_path / "a", valid_fraction=0.2)
    build_corpus(tmp_path / "b", valid_fraction=0.2)
    names: list[str] = []
    for file in written:
        assert file.path.read_bytes() == (tmp_path / "b" / file.path.name).read_bytes()
        records = [json.loads(line) for line in file.path.read_text(encoding="utf-8").splitlines()]
        assert len(records) == file.num_documents > 0
        assert sum(len(record["text"]) for record in records) == file.num_characters
        names += [record["name"] for record in records]
    assert len(names) == len(set(names))
    assert "module alpha" in names and any(name.startswith("topic ") for name in names)


def test_existing_files_are_kept(tmp_path: Path) -> None:
    (tmp_path / "valid.jsonl").write_text("mine")
    with pytest.raises(DataError, match=r"valid\.jsonl exists.*--overwrite"):
        build_corpus(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["valid.jsonl"]
