"""tokenizer.json files: the library's own ids, text back exactly, which tokens begin and end a document, and what is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from lime_dist.analysis.occurrences import WORDS, find_words
from lime_dist.cli.command_line import main
from lime_dist.data.adopt import adopt_files
from lime_dist.data.indexed import check_files, open_tokens
from lime_dist.data.special_tokens import SpecialTokens
from lime_dist.data.tokenize import Packing, tokenize_files
from lime_dist.data.tokenizer import load_tokenizer, require_bos, require_eos, train_tokenizer
from lime_dist.errors import DataError

LINES = [
    f"It is what they were {number}. We are here, this was there; islands are where it is.\n" for number in range(99)
]
TEXTS = [
    "the layers read", " leading and trailing ", "def f(x):\n\n    return  x   # runs\n\t\ttabs\r\n", "naïve 日本 🎉 \u00a0\u2028 ﬁ Å",
    "\n", "nul\0x", "", "a", " ", "  ", "<0x41> [UNK] ▁ Ġ", "e\u0301\u200d👩‍👩‍👧", "﷽", "\ufffd",
]  # fmt: skip


def byte_level(path: Path, special: list[str]) -> Path:
    """As GPT-2's; its post-processor, truncation and padding would change ids if they were used."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(LINES, trainer)
    if special:
        first = special[0]
        library.post_processor = processors.TemplateProcessing(single=f"{first} $A", special_tokens=[(first, 0)])
        library.enable_padding(length=64, pad_id=0, pad_token=first)
    library.enable_truncation(5)
    library.save(str(path))
    return path


def unigram(path: Path, special: list[str]) -> Path:
    """As T5's and many others': a mark for a space, and bytes for unknown characters."""
    library = Tokenizer(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    library.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="never")])
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=[*special, "<unk>"], unk_token="<unk>", show_progress=False
    )
    library.train_from_iterator(LINES, trainer)
    library.save(str(path))
    return path


def sentence_piece(path: Path, special: list[str]) -> Path:
    text = path.with_suffix(".txt")
    text.write_text("".join(LINES))
    return train_tokenizer([text], path.with_suffix(""), vocab_size=330, workers=1)


KINDS: dict[str, Callable[[Path, list[str]], Path]] = {
    "byte_level": byte_level,
    "unigram": unigram,
    "sentence_piece": sentence_piece,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {name: make(folder / f"{name}.json", ["<s>", "</s>"]) for name, make in KINDS.items()}


@pytest.fixture
def path(request: pytest.FixtureRequest, made: dict[str, Path]) -> Path:
    return made[request.param]


def many_texts() -> list[str]:
    draw = Random(0)
    letters = "".join(LINES[:3]) + " \n\t\u00e9\u65e5\U0001f389\u0301"
    return [*TEXTS, *LINES[:5], *("".join(draw.choices(letters, k=draw.randrange(60))) for _ in range(200))]


@pytest.mark.parametrize("path", ["byte_level", "sentence_piece"], indirect=True)
def test_every_text_comes_back_exactly(path: Path) -> None:
    tokenizer, texts = load_tokenizer(path), [text for text in many_texts() if "\u2581" not in text]
    ids = [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(one) for one in ids] == texts
    assert tokenizer.encode_all(texts) == ids
    assert tokenizer.bos_id is not None and tokenizer.eos_id is not None
    assert [tokenizer.decode([tokenizer.bos_id, *one, tokenizer.eos_id]) for one in ids] == texts
    assert max(map(max, filter(None, ids))) < tokenizer.vocab_size


@pytest.mark.parametrize("path", ["unigram"], indirect=True)
def test_texts_of_known_letters_come_back_exactly(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    known = set("".join(LINES)) - {"\n"}
    texts = ["".join(letter for letter in text if letter in known) for text in many_texts()]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts


@pytest.mark.parametrize("path", ["byte_level", "unigram"], indirect=True)
def test_ids_are_the_librarys_own(path: Path) -> None:
    """Without what its post-processor adds; as transformers does, also without the file's truncation and padding."""
    library, tokenizer = Tokenizer.from_file(str(path)), load_tokenizer(path)
    if path.stem == "byte_level":
        assert len(library.encode("x" * 9).ids) == 64, "the file pads, so that the next lines show something"
    library.no_truncation()
    library.no_padding()
    texts = [*many_texts(), "a</s><s>b"]
    ids = [library.encode(text, add_special_tokens=False).ids for text in texts]
    assert [tokenizer.encode(text) for text in texts] == ids == tokenizer.encode_all(texts)
    assert tokenizer.vocab_size == library.get_vocab_size() and max(map(len, ids)) > 5
    assert (tokenizer.bos_id, tokenizer.eos_id) == (library.token_to_id("<s>"), library.token_to_id("</s>"))


def test_an_id_beyond_a_gap_counts(tmp_path: Path) -> None:
    values = json.loads(byte_level(tmp_path / "t.json", []).read_text())
    values["added_tokens"] = [
        dict(id=1000, content="<eos>", special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)
    ]
    values["model"]["vocab"]["<eos>"] = 1000
    (tmp_path / "t.json").write_text(json.dumps(values))
    tokenizer = load_tokenizer(tmp_path / "t.json")
    assert (tokenizer.vocab_size, tokenizer.eos_id, len(tokenizer.id_texts())) == (1001, 1000, 1001)


@pytest.mark.parametrize("path", list(KINDS), indirect=True)
def test_words_are_found_by_the_texts_of_ids(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    texts = tokenizer.id_texts()
    assert len(texts) == tokenizer.vocab_size and texts[require_eos(tokenizer)] == "\n"
    ids = tokenizer.encode("It is there, this was it; they were. It isn")
    assert "".join(texts[token] for token in ids) == "It is there, this was it; they were. It isn"
    places = find_words(ids, texts)
    assert [WORDS[label] for _, label in places] == ["is", "was", "were"]
    assert all(tokenizer.decode(ids[: place + 1]).endswith(WORDS[label]) for place, label in places)
    unknown = tokenizer.encode(" is\u65e5.")  # perhaps a letter, so that " is" is no word
    assert "\ufffd" in "".join(texts[token] for token in unknown) and find_words(unknown, texts) == []


# ---- which tokens begin and end a document

GPT2 = ["<|endoftext|>"]
SEVERAL = ["<s>", "<bos>", "</s>", "<|endoftext|>", "<mine>"]


@pytest.mark.parametrize(
    ("special", "config", "named", "found"),
    [
        (["<s>", "</s>"], None, {}, ("<s>", "</s>")),
        (GPT2, None, {}, ("<|endoftext|>", "<|endoftext|>")),
        (["<|begin_of_text|>", "<|end_of_text|>"], None, {}, ("<|begin_of_text|>", "<|end_of_text|>")),
        (SEVERAL, None, {}, (None, None)),
        (["<mine>"], None, {}, (None, None)),
        (SEVERAL, None, {"eos": "<mine>"}, (None, "<mine>")),
        (SEVERAL, {"bos_token": "<bos>", "eos_token": {"content": "</s>", "lstrip": False}}, {}, ("<bos>", "</s>")),
        (SEVERAL, {"bos_token": "<bos>", "eos_token": "</s>"}, {"bos": "<mine>"}, ("<mine>", "</s>")),
        (["<s>", "</s>"], {"bos_token": None}, {}, (None, "</s>")),
        (["</s>"], None, {"bos": "is"}, ("is", "</s>")),  # an ordinary token may be named
    ],
    ids=str,
)
def test_special_tokens(
    special: list[str],
    config: dict[str, object] | None,
    named: dict[str, str],
    found: tuple[str | None, str | None],
    tmp_path: Path,
) -> None:
    path = byte_level(tmp_path / "tokenizer.json", special)
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, library = load_tokenizer(path, SpecialTokens(**named)), Tokenizer.from_file(str(path))
    ids = tuple(None if token is None else library.token_to_id(token) for token in found)
    assert (tokenizer.bos_id, tokenizer.eos_id) == ids
    for token, require, name in zip(ids, (require_bos, require_eos), ("bos", "eos")):
        if token is None:
            with pytest.raises(
                DataError, match=rf'^tokenizer: .*json names no .*{{"{name}_token": "TOKEN"}} .*--{name} T'
            ):
                require(tokenizer)


def test_a_common_name_that_was_learned_from_text_is_no_special_token(tmp_path: Path) -> None:
    """HTML has `</s>`."""
    path = byte_level(tmp_path / "tokenizer.json", [])
    values = json.loads(path.read_text())
    values["model"]["vocab"]["</s>"] = len(values["model"]["vocab"])
    path.write_text(json.dumps(values))
    assert load_tokenizer(path).eos_id is None
    assert load_tokenizer(path, SpecialTokens(eos="</s>")).eos_id == load_tokenizer(path).vocab_size - 1


# ---- token files


@pytest.mark.parametrize("path", list(KINDS), indirect=True)
@pytest.mark.parametrize("workers", [1, 3])
def test_documents_as_the_paper_packs_them(path: Path, workers: int, tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    texts = [line.strip() for line in LINES]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = load_tokenizer(path)
    bos, eos = require_bos(tokenizer), require_eos(tokenizer)
    for packing, first, last in ((Packing(add_bos=True), [bos], [eos]), (Packing(), [], [eos])):
        prefix = tmp_path / f"t{len(first)}"
        tokenize_files([source], path, prefix, packing=packing, workers=workers)
        files = check_files(str(prefix))
        documents = np.split(open_tokens(files), files.document_bounds[1:-1])
        assert [one.tolist() for one in documents] == [[*first, *tokenizer.encode(text), *last] for text in texts]
        meta = json.loads(Path(f"{prefix}.meta.json").read_text())
        assert meta.get("bos_id") == (bos if first else None) and meta["vocab_size"] == tokenizer.vocab_size
        before = Path(f"{prefix}.meta.json").read_bytes()
        report = adopt_files(str(prefix), path, overwrite=True)
        assert Path(f"{prefix}.meta.json").read_bytes() == before
        assert report.beginning.startswith("It is what")


def test_named_tokens_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    byte_level(Path("tokenizer.json"), SEVERAL)
    Path("a.txt").write_text("it is")
    words = ["data", "tokenize", "--input", "a.txt", "--tokenizer", "tokenizer.json", "--out", "t"]
    assert main([*words, "--add-bos", "--bos", "<mine>", "--eos", "</s>"]) == 0
    library = Tokenizer.from_file("tokenizer.json")
    tokens = open_tokens(check_files("t"))
    assert [library.id_to_token(int(tokens[place])) for place in (0, -1)] == ["<mine>", "</s>"]
    ours = Path("t.meta.json").read_bytes()
    adopted = ["data", "adopt", "t", "--tokenizer", "tokenizer.json", "--bos", "<mine>", "--eos", "</s>", "--overwrite"]
    assert main(adopted) == 0 and Path("t.meta.json").read_bytes() == ours


# ---- what is refused


def deep() -> str:
    return '{"a":' * 100_000


MISTAKES: dict[str, tuple[Callable[[], object], str, str]] = {
    "no EOS": (lambda: byte_level(Path("t.json"), []), "", r"tokenizer: t\.json names no end-of-sequence token; write .* beside it, or give --eos TOKEN .*, or add --no-append-eos"),
    "no BOS": (lambda: byte_level(Path("t.json"), ["</s>"]), "--add-bos", r"tokenizer: t\.json names no beginning-of-sequence token; write .*, or give --bos TOKEN"),
    "another token": (lambda: byte_level(Path("t.json"), GPT2), "--eos <nope>", r"--eos: t\.json has no token '<nope>'; name one of its own"),
    "config of another": (lambda: Path("tokenizer_config.json").write_text('{"eos_token": "<nope>"}'), "", r"tokenizer_config\.json: eos_token: t\.json has no token '<nope>'"),
    "config of a number": (lambda: Path("tokenizer_config.json").write_text('{"eos_token": [7]}'), "", r"tokenizer: tokenizer_config\.json: eos_token is \[7\]; write the token's text"),
    "config no object": (lambda: Path("tokenizer_config.json").write_text("[]"), "", r"tokenizer: tokenizer_config\.json is not a JSON object; remove it"),
    "config cut": (lambda: Path("tokenizer_config.json").write_text("{"), "", r"tokenizer: tokenizer_config\.json is not a JSON object; remove it"),
    "config nested": (lambda: Path("tokenizer_config.json").write_text(deep()), "", r"tokenizer: tokenizer_config\.json is not a JSON object; remove it"),
    "config a pipe": (lambda: os.mkfifo("tokenizer_config.json"), "", r"tokenizer: tokenizer_config\.json is not a tokenizer's configuration; remove"),
    "empty": (lambda: Path("t.json").write_text(""), "", r"tokenizer: t\.json is not a tokenizer\.json \(.*\); give the tokenizer\.json, or"),
    "another JSON": (lambda: Path("t.json").write_text('{"eos_token": "x"}'), "", r"tokenizer: t\.json is not a tokenizer\.json \("),
    "nested": (lambda: Path("t.json").write_text(deep()), "", r"tokenizer: t\.json is not a tokenizer\.json \("),
    "bytes": (lambda: Path("t.json").write_bytes(bytes(range(256))), "", r"tokenizer: t\.json is not a tokenizer\.json \("),
    "cut": (lambda: os.truncate("t.json", 3000), "", r"tokenizer: t\.json is not a tokenizer\.json \("),
    "a pipe": (lambda: (Path("t.json").unlink(), os.mkfifo("t.json")), "", r"tokenizer: t\.json is not a file; "),
    "missing": (lambda: Path("t.json").unlink(), "", r"tokenizer: t\.json does not exist; "),
    "a folder": (lambda: (Path("t.json").unlink(), Path("t.json").mkdir()), "", r"tokenizer: t\.json is a folder; name the"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("it is")
    byte_level(Path("t.json"), ["<s>", "</s>"])
    damage, flags, said = MISTAKES[name]
    damage()
    code = main(["data", "tokenize", "--input", "a.txt", "--tokenizer", "t.json", "--out", "t", *flags.split()])
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1 and re.match(f"lime-dist: {said}", lines[0]), lines
    assert not list(Path().glob("t.bin*"))


def test_without_the_library_one_line_says_how_to_get_it(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        DataError, match=r"^tokenizer: .*byte_level\.json needs the tokenizers library; pip install 'lime_dist\[hf\]'$"
    ):
        load_tokenizer(made["byte_level"])
    assert load_tokenizer(made["sentence_piece"]).vocab_size == 330


def test_a_sentencepiece_model_loads_without_the_library(made: dict[str, Path]) -> None:
    code = (
        "import sys; from lime_dist.data.tokenizer import load_tokenizer; load_tokenizer(sys.argv[1]);"
        "sys.exit(' '.join({'torch', 'megatron', 'tokenizers'} & set(sys.modules)) or None)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(made["sentence_piece"])], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
