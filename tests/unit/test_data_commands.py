"""The `data` commands as a user runs them: the whole way from nothing to samples, and errors of one line."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from lime_dist.data.commands import add_parser
from lime_dist.data.indexed import check_files
from lime_dist.errors import DataError


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser("lime-dist")
    add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["data", *map(str, arguments)])
    code: int = args.run(args)
    return code


def test_from_nothing_to_token_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build-corpus", "--out", tmp_path, "--valid-fraction", 0.1) == 0
    train, valid = tmp_path / "train.jsonl", tmp_path / "valid.jsonl"
    assert run("train-tokenizer", "--input", valid, "--vocab-size", 1000, "--out", tmp_path / "tok") == 0
    model = tmp_path / "tok.model"
    for path in (train, valid):
        prefix = tmp_path / path.stem
        assert run("tokenize", "--input", path, "--tokenizer", model, "--out", prefix, "--workers", 1) == 0
    files = check_files(str(tmp_path / "train"))
    assert files.vocab_size == 1000 and files.num_documents > 200 and files.num_tokens > 100_000
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"{train}: ") and printed[0].endswith(" characters")
    assert printed[2] == f"{model}: 1,000 token ids"
    assert printed[3] == (
        f"{tmp_path / 'train'}: {files.num_documents:,} documents, {files.num_tokens:,} tokens (uint16)"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("train-tokenizer --input {t}/a.txt --vocab-size 9000 --out {t}/tok", r"--vocab-size 9000 .* at most \d+"),
        ("train-tokenizer --input {t}/no.txt --vocab-size 300 --out {t}/tok", r"--input: .*no\.txt is not a file"),
        ("train-tokenizer --input {t}/a.txt --vocab-size 300 --out {t}/a.txt/tok", "--out: cannot make the folder"),
        ("tokenize --input {t}/a.txt --tokenizer {t}/no.model --out {t}/x", r"tokenizer: .*no\.model does not exist"),
        ("tokenize --input {t}/a.txt --tokenizer {t}/a.txt --out {t}/x", r"a\.txt is not a SentencePiece model"),
        ("build-corpus --out {t}/a.txt", "--out: cannot make the folder"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path: Path, arguments: str, said: str) -> None:
    (tmp_path / "a.txt").write_text("some text to read\n" * 20)
    with pytest.raises(DataError, match=said) as caught:
        run(*arguments.format(t=tmp_path).split())
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("build-corpus --out x --valid-fraction 1", "argument --valid-fraction: 1 holds out everything"),
        ("build-corpus --out x --valid-fraction many", "'many' is not a number between 0 and 1"),
        (
            "tokenize --input a --tokenizer b --out c --workers 0",
            "argument --workers: '0' is not a whole number above 0",
        ),
        ("train-tokenizer --input a --vocab-size -5 --out c", "argument --vocab-size"),
    ],
)
def test_values_that_no_flag_takes(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*arguments.split())
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_the_parser_loads_nothing_heavy() -> None:
    code = (
        "import argparse, sys; from lime_dist.data.commands import add_parser;"
        "add_parser(argparse.ArgumentParser().add_subparsers());"
        "sys.exit(' '.join({'torch', 'megatron', 'numpy', 'sentencepiece', 'tqdm'} & set(sys.modules)) or None)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
