"""Tokenizer: text comes back exactly, training is deterministic, impossible sizes are explained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lime_dist.data.documents import TextFormat
from lime_dist.data.tokenizer import load_tokenizer, train_tokenizer
from lime_dist.errors import DataError

WORDS = "the layers of a model read what earlier layers left in memory and route it by learned weights".split()
VOCAB_SIZE = 290


@pytest.fixture(scope="module")
def text_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [" ".join(WORDS[(start * step) % len(WORDS)] for step in range(12)) for start in range(400)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model_path(request: pytest.FixtureRequest, text_path: Path) -> Path:
    prefix = text_path.with_name(request.param)
    return train_tokenizer([text_path], prefix, vocab_size=VOCAB_SIZE, model_type=request.param)


@pytest.mark.parametrize(
    "text",
    [
        "the layers read",
        " leading and trailing ",
        "def f(x):\n\n    return  x   # runs\n\t\ttabs\r\n",
        "naïve 日本 🎉 \u00a0\u2028 ﬁ Å",
        "<s>the</s><unk><0x41>",
        "\n",
        "nul\0x",
    ],
)
def test_text_comes_back_exactly(model_path: Path, text: str) -> None:
    tokenizer = load_tokenizer(model_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_text_continues_another(model_path: Path) -> None:
    """What is generated is appended: no space may appear at the seam."""
    tokenizer = load_tokenizer(model_path)
    assert tokenizer.decode(tokenizer.encode("the lay") + tokenizer.encode("ers read")) == "the layers read"


def test_ids(model_path: Path) -> None:
    tokenizer = load_tokenizer(model_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, VOCAB_SIZE)
    assert len(tokenizer.encode("the layers of a model")) < 20, "no pieces longer than a character were learned"


def test_training_again_gives_the_same_file(text_path: Path, tmp_path: Path) -> None:
    models = [
        train_tokenizer([text_path], tmp_path / name, vocab_size=VOCAB_SIZE, max_lines=200).read_bytes()
        for name in "ab"
    ]
    assert models[0] == models[1]


def test_existing_model_is_kept(text_path: Path, model_path: Path) -> None:
    before = model_path.read_bytes()
    prefix = model_path.with_suffix("")
    with pytest.raises(DataError, match=r"\.model exists.*--overwrite"):
        train_tokenizer([text_path], prefix, vocab_size=VOCAB_SIZE - 1)
    assert model_path.read_bytes() == before
    train_tokenizer([text_path], prefix, vocab_size=VOCAB_SIZE, model_type=prefix.name, overwrite=True)
    assert model_path.read_bytes() == before


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_the_largest_size_is_named_and_works(text_path: Path, tmp_path: Path, model_type: str) -> None:
    with pytest.raises(DataError, match=r"^--vocab-size 99999 is too large for this text; at most \d+") as caught:
        train_tokenizer([text_path], tmp_path / "a", vocab_size=99999, model_type=model_type)
    largest = int(re.findall(r"\d+", str(caught.value))[1])
    model_path = train_tokenizer([text_path], tmp_path / "a", vocab_size=largest, model_type=model_type)
    assert load_tokenizer(model_path).vocab_size == largest


def test_the_smallest_size_is_named_and_works(text_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^--vocab-size 10 is too small .* at least \d+") as caught:
        train_tokenizer([text_path], tmp_path / "a", vocab_size=10)
    smallest = int(re.findall(r"\d+", str(caught.value))[1])
    model_path = train_tokenizer([text_path], tmp_path / "a", vocab_size=smallest)
    assert load_tokenizer(model_path).vocab_size == smallest


def test_long_lines_are_trained_on(text_path: Path, tmp_path: Path) -> None:
    long_path = tmp_path / "long.txt"
    long_path.write_text("x " * 5000 + text_path.read_text().replace("\n", " "))
    model_path = train_tokenizer([long_path], tmp_path / "a", vocab_size=VOCAB_SIZE)
    assert len(load_tokenizer(model_path).encode("the layers of a model")) < 20


def test_a_malformed_line_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text"')
    with pytest.raises(DataError, match=r"a\.jsonl:2: not one JSON object"):
        train_tokenizer([path], tmp_path / "a", vocab_size=300)
    assert list(tmp_path.iterdir()) == [path]


def test_too_few_lines(text_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--max-lines 100 is too few; at least 101"):
        train_tokenizer([text_path], tmp_path / "a", vocab_size=VOCAB_SIZE, max_lines=100)


def test_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n")
    with pytest.raises(DataError, match="--input: the files hold no text"):
        train_tokenizer([path], tmp_path / "a", vocab_size=300, text_format=TextFormat(document_per_line=True))


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist.*train-tokenizer"):
        load_tokenizer(tmp_path / "a.model")
    (tmp_path / "a.model").write_text("text")
    with pytest.raises(DataError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "a.model")
