"""Many damaged token files: each is refused by name or gives exactly the samples that were written, never others."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lime_dist.data.checksums import RULE
from lime_dist.data.dataset import TokenSamples
from lime_dist.data.indexed import IndexedWriter
from lime_dist.errors import DataError

pytestmark = pytest.mark.campaign

VOCAB_SIZE = 50_000
SUFFIXES = ("bin", "idx", "mask", "meta.json")
Mutation = Callable[[np.random.Generator, bytes], bytes]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ways to have token files: `ours`; `masked`, the same with a loss mask; `bare`, without a meta file; `parts`, of several
    sequences each."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder = tmp_path_factory.mktemp("written")
    documents = [np.arange(first, first + 1 + first % 37) for first in range(100, 2500, 13)]
    for name in ("ours", "masked"):
        with IndexedWriter(folder / name, vocab_size=VOCAB_SIZE, masked=name == "masked") as writer:
            for tokens in documents:
                writer.add_document(tokens, tokens % 3 > 0 if name == "masked" else None)
            writer.commit({"vocab_size": VOCAB_SIZE, "tokens": sum(map(len, documents)), "tokenizer_sha256": "0" * 64})
    builder = IndexedDatasetBuilder(str(folder / "parts.bin"), dtype=np.uint16)
    for index, tokens in enumerate(documents):
        builder.add_document(tokens, [len(part) for part in np.array_split(tokens, 1 + index % 3)])
    builder.finalize(str(folder / "parts.idx"))
    for suffix in ("bin", "idx"):
        shutil.copy(folder / f"ours.{suffix}", folder / f"bare.{suffix}")
    return folder


# ---- mutations


def flip_bit(random: np.random.Generator, content: bytes) -> bytes:
    return _with(
        content, place := int(random.integers(len(content))), bytes([content[place] ^ 1 << random.integers(8)])
    )


def set_byte(random: np.random.Generator, content: bytes) -> bytes:
    return _with(content, int(random.integers(len(content))), random.bytes(1))


def zero_range(random: np.random.Generator, content: bytes) -> bytes:
    return _with(content, int(random.integers(len(content))), bytes(int(random.integers(1, 64))))


def swap_entries(random: np.random.Generator, content: bytes) -> bytes:
    """Two near entries of 4 or 8 bytes, aligned as the lengths in an index are: their sum stays."""
    size = int(random.choice([4, 8]))
    count = (len(content) - 34) // size
    if count < 2:
        return content
    first = int(random.integers(count - 1))
    second = min(count - 1, first + int(random.integers(1, 9)))
    first, second = 34 + size * first, 34 + size * second
    swapped = _with(content, first, content[second : second + size])
    return _with(swapped, second, content[first : first + size])


def copy_range(random: np.random.Generator, content: bytes) -> bytes:
    start, count = int(random.integers(len(content))), int(random.integers(1, 128))
    return _with(content, int(random.integers(len(content))), content[start : start + count])


def truncate(random: np.random.Generator, content: bytes) -> bytes:
    return content[: int(random.integers(len(content)))]


def extend(random: np.random.Generator, content: bytes) -> bytes:
    return content + random.bytes(int(random.integers(1, 64)))


def drop_range(random: np.random.Generator, content: bytes) -> bytes:
    start = int(random.integers(len(content)))
    return content[:start] + content[start + int(random.choice([1, 2, 4, 8, 20])) :]


def set_header(random: np.random.Generator, content: bytes) -> bytes:
    """The version, the dtype code, the number of sequences or of document bounds: near, other or huge."""
    place, size = [(9, 8), (17, 1), (18, 8), (26, 8)][random.integers(4)]
    value = int.from_bytes(content[place : place + size], "little")
    other = [value + 1, value - 1, 2 * value, int(random.integers(12)), 2**63][random.integers(5)]
    return _with(content, place, (other % 256**size).to_bytes(size, "little"))


def _with(content: bytes, place: int, data: bytes) -> bytes:
    return (content[:place] + data + content[place + len(data) :])[: len(content)]


ANY_FILE: tuple[Mutation, ...] = (
    flip_bit, set_byte, zero_range, swap_entries, swap_entries, copy_range, truncate, extend, drop_range,
)  # fmt: skip
HOSTILE = (
    "null", "true", "-1", "0", "1.5", "1e999", "NaN", '"12"', '""', "[]", "{}", "[1]", "9" * 5000, "[" * 20_000,
    '{"a":' * 20_000, '{"bin": 1, "idx": 2}', '"\\ud800"', "\x00", "12", "100000",
)  # fmt: skip


def set_value(random: np.random.Generator, content: bytes) -> bytes:
    """One value of the meta file, or all of it, becomes a hostile one."""
    meta, hostile = json.loads(content), HOSTILE[random.integers(len(HOSTILE))]
    key = [*meta, None][random.integers(len(meta) + 1)]
    if key is None:
        return hostile.encode()
    return json.dumps(meta | {key: "HERE"}).replace('"HERE"', hostile).encode()


def drop_key(random: np.random.Generator, content: bytes) -> bytes:
    meta = json.loads(content)
    del meta[list(meta)[random.integers(len(meta))]]
    return json.dumps(meta).encode()


# ---- what becomes of them


def read_epoch(prefix: Path) -> np.ndarray:
    samples = TokenSamples([(str(prefix), 1.0)], seq_length=16, seed=3, vocab_size=VOCAB_SIZE)
    return samples.batch(0, *samples.samples_per_epoch).numpy()


def outcome(prefix: Path, expected: np.ndarray) -> str:
    try:
        found = read_epoch(prefix)
    except DataError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return "refused"
    return "same" if np.array_equal(found, expected) else "other"


Damage = Callable[[str, str, tuple[Mutation, ...]], "Counter[str]"]


@pytest.fixture
def damage(written: Path, tmp_path: Path, num_cases: int, case_seed: int) -> Damage:
    """Mutate one file of a copy, `num_cases` times; how often each outcome came."""

    def run(name: str, suffix: str, mutations: tuple[Mutation, ...]) -> Counter[str]:
        for present in SUFFIXES:
            if (written / f"{name}.{present}").exists():
                shutil.copy(written / f"{name}.{present}", tmp_path / f"t.{present}")
        path, expected = tmp_path / f"t.{suffix}", read_epoch(tmp_path / "t")
        content = path.read_bytes()
        outcomes: Counter[str] = Counter()
        for mutated in _cases(np.random.default_rng(case_seed), content, mutations, num_cases):
            path.write_bytes(mutated)
            outcomes[outcome(tmp_path / "t", expected)] += 1
        print(f"{name}.{suffix}: {dict(outcomes)} of {num_cases}")
        return outcomes

    return run


def _cases(random: np.random.Generator, content: bytes, mutations: tuple[Mutation, ...], count: int) -> Iterator[bytes]:
    while count:
        mutated = mutations[random.integers(len(mutations))](random, content)
        if mutated != content:
            count -= 1
            yield mutated


@pytest.mark.parametrize(
    ("name", "suffix"), [("ours", "bin"), ("ours", "idx"), ("masked", "bin"), ("masked", "idx"), ("masked", "mask")]
)
def test_with_checksums_every_damage_is_refused(damage: Damage, name: str, suffix: str, num_cases: int) -> None:
    mutations = ANY_FILE if suffix == "mask" else (*ANY_FILE, set_header)
    assert damage(name, suffix, mutations) == {"refused": num_cases}


def test_without_checksums_an_index_of_one_sequence_a_document_gives_no_other_samples(damage: Damage) -> None:
    outcomes = damage("bare", "idx", (*ANY_FILE, set_header))
    assert outcomes["other"] == 0 and outcomes["refused"] > outcomes["same"]


def test_without_checksums_document_bounds_among_several_sequences_may_move(damage: Damage, num_cases: int) -> None:
    """The one thing that an index says but once. The rest is refused."""
    outcomes = damage("parts", "idx", (*ANY_FILE, set_header))
    assert outcomes["other"] <= 0.1 * num_cases


@pytest.mark.parametrize("name", ["ours", "masked"])
def test_a_damaged_meta_file_is_refused_or_does_not_matter(damage: Damage, name: str) -> None:
    outcomes = damage(name, "meta.json", (*ANY_FILE, set_value, set_value, set_value, drop_key))
    assert outcomes["other"] == 0 and outcomes["refused"] > 0


def test_the_checksums_are_what_refuses(written: Path, damage: Damage) -> None:
    """Damaged tokens are ids like others: without checksums most of them are read."""
    assert RULE in (written / "ours.meta.json").read_text()
    assert damage("bare", "bin", ANY_FILE)["other"] > 0
