"""The corpus of Python's own documentation: what is taken, what is skipped, and the stable split."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from lime_dist.data.corpus import build_corpus, is_held_out, module_documents
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
    documents = {document.name: document.text for document in module_documents(library)}
    assert list(documents) == ["module alpha", "module latin", "module package"]
    assert documents["module alpha"] == (
        "alpha\n\nWhat the module is.\n\nalpha.Thing\n\nWhat a thing is.\n\nalpha.Thing.act\n\nWhat acting does.\n"
    )
    assert documents["module latin"] == "latin\n\nCafé.\n"
    assert documents["module package"] == "package\n\nWhat the package is.\n", "a repeated docstring was kept"


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
