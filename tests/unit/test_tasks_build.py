"""A task as files: what is in each, that a seed says it all, and that what cannot be made is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lime_dist.cli.command_line import build_parser
from lime_dist.data.indexed import check_files, open_mask, open_tokens
from lime_dist.data.tasks.arithmetic import Arithmetic
from lime_dist.data.tasks.build import build_task
from lime_dist.data.tokenizer import list_tokenizer, load_tokenizer
from lime_dist.errors import DataError

SIZES = {"arithmetic": {"train": 30, "valid": 12}, "prosqa": {"train": 20, "valid": 6, "test": 4}}


def build(task: str, folder: Path, *more: object) -> None:
    sizes = [word for split, size in SIZES[task].items() for word in (f"--{split}", size)]
    args = build_parser().parse_args(["data", "build-task", task, "--out", str(folder), *map(str, [*sizes, *more])])
    assert args.run(args) == 0


@pytest.fixture(scope="module", params=SIZES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("tasks") / request.param
    build(request.param, folder)
    return folder


def records(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def test_files_and_their_sizes(built: Path) -> None:
    sizes = SIZES[built.name]
    kinds = 3 if built.name == "arithmetic" else 1
    suffixes = ("jsonl", "bin", "idx", "mask", "meta.json")
    expected = {"tokenizer.model", *(f"{split}.{suffix}" for split in sizes for suffix in suffixes)}
    assert {path.name for path in built.iterdir()} == expected
    for split, size in sizes.items():
        assert len(records(built, split)) == kinds * size


def test_token_files_hold_the_examples(built: Path) -> None:
    """A document is prompt, answer and end; the answer and the end are targets."""
    tokenizer = load_tokenizer(built / "tokenizer.model")
    for split in SIZES[built.name]:
        files = check_files(str(built / split))
        assert files.has_mask and files.has_checksums and files.task == built.name
        assert files.vocab_size == tokenizer.vocab_size
        bounds = files.document_bounds
        tokens, mask = (np.split(whole, bounds[1:-1]) for whole in (open_tokens(files), open_mask(files)))
        for record, ids, targets in zip(records(built, split), tokens, mask, strict=True):
            assert ids[-1] == tokenizer.eos_id and tokenizer.eos_id not in ids[:-1]
            assert tokenizer.decode(ids[targets == 0].tolist()) == record["prompt"]
            assert tokenizer.decode(ids[targets == 1][:-1].tolist()) == record["answer"]
            assert tokenizer.encode(record["prompt"] + record["answer"]) == ids[:-1].tolist()
            assert (np.diff(targets) >= 0).all()


def test_tokens_are_characters_or_whole_words(built: Path) -> None:
    tokenizer = load_tokenizer(built / "tokenizer.model")
    texts = tokenizer.id_texts()
    for record in records(built, "train"):
        pieces = [texts[token] for token in tokenizer.encode(record["prompt"] + record["answer"])]
        if built.name == "arithmetic":
            assert all(len(piece) == 1 for piece in pieces)
        else:
            words = (record["prompt"] + record["answer"]).replace(".", " .").replace("?", " ?").split()
            assert [piece.lstrip(" ") for piece in pieces] == words


def test_no_prompt_comes_twice(built: Path) -> None:
    prompts = [record["prompt"] for split in SIZES[built.name] for record in records(built, split)]
    assert len(set(prompts)) == len(prompts)


def test_no_split_asks_what_another_asks_in_another_order(tmp_path: Path) -> None:
    """Of so few operands most expressions have one."""
    task = Arithmetic((2,))
    build_task(task, tmp_path / "few", {"train": 90, "valid": 40})
    train, valid = (
        {task.canonical(one["prompt"]) for one in records(tmp_path / "few", split)} for split in ("train", "valid")
    )
    assert not train & valid and len(train) < 90


def test_a_seed_says_it_all(built: Path, tmp_path: Path) -> None:
    build(built.name, tmp_path / "same")
    build(built.name, tmp_path / "other", "--seed", 1)
    names = [path.name for path in built.iterdir()]
    assert all((built / name).read_bytes() == (tmp_path / "same" / name).read_bytes() for name in names)
    assert not set(map(str, records(built, "train"))) & set(map(str, records(tmp_path / "other", "train")))


def test_held_out_examples_are_the_same_for_any_number_of_others(built: Path, tmp_path: Path) -> None:
    build(built.name, tmp_path, "--train", 3)
    assert records(built, "valid") == records(tmp_path, "valid")
    assert records(tmp_path, "train") == records(built, "train")[: len(records(tmp_path, "train"))]


def test_none_is_overwritten_unasked(built: Path) -> None:
    before = (built / "train.bin").read_bytes()
    with pytest.raises(DataError, match=r"^--out: .*tokenizer\.model exists; .*--overwrite"):
        build(built.name, built, "--seed", 1)
    assert (built / "train.bin").read_bytes() == before
    build(built.name, built, "--overwrite")
    assert (built / "train.bin").read_bytes() == before


def test_operands_are_chosen(tmp_path: Path) -> None:
    build("arithmetic", tmp_path, "--operands", "2,7")
    counts = [len("".join(c if c.isdigit() else " " for c in r["prompt"]).split()) for r in records(tmp_path, "valid")]
    assert counts == [2, 7] * 12


@pytest.mark.parametrize(
    ("task", "arguments", "said"),
    [
        ("arithmetic", "--operands 1", "^--operands: 1 must be from 2 to 12"),
        ("arithmetic", "--operands 2 --train 5000", r"^--train: the task has hardly more than these \d+ examples"),
        ("arithmetic", "--test 5", "^--test: arithmetic has no such file"),
        ("prosqa", "--operands 4", "^--operands: prosqa has none"),
    ],
)
def test_what_cannot_be_made_is_said(task: str, arguments: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        build(task, tmp_path, *arguments.split())
    assert not list(tmp_path.glob("train.*"))


@pytest.mark.parametrize("text", ["Every layer reads  layers.", "naïve 日本\n\t", "(a)<s></s>", "", " or", "\u00a0x"])
def test_a_listed_tokenizer_gives_every_text_back(text: str, tmp_path: Path) -> None:
    path = list_tokenizer(tmp_path / "t.model", words=("Every", " layer", " or"), characters="readsl.")
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    texts = tokenizer.id_texts()
    assert [texts[token] for token in tokenizer.encode("Every layer")] == ["Every", " layer"]
    assert tokenizer.vocab_size == 3 + 256 + 3 + len(" readsl.")
