"""The copy of its tokenizer in a run's folder: made where it is another one, found by what it holds."""

from __future__ import annotations

from pathlib import Path

from lime_dist.data.checksums import file_digest
from lime_dist.data.kept_tokenizer import find_kept_tokenizer, keep_tokenizer


def test_it_is_copied_where_it_is_another_one(tmp_path: Path) -> None:
    source, run_dir = tmp_path / "made" / "x.model", tmp_path / "run"
    source.parent.mkdir()
    run_dir.mkdir()
    source.write_bytes(b"first")
    keep_tokenizer(source, run_dir)
    kept = run_dir / "tokenizer.model"
    assert kept.read_bytes() == b"first" and find_kept_tokenizer(run_dir) == kept
    before = kept.stat().st_ino
    keep_tokenizer(source, run_dir)
    keep_tokenizer(kept, run_dir)
    assert kept.stat().st_ino == before
    source.write_bytes(b"other")
    keep_tokenizer(source, run_dir)
    assert kept.read_bytes() == b"other" and [path.name for path in run_dir.iterdir()] == ["tokenizer.model"]


def test_what_names_the_special_tokens_goes_with_a_json_file(tmp_path: Path) -> None:
    source, config, run_dir = tmp_path / "gpt.json", tmp_path / "tokenizer_config.json", tmp_path / "run"
    run_dir.mkdir()
    source.write_text("{}")
    config.write_text('{"eos_token": "<end>"}')
    keep_tokenizer(source, run_dir)
    assert (run_dir / "tokenizer.json").read_text() == "{}"
    assert (run_dir / "tokenizer_config.json").read_text() == config.read_text()
    config.unlink()
    keep_tokenizer(source, run_dir)
    assert not (run_dir / "tokenizer_config.json").exists()


def test_of_two_kinds_the_one_that_is_asked_for(tmp_path: Path) -> None:
    model, library = tmp_path / "tokenizer.model", tmp_path / "tokenizer.json"
    assert find_kept_tokenizer(tmp_path) is None
    library.write_text("{}")
    assert find_kept_tokenizer(tmp_path) == library
    model.write_bytes(b"model")
    assert find_kept_tokenizer(tmp_path, file_digest(library)) == library
    assert find_kept_tokenizer(tmp_path, file_digest(model)) == model
    assert find_kept_tokenizer(tmp_path, "0" * 64) is None
