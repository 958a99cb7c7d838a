"""Token files of Megatron's own tools, written here byte by byte: what `data adopt` makes of them, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from lime_dist.cli.command_line import main
from lime_dist.data import adopt
from lime_dist.data.indexed import check_files, open_tokens
from lime_dist.data.special_tokens import SpecialTokens
from lime_dist.data.tokenize import Packing, tokenize_files
from lime_dist.data.tokenizer import load_tokenizer, train_tokenizer
from lime_dist.errors import DataError

VOCAB_SIZE = 290
CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}
# Documents of sequences of ids: one of three sequences, one of none, one with an empty sequence.
DOCUMENTS = [[[5, 6, 7], [8], [9, 2]], [[10, 289, 2]], [], [[11], [], [2]], [[12, 2]]]
TOKENS = [5, 6, 7, 8, 9, 2, 10, 289, 2, 11, 2, 12, 2]


def write_megatron(
    prefix: Path, documents: Sequence[Sequence[Sequence[int]]], dtype: str = "uint16", modes: bool = False
) -> None:
    sequences = [sequence for document in documents for sequence in document]
    lengths = [len(sequence) for sequence in sequences]
    size, bounds, pointers = np.dtype(dtype).itemsize, [0], [0]
    for document in documents:
        bounds.append(bounds[-1] + len(document))
    for length in lengths:
        pointers.append(pointers[-1] + length * size)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(lengths), len(bounds))
    index += struct.pack(f"<{len(lengths)}i", *lengths) + struct.pack(f"<{len(lengths)}q", *pointers[:-1])
    index += struct.pack(f"<{len(bounds)}q", *bounds) + bytes(len(lengths) if modes else 0)
    Path(f"{prefix}.idx").write_bytes(index)
    Path(f"{prefix}.bin").write_bytes(np.array(sum(sequences, []), dtype).tobytes())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(
        "".join(f"document {number} reads document {number * 7}\n" for number in range(90))
    )
    return train_tokenizer([folder / "text.txt"], folder / "tokenizer", vocab_size=VOCAB_SIZE, workers=1)


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int16", "int64"])
@pytest.mark.parametrize("block", [1 << 24, 1, 4])
def test_foreign_files(dtype: str, block: int, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adopt, "_BLOCK_TOKENS", block)
    write_megatron(Path("t"), DOCUMENTS, dtype)
    before = Path("t.bin").read_bytes(), Path("t.idx").read_bytes()
    report = adopt.adopt_files("t", tokenizer)
    assert (report.facts.largest_id, report.facts.num_ended, report.facts.num_begun) == (289, 4, 0)
    assert (Path("t.bin").read_bytes(), Path("t.idx").read_bytes()) == before
    files = check_files("t")
    assert files.has_checksums and files.vocab_size == VOCAB_SIZE and files.dtype == dtype
    assert (files.num_documents, files.num_sequences, files.num_tokens) == (5, 8, len(TOKENS))
    assert open_tokens(files).tolist() == TOKENS and files.document_bounds.tolist() == [0, 6, 9, 9, 11, 13]
    Path("t.bin").write_bytes(before[0][:-1] + b"\1")
    with pytest.raises(DataError, match="is not as it was written"):
        check_files("t")


@pytest.mark.parametrize("packing", [Packing(), Packing(add_bos=True), Packing(append_eos=False)], ids=str)
def test_the_meta_file_is_what_tokenizing_writes(packing: Packing, tokenizer: Path) -> None:
    Path("a.jsonl").write_text("".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(50)))
    tokenize_files([Path("a.jsonl")], tokenizer, Path("t"), packing=packing)
    ours = Path("t.meta.json").read_bytes()
    assert (b"bos_id" in ours) == packing.add_bos
    assert main(["data", "adopt", "t", "--tokenizer", str(tokenizer), "--overwrite"]) == 0
    assert Path("t.meta.json").read_bytes() == ours
    Path("t.meta.json").unlink()
    assert main(["data", "adopt", "t", "--tokenizer", str(tokenizer)]) == 0
    assert Path("t.meta.json").read_bytes() == ours


def test_files_that_megatron_itself_wrote(tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    ids = load_tokenizer(tokenizer).encode("document 1 reads")
    builder = IndexedDatasetBuilder("t.bin", dtype=np.int32)
    builder.add_document(np.array([*ids, 2, 2]), [len(ids) + 1, 1])
    builder.add_document(np.array([], dtype=np.int32), [])
    builder.add_document(np.array([1, *ids]), [len(ids) + 1])
    builder.finalize("t.idx")
    with pytest.raises(DataError, match="contradicts itself; .* or lime-dist data adopt if documents may be empty"):
        check_files("t")  # as many documents as sequences, yet not one each: without checksums it may be damage
    assert main(["data", "adopt", "t", "--tokenizer", str(tokenizer)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"t: 3 documents of 3 sequences, {2 * len(ids) + 3} tokens (int32), the largest id ")
    assert said[1].startswith("1 documents begin with BOS, 1 end with EOS; the first tokens: 'document 1 reads")
    assert check_files("t").document_bounds.tolist() == [0, len(ids) + 2, len(ids) + 2, 2 * len(ids) + 3]


def test_a_prefix_elsewhere_gets_links(tokenizer: Path) -> None:
    Path("given").mkdir()
    write_megatron(Path("given/t"), DOCUMENTS)
    words = ["data", "adopt", "given/t", "--tokenizer", str(tokenizer), "--out", "mine/tokens"]
    assert main(words) == 0
    assert sorted(path.name for path in Path("given").iterdir()) == ["t.bin", "t.idx"]
    assert open_tokens(check_files("mine/tokens")).tolist() == TOKENS and check_files("mine/tokens").has_checksums
    assert main([*words, "--overwrite"]) == 0
    content = Path("given/t.bin").read_bytes()
    assert main([*words[:-1], "given/t", "--overwrite"]) == 0
    assert Path("given/t.bin").read_bytes() == content and not Path("given/t.bin").is_symlink()
    assert main(["data", "adopt", "mine/tokens", "--tokenizer", str(tokenizer), "--out", "given/t", "--overwrite"]) == 0
    assert Path("given/t.bin").read_bytes() == content and not Path("given/t.bin").is_symlink()


def test_a_mask_beside_is_kept(tokenizer: Path) -> None:
    write_megatron(Path("t"), DOCUMENTS)
    Path("t.mask").write_bytes(bytes([0, 1] * 6 + [1]))
    adopt.adopt_files("t", tokenizer)
    adopt.adopt_files("t", tokenizer, out="u")
    assert check_files("t").has_mask and check_files("u").has_mask


def test_named_special_tokens(tokenizer: Path) -> None:
    write_megatron(Path("t"), [[[2, 7]], [[2, 8]]])
    report = adopt.adopt_files("t", tokenizer, named=SpecialTokens(bos="</s>"))
    assert report.facts.all_begun and json.loads(Path("t.meta.json").read_text())["bos_id"] == 2


# ---- what is refused

LENGTHS_AT, NUM_SEQUENCES = 34, 8
POINTERS_AT = LENGTHS_AT + 4 * NUM_SEQUENCES
BOUNDS_AT = POINTERS_AT + 8 * NUM_SEQUENCES


def write_at(name: str, at: int, data: bytes) -> None:
    content = bytearray(Path(name).read_bytes())
    content[at : at + len(data)] = data
    Path(name).write_bytes(content)


def index(at: int, form: str, *values: int) -> Callable[[], None]:
    return lambda: write_at("t.idx", at, struct.pack(form, *values))


def cut(name: str, kept: int) -> Callable[[], None]:
    return lambda: os.truncate(name, kept)


def pipe(name: str) -> None:
    Path(name).unlink()
    os.mkfifo(name)


def dangle(name: str) -> None:
    Path(name).unlink()
    Path(name).symlink_to("nowhere")


def loop(name: str) -> None:
    Path(name).unlink()
    Path(name).symlink_to(name)


HOSTILE: dict[str, tuple[Callable[[], object], str]] = {
    "magic": (lambda: write_at("t.idx", 0, b"PK"), r"t\.idx is not a Megatron \.idx file; copy it again, or run preprocess_data"),
    "version": (index(9, "<Q", 2), r"t\.idx has version 2, .*; what can be read is version 1"),
    "float32": (index(17, "<B", 7), r"t\.idx has version 1, dtype code 7 \(float32\); what can be read"),
    "unknown dtype": (index(17, "<B", 99), r"t\.idx has version 1, dtype code 99 \(unknown\); what can be read"),
    "other dtype": (index(17, "<B", 4), r"t\.idx contradicts itself; copy it again"),
    "no sequences": (index(18, "<Q", 0), r"t\.idx has \d+ bytes, its header says \d+;"),
    "most sequences": (index(18, "<Q", 2**64 - 1), r"t\.idx has \d+ bytes, its header says \d+;"),
    "sequences that overflow": (index(18, "<Q", 2**60), r"t\.idx has \d+ bytes, its header says \d+;"),
    "most documents": (index(26, "<Q", 2**64 - 1), r"t\.idx has \d+ bytes, its header says \d+;"),
    "a length that overflows": (index(LENGTHS_AT, "<i", 2**31 - 1), r"t\.idx contradicts itself;"),
    "a length below 0": (index(LENGTHS_AT, "<i", -(2**31)), r"t\.idx contradicts itself;"),
    "the last length": (index(LENGTHS_AT + 28, "<i", 2**31 - 1), r"t\.bin has 26 bytes, its \.idx says \d+;"),
    "a pointer outside": (index(POINTERS_AT + 8, "<q", 2**62), r"t\.idx contradicts itself;"),
    "a pointer before": (index(POINTERS_AT, "<q", -8), r"t\.idx contradicts itself;"),
    "the last pointer": (index(POINTERS_AT + 56, "<q", 2**63 - 1), r"t\.idx contradicts itself;"),
    "a bound outside": (index(BOUNDS_AT + 8, "<q", 2**62), r"t\.idx contradicts itself;"),
    "a bound before": (index(BOUNDS_AT + 8, "<q", -1), r"t\.idx contradicts itself;"),
    "the last bound": (index(BOUNDS_AT + 40, "<q", 2**63 - 1), r"t\.idx contradicts itself;"),
    "a cut index": (cut("t.idx", 90), r"t\.idx has 90 bytes, its header says \d+;"),
    "a cut header": (cut("t.idx", 20), r"t\.idx ends within its header;"),
    "an empty index": (cut("t.idx", 0), r"t\.idx is not a Megatron \.idx file;"),
    "cut tokens": (cut("t.bin", 25), r"t\.bin has 25 bytes, its \.idx says 26;"),
    "no tokens": (cut("t.bin", 0), r"t\.bin has 0 bytes, its \.idx says 26;"),
    "more tokens": (cut("t.bin", 2**40), r"t\.bin has \d+ bytes, its \.idx says 26;"),
    "an id above": (
        lambda: write_at("t.bin", 14, struct.pack("<H", 290)),
        r"t\.bin has the token id 290 at token 7 \(document 1\), .*tokenizer\.model has 290 ids; name the tokenizer that",
    ),
    "a negative id": (
        lambda: write_megatron(Path("t"), [[[3], [4, -1]]], "int32"),
        r"t\.bin has the token id -1 at token 2 \(document 0\), ",
    ),
    "modes": (
        lambda: write_megatron(Path("t"), DOCUMENTS, modes=True),
        r"t\.idx has a mode for each sequence, as data of several modalities has; give token files of text alone",
    ),
    "documents without sequences": (lambda: write_megatron(Path("t"), [[], []]), r"t\.idx holds no documents;"),
    "sequences without tokens": (lambda: write_megatron(Path("t"), [[[]], [[]]]), r"t\.bin holds no tokens;"),
    "a pipe for an index": (lambda: pipe("t.idx"), r"t\.idx is not a file; "),
    "a pipe for tokens": (lambda: pipe("t.bin"), r"t\.bin is not a file; "),
    "a folder for tokens": (lambda: (Path("t.bin").unlink(), Path("t.bin").mkdir()), r"t\.bin is not a file; "),
    "a link that leads nowhere": (lambda: dangle("t.bin"), r"t\.bin does not exist; "),
    "a link to itself": (lambda: loop("t.idx"), r"t\.idx does not exist; "),
    "no index": (lambda: Path("t.idx").unlink(), r"t\.idx does not exist; "),
    "a mask of another length": (lambda: Path("t.mask").write_bytes(b"\1"), r"t\.mask has 1 bytes, the \.idx 13 tokens;"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_end_in_one_line(name: str, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, said = HOSTILE[name]
    write_megatron(Path("t"), DOCUMENTS)
    damage()
    check_refused(["t", "--tokenizer", str(tokenizer)], f"PREFIX: {said}", capsys)
    assert not Path("t.meta.json").exists()


def check_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["data", "adopt", *words])
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 1, (code, lines)
    assert re.match(f"lime-dist: {said}", lines[0]), lines[0]


def test_mistakes_end_in_one_line(tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_megatron(Path("t"), DOCUMENTS)
    given = ["--tokenizer", str(tokenizer)]
    check_refused(["t.bin", *given], r"PREFIX: t\.bin is one file of a pair; give t$", capsys)
    check_refused(["u", *given], r"PREFIX: u\.idx does not exist; ", capsys)
    check_refused(["t", "--tokenizer", "no.model"], r"tokenizer: no\.model does not exist; ", capsys)
    check_refused(
        ["t", "--tokenizer", "."], r"tokenizer: \. is a folder; name the \.model or tokenizer\.json in it", capsys
    )
    check_refused(["t", *given, "--eos", "<nope>"], r"--eos: .*tokenizer\.model has no token '<nope>'; ", capsys)
    check_refused(["t", *given, "--out", "t.bin/x"], r"--out: cannot make the folder t\.bin ", capsys)
    Path("t.meta.json").write_text("{}")
    check_refused(["t", *given], r"--out: t\.meta\.json exists; choose another name or add --overwrite", capsys)
    assert Path("t.meta.json").read_text() == "{}"
    Path("t.meta.json").unlink()
    os.mkfifo("t.meta.json")
    check_refused(["t", *given], r"--out: t\.meta\.json exists; ", capsys)
