"""Token files: what the headers say, what is refused, and that nothing half-written is left behind."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lime_dist.data.checksums import RULE
from lime_dist.data.indexed import IndexedWriter, check_files, open_mask, open_tokens
from lime_dist.errors import DataError

DOCUMENTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
NUM_TOKENS = 9


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    with IndexedWriter(tmp_path / "t", vocab_size=10) as writer:
        for tokens in DOCUMENTS:
            writer.add_document(np.array(tokens))
        writer.commit({"vocab_size": 10, "tokens": NUM_TOKENS})
    return str(tmp_path / "t")


def test_facts_of_whole_files(prefix: str) -> None:
    files = check_files(prefix)
    assert (files.num_documents, files.num_sequences, files.num_tokens, files.vocab_size) == (3, 3, NUM_TOKENS, 10)
    assert files.dtype == np.uint16
    assert open_tokens(files).tolist() == sum(DOCUMENTS, [])
    assert files.document_bounds.tolist() == [0, 3, 5, NUM_TOKENS]


def test_megatron_reads_the_same(prefix: str) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    assert [dataset[index].tolist() for index in range(len(dataset))] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]


def test_a_large_vocabulary_takes_wider_ids(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "t", vocab_size=100_000) as writer:
        writer.add_document(np.array([99_999]))
        writer.commit({"vocab_size": 100_000, "tokens": 1})
    files = check_files(str(tmp_path / "t"))
    assert files.dtype == np.int32
    assert open_tokens(files).tolist() == [99_999]


def test_files_of_megatrons_own_tools_have_no_meta(prefix: str) -> None:
    Path(f"{prefix}.meta.json").unlink()
    assert check_files(prefix).vocab_size is None


def rewrite(path: Path, *, at: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[at : at + len(data)] = data
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("suffix", "kept"), [("bin", -1), ("bin", 0), ("idx", -1), ("idx", 34), ("idx", 20), ("idx", 0)]
)
def test_a_file_cut_short_is_named(prefix: str, suffix: str, kept: int) -> None:
    path = Path(f"{prefix}.{suffix}")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=rf"^data\.train: .*t\.{suffix} .*; run lime-dist data tokenize again$"):
        check_files(prefix)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_file_too_long_or_missing_is_named(prefix: str, suffix: str) -> None:
    path = Path(f"{prefix}.{suffix}")
    with path.open("ab") as stream:
        stream.write(b"\0\0")
    with pytest.raises(DataError, match=rf"t\.{suffix} has \d+ bytes"):
        check_files(prefix)
    path.unlink()
    with pytest.raises(DataError, match=rf"^data\.valid: .*t\.{suffix} does not exist; make it with lime-dist data"):
        check_files(prefix, key="data.valid")


@pytest.mark.parametrize(
    ("at", "data", "said"),
    [
        (0, b"PK", "not a Megatron .idx file"),
        (9, struct.pack("<Q", 2), "has version 2"),
        (17, b"\x07", "dtype code 7"),
        (17, b"\x63", "dtype code 99"),
        (17, b"\x04", "contradicts itself"),
        (-8, struct.pack("<q", 2), "contradicts itself"),
    ],
)
def test_another_header_is_refused(prefix: str, at: int, data: bytes, said: str) -> None:
    path = Path(f"{prefix}.idx")
    rewrite(path, at=at % path.stat().st_size, data=data)
    with pytest.raises(DataError, match=said):
        check_files(prefix)


LENGTHS_AT, POINTERS_AT, BOUNDS_AT = 34, 34 + 3 * 4, 34 + 3 * 12


@pytest.mark.parametrize(
    ("at", "data"),
    [
        (LENGTHS_AT, struct.pack("<i", 4)),
        (LENGTHS_AT, struct.pack("<2i", 2, 3)),
        (LENGTHS_AT, struct.pack("<i", -1)),
        (POINTERS_AT, b"\2"),
        (POINTERS_AT + 8, struct.pack("<q", 4)),
        (BOUNDS_AT, b"\1"),
        (BOUNDS_AT + 8, struct.pack("<q", 0)),
        (BOUNDS_AT + 8, struct.pack("<q", 2)),
        (BOUNDS_AT + 8, struct.pack("<2q", 2**63 - 1, -(2**63))),
    ],
)
def test_an_index_that_contradicts_itself_is_refused_without_checksums(prefix: str, at: int, data: bytes) -> None:
    Path(f"{prefix}.meta.json").unlink()
    rewrite(Path(f"{prefix}.idx"), at=at, data=data)
    with pytest.raises(DataError, match=r"^data\.train: .*t\.idx contradicts itself; run"):
        check_files(prefix)


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_a_file_of_other_text_of_the_same_size_is_refused(prefix: str, suffix: str) -> None:
    path = Path(f"{prefix}.{suffix}")
    same_size = path.read_bytes()
    with IndexedWriter(Path(prefix), vocab_size=10, overwrite=True) as writer:
        for tokens in [[1, 2], [3, 4, 5], [6, 7, 8, 9]]:
            writer.add_document(np.array(tokens) % 9)
        writer.commit({"vocab_size": 10, "tokens": NUM_TOKENS})
    check_files(prefix)
    path.write_bytes(same_size)
    with pytest.raises(
        DataError, match=rf"^data\.valid: .*t\.{suffix} is not as it was written .*t\.meta\.json differs"
    ):
        check_files(prefix, key="data.valid")


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ("{", "does not state"),
        ("[" * 100_000, "does not state"),
        (" " * (1 << 20) + "{}", "not a meta file"),
        ("[]", "does not state"),
        ('{"vocab_size": 1}', "does not state"),
        ('{"vocab_size": 1e999, "tokens": 9}', "does not state"),
        ('{"vocab_size": true, "tokens": 9}', "does not state"),
        ('{"vocab_size": 10, "tokens": 9, "tokenizer_sha256": 1}', "no usable tokenizer_sha256"),
        (f'{{"vocab_size": 10, "tokens": 9, "{RULE}": {{"bin": "0"}}}}', "no usable tokenizer_sha256 or sha256_of"),
        ('{"vocab_size": 10, "tokens": 9, "task": 3}', "names no usable task; run lime-dist data build-task again"),
        (None, "is of 8 tokens"),
    ],
)
def test_a_meta_file_of_other_tokens_is_refused(prefix: str, meta: str | None, said: str) -> None:
    Path(f"{prefix}.meta.json").write_text(meta or json.dumps({"vocab_size": 10, "tokens": 8}))
    with pytest.raises(DataError, match=said):
        check_files(prefix)


MASK = [0, 1, 1, 0, 1, 0, 0, 1, 1]


@pytest.fixture
def masked(tmp_path: Path) -> str:
    with IndexedWriter(tmp_path / "m", vocab_size=10, masked=True) as writer:
        for tokens, start in zip(DOCUMENTS, (0, 3, 5)):
            writer.add_document(np.array(tokens), np.array(MASK[start : start + len(tokens)]))
        writer.commit({"vocab_size": 10, "tokens": NUM_TOKENS, "task": "arithmetic"})
    return str(tmp_path / "m")


def test_a_mask_comes_back(masked: str, prefix: str) -> None:
    files = check_files(masked)
    assert files.has_mask and files.task == "arithmetic" and files.has_checksums
    assert open_mask(files).tolist() == MASK and open_tokens(files).tolist() == sum(DOCUMENTS, [])
    assert not check_files(prefix).has_mask and check_files(prefix).task is None
    Path(f"{masked}.meta.json").unlink()
    assert check_files(masked).has_mask


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"m\.mask does not exist, and the meta file has its checksum; copy it or run lime-dist data build-task"),
        (bytes(8), r"m\.mask has 8 bytes, the \.idx 9 tokens; run"),
        (bytes(9), r"m\.mask has no target, as all its bytes are 0; run"),
        (bytes([*MASK[:-1], 2]), r"m\.mask has bytes other than 0 and 1; run"),
        (bytes([1] * 9), r"m\.mask is not as it was written .*m\.meta\.json differs"),
    ],
)
def test_a_damaged_mask_is_refused(masked: str, content: bytes | None, said: str) -> None:
    path = Path(f"{masked}.mask")
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DataError, match=rf"^data\.valid: .*{said}"):
        check_files(masked, key="data.valid")


def test_a_mask_of_other_tokens_is_refused_and_overwriting_removes_it(masked: str) -> None:
    mask = Path(f"{masked}.mask").read_bytes()
    with IndexedWriter(Path(masked), vocab_size=10, overwrite=True) as writer:
        writer.add_document(np.arange(NUM_TOKENS))
        writer.commit({"vocab_size": 10, "tokens": NUM_TOKENS})
    assert not check_files(masked).has_mask
    Path(f"{masked}.mask").write_bytes(mask)
    with pytest.raises(DataError, match=r"m\.mask is not of these tokens .*; remove it$"):
        check_files(masked)


def test_nothing_is_left_of_an_unfinished_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), IndexedWriter(tmp_path / "t", vocab_size=10) as writer:
        writer.add_document(np.array([1, 2]))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_overwriting_replaces_only_when_whole(prefix: str) -> None:
    with pytest.raises(DataError, match=r"--out: .*t\.bin exists.*--overwrite"):
        IndexedWriter(Path(prefix), vocab_size=10)
    with IndexedWriter(Path(prefix), vocab_size=10, overwrite=True) as writer:
        writer.add_document(np.array([1]))
    assert check_files(prefix).num_tokens == NUM_TOKENS
    with IndexedWriter(Path(prefix), vocab_size=10, overwrite=True) as writer:
        writer.add_document(np.array([1]))
        writer.commit({"vocab_size": 10, "tokens": 1})
    assert check_files(prefix).num_tokens == 1


def test_checking_imports_no_framework(prefix: str) -> None:
    code = (
        "import sys; from lime_dist.data.indexed import check_files; check_files(sys.argv[1]);"
        "sys.exit(' '.join({'torch', 'megatron'} & set(sys.modules)) or None)"
    )
    result = subprocess.run([sys.executable, "-c", code, prefix], capture_output=True, text=True)
    assert (result.returncode, result.stderr.strip()) == (0, ""), result.stderr
