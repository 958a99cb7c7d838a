"""`AutoTokenizer` of an export gives the ids of our tokenizer for every text, and the text back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hugging_face_stand_ins import SIZES, transformers
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from lime_dist.checkpoint.whole_writer import write_whole
from lime_dist.config import check_config, load_config, parse_config
from lime_dist.data.tokenizer import list_tokenizer, load_tokenizer, train_tokenizer
from lime_dist.errors import DataError
from lime_dist.hugging_face.export import Export, export_checkpoint
from lime_dist.hugging_face.importing import import_model
from lime_dist.hugging_face.tokenizer_json import tokenizer_files
from lime_dist.lime.values import initial_values
from lime_dist.plan.parameters import logical_tensors

ROOT = Path(__file__).parents[2]
KINDS = ("bpe", "unigram", "words")
# Runs that merge in more than one way, spaces, what spells tokens, characters without a piece, and what is no text.
HARD = [
    "",
    " ",
    "   ",
    " a",
    "a ",
    "  two  spaces  and   three ",
    "\n\n\tx\r\n",
    *("a" * length for length in range(2, 40)),
    *(" " * length for length in range(2, 40)),
    *("=-" * length for length in range(2, 20)),
    *("ab a" * length for length in range(2, 20)),
    "<s>",
    "</s>",
    "a</s>b<s> <unk>",
    "<0x41><0xFF> <0x0A>",
    "<<s>>",
    "漢字 ünïcode ∂é 🙂🙃 \u00a0\u2003\u200b",
    "\u0301e\u0301",
    "e\u0301 ﬁ Ⅷ ½ ＡＢＣ",
    "\u2581\u2581x\u2581",
    "\x00\x01\x7f",
    "12345+67*(8-9)=0",
    "Alex is a bompus. Every bompus is a lempus",
]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "words":
        words = [" bompus", " lempus", "Alex", " is", " is a", "bom", "12"]
        return list_tokenizer(
            folder / "words.model", words=words, characters="Eabcdefghijklmnopqrstuvwxyz.+-*/()=0123456789"
        )
    text = folder / "text.txt"
    runs = "\n".join("a" * n + " " * n + "b" + "=-" * n + "ab a" * n for n in range(30))
    text.write_text((ROOT / "README.md").read_text() + (ROOT / "docs" / "clusters.md").read_text() + runs)
    return train_tokenizer([text], folder / request.param, vocab_size=700, model_type=request.param, workers=1)


@pytest.fixture(scope="module", params=("full", "none"))
def both(
    request: pytest.FixtureRequest, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SentencePieceProcessor, Any]:
    """Of a LIMe model, and of a LLaMA, for which transformers has a tokenizer class of its own."""
    folder = tmp_path_factory.mktemp("exported")
    own = SentencePieceProcessor(model_file=str(tokenizer))
    depth = {"router": "none"} if request.param == "none" else {}
    exported = export_model(folder, tokenizer, own.vocab_size(), **depth)
    return own, transformers.AutoTokenizer.from_pretrained(exported, trust_remote_code=False)


def export_model(folder: Path, tokenizer: Path, vocab_size: int, **depth: str) -> Path:
    """A model of one layer with that tokenizer, as exported."""
    sizes = SIZES | {"vocab_size": vocab_size, "num_layers": 1}
    config = check_config(parse_config({"model": sizes, "depth": depth, "data": {"tokenizer": str(tokenizer)}}))
    tensors = logical_tensors(config.model, config.pattern).values()
    values = (("weight", tensor, initial_values(tensor, 0).numpy()) for tensor in tensors)
    write_whole(folder / "step_000000", config, values, step=0, samples_seen=0)
    export_checkpoint(Export(checkpoint=folder / "step_000000", out=folder / "hf"))
    return folder / "hf"


def texts() -> Iterator[str]:
    yield from HARD
    for path in (*sorted((ROOT / "tests" / "unit").glob("*.py"))[:12], ROOT / "docs" / "failures.md"):
        yield from path.read_text().split("\n\n")
    generator = random.Random(5)
    letters = "aaab   =-\n<s>/0x4F1abompuslé漢\u2581"
    for _ in range(2000):
        yield "".join(generator.choices(letters, k=generator.randint(1, 40)))


def test_ids(tokenizer: Path, both: tuple[SentencePieceProcessor, Any]) -> None:
    """Where two ways to cut have the same score, SentencePiece's unigram models go by how its fp32 sums are rounded."""
    own, theirs = both
    other = [text for text in texts() if theirs(text)["input_ids"] != own.encode(text)]
    if tokenizer.stem != "unigram":
        assert other == []
    assert len(other) < 20
    for text in other:
        assert score(own, theirs(text)["input_ids"]) == pytest.approx(score(own, own.encode(text)), rel=1e-6), repr(
            text
        )


def score(own: SentencePieceProcessor, ids: list[int]) -> float:
    return sum(own.get_score(token) for token in ids)


def test_texts_come_back(both: tuple[SentencePieceProcessor, Any]) -> None:
    own, theirs = both
    for text in texts():
        assert theirs.decode(own.encode(text)) == own.decode(own.encode(text)), repr(text)


def test_special_tokens(both: tuple[SentencePieceProcessor, Any]) -> None:
    own, theirs = both
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (own.bos_id(), own.eos_id(), own.unk_id())
    assert len(theirs) == own.vocab_size()
    batch = theirs(["ab", "a longer text"], padding=True, return_tensors="pt")
    length = len(own.encode("ab"))
    assert batch["input_ids"][0, -length:].tolist() == own.encode("ab") and batch["attention_mask"][0].sum() == length


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises texts"),
        ({"add_dummy_prefix": True}, "puts a space before texts"),
        ({"byte_fallback": False}, "has no bytes for unknown characters"),
        ({"remove_extra_whitespaces": True}, "normalises texts"),
        ({"model_type": "unigram", "user_defined_symbols": ["xyz"]}, "has symbols of its own in a unigram model"),
    ],
    ids=str,
)
def test_models_without_an_equal(options: dict[str, Any], problem: str, tmp_path: Path) -> None:
    usual = dict(
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, vocab_size=400, minloglevel=2,
    )  # fmt: skip
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "docs" / "clusters.md").read_text())
    SentencePieceTrainer.train(input=str(text), model_prefix=str(tmp_path / "t"), **usual | options)
    with pytest.raises(DataError, match=problem):
        tokenizer_files(tmp_path / "t.model", 64)


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(b"\xff\xff no model")
    with pytest.raises(DataError, match="is not a SentencePiece model"):
        tokenizer_files(tmp_path / "t.model", 64)


def test_a_tokenizer_json_goes_out_and_comes_back(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    library.train_from_iterator([(ROOT / "README.md").read_text()], trainer)
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    own = load_tokenizer(tmp_path / "tokenizer.json")
    exported = export_model(tmp_path / "model", own.path, own.vocab_size)
    theirs = transformers.AutoTokenizer.from_pretrained(exported, trust_remote_code=False)
    assert theirs.eos_token_id == own.eos_id is not None and theirs.bos_token_id is None
    assert [theirs.encode(text) for text in HARD] == own.encode_all(HARD)
    import_model(exported, tmp_path / "run")
    again = load_tokenizer(load_config(tmp_path / "run" / "config.yaml", []).data.tokenizer)
    assert again.path == tmp_path / "run" / "tokenizer.json" and again.eos_id == own.eos_id
    assert again.encode_all(HARD) == own.encode_all(HARD)
