"""Samples: cutting, epochs, splits and blends, each against what the definition says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from lime_dist.data import stream_source
from lime_dist.data.dataset import BLEND_PERIOD, Blend, TokenSamples
from lime_dist.data.indexed import IndexedWriter, check_files
from lime_dist.data.marks import BEGINS, ID_BITS, NOT_TARGET, begins, is_target, token_ids
from lime_dist.data.sample_source import SourceOptions
from lime_dist.data.stream_source import StreamSource
from lime_dist.errors import DataError

SEQ_LENGTH = 8


def write_documents(prefix: Path, documents: list[range], vocab_size: int = 60_000) -> str:
    with IndexedWriter(prefix, vocab_size=vocab_size) as writer:
        for tokens in documents:
            writer.add_document(np.array(tokens))
        writer.commit({"vocab_size": vocab_size, "tokens": sum(map(len, documents))})
    return str(prefix)


def consecutive(lengths: list[int], first: int = 0) -> list[range]:
    """Documents whose tokens are all different: first, first + 1, ..."""
    ends = np.cumsum([first, *lengths]).tolist()
    return [range(start, end) for start, end in zip(ends, ends[1:], strict=False)]


LENGTHS = [1 + (index * index) % 23 for index in range(100)]
NUM_TOKENS = sum(LENGTHS)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_documents(tmp_path_factory.mktemp("tokens") / "a", consecutive(LENGTHS))


@pytest.fixture(scope="module")
def other_prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_documents(tmp_path_factory.mktemp("tokens") / "b", consecutive([50] * 10, first=30_000))


def samples_of(prefix: str, **options: object) -> TokenSamples:
    return TokenSamples([(prefix, 1.0)], **{"seq_length": SEQ_LENGTH, "seed": 5, **options})


def epoch_of(samples: TokenSamples, epoch: int) -> np.ndarray:
    (count,) = samples.samples_per_epoch
    return samples.batch(epoch * count, count).numpy()


def test_sizes(prefix: str) -> None:
    samples = samples_of(prefix)
    expected = (NUM_TOKENS - 1) // SEQ_LENGTH
    assert samples.num_tokens == NUM_TOKENS
    assert samples.samples_per_epoch == (expected,)
    assert samples.tokens_per_epoch == (expected * SEQ_LENGTH,)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_reads_each_token_once(prefix: str, epoch: int) -> None:
    samples = samples_of(prefix)
    inputs = epoch_of(samples, epoch)[:, :-1].ravel()
    assert len(set(inputs)) == len(inputs) == samples.tokens_per_epoch[0]
    assert NUM_TOKENS - len(inputs) <= SEQ_LENGTH


def test_samples_are_cut_from_documents_joined_in_some_order(prefix: str) -> None:
    """Every sample's last token starts exactly one other; undoing the shuffle gives back whole documents."""
    samples = epoch_of(samples_of(prefix), 0)
    by_first_token = {sample[0]: sample for sample in samples}
    (start,) = set(by_first_token) - {sample[-1] for sample in samples}
    stream: list[int] = []
    while start in by_first_token:
        stream += by_first_token[start][:-1].tolist()
        start = by_first_token[start][-1]
    assert len(stream) == samples.shape[0] * SEQ_LENGTH
    documents = {tokens[0]: list(tokens) for tokens in consecutive(LENGTHS)}
    order = []
    while stream:
        order.append(stream[0])
        document = documents[stream[0]][: len(stream)]
        assert stream[: len(document)] == document
        stream = stream[len(document) :]
    assert order != sorted(order), "documents were not shuffled"


def test_epochs_and_seeds_differ(prefix: str) -> None:
    samples = samples_of(prefix)
    orders = [epoch_of(samples, 0), epoch_of(samples, 1), epoch_of(samples_of(prefix, seed=6), 0)]
    for index, order in enumerate(orders):
        assert not any(np.array_equal(order, other) for other in orders[:index])


def test_a_sample_is_a_function_of_its_index(prefix: str, other_prefix: str) -> None:
    """Reading backwards, over three epochs and with gaps, finds what reading forwards found."""
    sources = [(prefix, 2.0), (other_prefix, 1.0)]
    forwards = TokenSamples(sources, seq_length=SEQ_LENGTH, seed=5)
    backwards = TokenSamples(sources, seq_length=SEQ_LENGTH, seed=5)
    count = 3 * sum(forwards.samples_per_epoch)
    expected = [forwards.sample(index) for index in range(count)]
    for index in range(count - 1, -1, -7):
        np.testing.assert_array_equal(backwards.sample(index), expected[index])


def test_another_process_reads_the_same(prefix: str) -> None:
    code = (
        "import sys; from lime_dist.data.dataset import TokenSamples;"
        f"samples = TokenSamples([(sys.argv[1], 1.0)], seq_length={SEQ_LENGTH}, seed=5);"
        "print(samples.batch(300, 4).tolist())"
    )
    printed = subprocess.run([sys.executable, "-c", code, prefix], capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == samples_of(prefix).batch(300, 4).tolist()


def test_the_order_is_the_documented_one(prefix: str) -> None:
    """Pins the order for good: a change here changes what resumed runs read."""
    bits = np.random.PCG64(np.random.SeedSequence([5, 0, 2]))
    documents = np.argsort(bits.random_raw(len(LENGTHS)), kind="stable")
    all_documents = consecutive(LENGTHS)
    stream = np.concatenate([all_documents[document] for document in documents])
    count = (NUM_TOKENS - 1) // SEQ_LENGTH
    shuffled = np.argsort(bits.random_raw(count), kind="stable")
    expected = np.stack([stream[k * SEQ_LENGTH : (k + 1) * SEQ_LENGTH + 1] for k in shuffled])
    np.testing.assert_array_equal(epoch_of(samples_of(prefix), 2), expected)


def test_batch_shape_and_type(prefix: str) -> None:
    samples = samples_of(prefix)
    batch = samples.batch(3, 2)
    assert batch.shape == (2, SEQ_LENGTH + 1) and batch.dtype == torch.int64
    assert samples.sample(4).dtype == np.int64
    np.testing.assert_array_equal(batch[1].numpy(), samples.sample(4))


def test_splits_share_no_document_and_lose_none(prefix: str) -> None:
    documents = consecutive(LENGTHS)
    document_of = {token: index for index, tokens in enumerate(documents) for token in tokens}
    bounds = (0.0, 0.333, 0.8, 1.0)
    parts = [samples_of(prefix, split=split) for split in zip(bounds, bounds[1:], strict=False)]
    assert sum(part.num_tokens for part in parts) == NUM_TOKENS
    read = [{document_of[token] for token in epoch_of(part, 0).ravel()} for part in parts]
    assert max(read[0]) < min(read[1]) and max(read[1]) < min(read[2])


def test_documents_of_several_sequences_and_without_tokens(tmp_path: Path) -> None:
    """As Megatron's tools write them: sentences of a document are sequences of their own; no meta file."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32)
    for start in range(0, 120, 12):
        builder.add_document(np.arange(start, start + 12), [5, 0, 7])
        builder.end_document()
    builder.finalize(str(tmp_path / "m.idx"))
    samples = samples_of(str(tmp_path / "m"), seq_length=7)
    assert samples.num_tokens == 120
    tokens = epoch_of(samples, 0)
    assert len(np.unique(tokens[:, :-1])) == tokens[:, :-1].size
    neighbours = np.diff(tokens, axis=1)[tokens[:, :-1] % 12 != 11]
    assert (neighbours == 1).all(), "a document was cut at the end of a sequence"


def test_a_short_tail_source_reads_to_its_last_token(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path / "t", [range(2 * SEQ_LENGTH + 1)])
    assert epoch_of(samples_of(prefix), 0)[:, :-1].max() == 2 * SEQ_LENGTH - 1
    assert epoch_of(samples_of(prefix), 0).max() == 2 * SEQ_LENGTH


WEIGHTS = [("a", 0.7), ("b", 0.2), ("c", 0.1)]


@pytest.mark.parametrize("count", [10, 1000, 33_333, BLEND_PERIOD, 250_000])
def test_every_prefix_of_a_blend_keeps_the_weights(count: int) -> None:
    blend = Blend(WEIGHTS)
    seen = Counter(blend.locate(index)[0] for index in range(count))
    for source, (_, weight) in enumerate(WEIGHTS):
        assert abs(seen[source] - weight * count) <= len(WEIGHTS)


def test_a_blend_reads_every_source_in_order_without_gaps() -> None:
    blend = Blend([("a", 3), ("b", 1), ("c", 1 / 3)])
    for source in range(3):
        located = (blend.locate(index) for index in range(2 * BLEND_PERIOD + 100))
        positions = [position for found, position in located if found == source]
        assert positions == list(range(len(positions)))


def test_blended_samples_come_from_their_sources(prefix: str, other_prefix: str) -> None:
    samples = TokenSamples([(prefix, 3.0), (other_prefix, 1.0)], seq_length=SEQ_LENGTH, seed=5)
    from_other = samples.batch(0, 400).numpy() >= 30_000
    assert (from_other.all(axis=1) | ~from_other.any(axis=1)).all()
    assert from_other.all(axis=1).sum() == 100


def test_the_same_file_twice_is_read_in_two_orders(prefix: str) -> None:
    samples = TokenSamples([(prefix, 1.0), (prefix, 1.0)], seq_length=SEQ_LENGTH, seed=5)
    assert not torch.equal(samples.batch(0, 100)[::2], samples.batch(0, 100)[1::2])


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_no_share_is_named(prefix: str, weight: float) -> None:
    with pytest.raises(DataError, match=r"^data\.train: the weight of .* is .*; give a number above 0"):
        TokenSamples([(prefix, 1.0), (prefix, weight)], seq_length=SEQ_LENGTH, seed=0)


def test_a_vanishing_weight_and_no_source_are_refused() -> None:
    with pytest.raises(DataError, match="of b is below 1/100000"):
        Blend([("a", 1.0), ("b", 1e-7)])
    with pytest.raises(DataError, match=r"data\.valid: no source"):
        Blend([], key="data.valid")


@pytest.mark.parametrize("split", [(0.5, 0.5), (0.9, 0.1), (-0.1, 1.0), (0.0, 1.5)])
def test_a_split_that_is_no_range_is_refused(prefix: str, split: tuple[float, float]) -> None:
    with pytest.raises(DataError, match="give two ascending fractions"):
        samples_of(prefix, split=split)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seq_length": NUM_TOKENS}, r"^data\.train: .* one sample needs \d+; lower data\.seq_length or add text$"),
        (
            {"split": (0.999, 1.0)},
            r"^data\.valid_fraction: leaves 0 of 100 documents of .* for validation, 0 tokens, one sample needs 9; raise it,",
        ),
        (
            {"split": (0.0, 0.01)},
            r"^data\.valid_fraction: leaves 1 of 100 documents .* for training, 1 tokens, .*; lower it",
        ),
    ],
)
def test_too_little_text_for_one_sample_is_named(prefix: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        samples_of(prefix, **options)


def test_one_token_more_than_seq_length_is_enough(prefix: str) -> None:
    assert samples_of(prefix, seq_length=NUM_TOKENS - 1).samples_per_epoch == (1,)


def test_files_cut_short_are_refused(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path / "t", [range(100)])
    (tmp_path / "t.bin").write_bytes(b"\0\0")
    with pytest.raises(DataError, match=r"^data\.valid: .*t\.bin has 2 bytes, its \.idx says 200"):
        samples_of(prefix, key="data.valid")


def test_a_vocabulary_larger_than_the_models_is_refused(prefix: str) -> None:
    with pytest.raises(DataError, match="was tokenized to 60000 ids, model.vocab_size is 512"):
        samples_of(prefix, vocab_size=512)
    assert samples_of(prefix, vocab_size=60_000).sample(0).max() < 60_000


@pytest.mark.parametrize("token_id", [-1, -(2**31), 99, 2**31 - 1])
def test_a_token_id_outside_the_vocabulary_is_refused(tmp_path: Path, token_id: int) -> None:
    prefix = write_documents(tmp_path / "t", [range(99)], vocab_size=100_000)
    (tmp_path / "t.meta.json").unlink()
    assert samples_of(prefix, vocab_size=99, seq_length=98).sample(0).max() == 98
    tokens = np.memmap(tmp_path / "t.bin", dtype=np.int32, mode="r+")
    tokens[7] = token_id
    tokens.flush()
    samples = samples_of(prefix, vocab_size=99, seq_length=98)
    with pytest.raises(
        DataError, match=rf"^data\.train: .* has the token id {token_id}, the model a vocabulary of 99; tok"
    ):
        samples.sample(0)


def test_only_two_epochs_are_kept(prefix: str) -> None:
    options = SourceOptions(seq_length=SEQ_LENGTH, split=(0.0, 1.0), entropy=(5, 0), vocab_size=None, key="data.train")
    source = StreamSource(check_files(prefix), options)
    for epoch in range(5):
        source.sample(epoch * source.samples_per_epoch)
    assert list(source._orders) == [3, 4]


def test_a_prepared_start_shuffles_nothing_more(
    prefix: str, other_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any sample on, whichever epoch each source has reached by then."""
    for start in (0, 7, 200):
        samples, between = TokenSamples([(prefix, 2.0), (other_prefix, 1.0)], seq_length=SEQ_LENGTH, seed=5), []
        samples.prepare(start, lambda calls=between: calls.append(None))
        assert len(between) == 2
        with monkeypatch.context() as patch:
            patch.setattr(stream_source, "shuffled", lambda *_: pytest.fail("shuffled in a step"))
            samples.batch(start, 3)


def test_the_samples_of_a_source_before_an_index_are_counted() -> None:
    blend = Blend([("a", 3), ("b", 1), ("c", 1 / 3)])
    for index in (0, 1, 5, BLEND_PERIOD - 1, BLEND_PERIOD, 2 * BLEND_PERIOD + 9):
        source, position = blend.locate(index)
        assert blend.count_before(index, source) == position


def test_what_is_between_the_sources_is_called_after_each(prefix: str, other_prefix: str) -> None:
    calls: list[None] = []
    samples_of(prefix, between=lambda: calls.append(None))
    TokenSamples([(prefix, 1.0), (other_prefix, 1.0)], seq_length=8, seed=1, between=lambda: calls.append(None))
    assert len(calls) == 3


# ---- loss masks, and samples of whole documents

EXAMPLE_LENGTHS = [1 + (index * 7) % SEQ_LENGTH for index in range(60)] + [SEQ_LENGTH + 1]
EXAMPLES = consecutive(EXAMPLE_LENGTHS, first=1)
PROMPTS = [len(tokens) // 2 for tokens in EXAMPLES]


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The second half of each document is the answer."""
    prefix = tmp_path_factory.mktemp("tokens") / "masked"
    with IndexedWriter(prefix, vocab_size=60_000, masked=True) as writer:
        for tokens, prompt in zip(EXAMPLES, PROMPTS):
            writer.add_document(np.array(tokens), np.arange(len(tokens)) >= prompt)
        writer.commit({"vocab_size": 60_000, "tokens": sum(EXAMPLE_LENGTHS)})
    return str(prefix)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same documents without a mask."""
    return write_documents(tmp_path_factory.mktemp("tokens") / "whole", EXAMPLES)


ANSWERS = {token for tokens, prompt in zip(EXAMPLES, PROMPTS) for token in tokens[prompt:]}
FIRSTS = {tokens[0] for tokens in EXAMPLES}


def documents_in(sample: np.ndarray) -> tuple[list[list[int]], np.ndarray]:
    """The ids of each document of a sample, by its marks, and the padding, as no token comes twice in the text."""
    starts = np.flatnonzero(begins(sample))
    assert starts[0] == 0
    end = int(np.flatnonzero(token_ids(sample) == token_ids(sample[-1]))[0]) + 1
    parts = np.split(sample[:end], starts[1:])
    return [token_ids(part).tolist() for part in parts], sample[end:]


@pytest.mark.parametrize("mode", ["padded", "packed"])
@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_has_every_document_once_and_whole(whole: str, masked: str, mode: str, epoch: int) -> None:
    for prefix in (whole, masked):
        samples = samples_of(prefix, samples=mode)
        found = [document for sample in epoch_of(samples, epoch) for document in documents_in(sample)[0]]
        assert sorted(found) == [list(tokens) for tokens in EXAMPLES]
        assert samples.num_tokens == sum(EXAMPLE_LENGTHS)


@pytest.mark.parametrize("mode", ["padded", "packed"])
def test_padding_repeats_the_last_token_and_is_no_target(whole: str, mode: str) -> None:
    for sample in epoch_of(samples_of(whole, samples=mode), 0):
        documents, padding = documents_in(sample)
        assert len(padding) == SEQ_LENGTH + 1 - sum(map(len, documents))
        assert (token_ids(padding) == documents[-1][-1]).all() and not is_target(padding).any()
        assert not begins(padding).any()


@pytest.mark.parametrize("mode", ["stream", "padded", "packed"])
def test_targets_are_the_answers(masked: str, whole: str, mode: str) -> None:
    """Less the documents' first tokens, in samples of whole documents: nothing precedes them."""
    for prefix, answers in ((masked, ANSWERS), (whole, set(range(1, 1 + sum(EXAMPLE_LENGTHS))))):
        samples = samples_of(prefix, samples=mode)
        values = epoch_of(samples, 1)[:, 1:]
        targets = token_ids(values[is_target(values)])
        assert len(targets) == len(set(targets)), "one counts twice"
        if mode == "stream":
            first = token_ids(epoch_of(samples, 1)[:, 0])
            assert set(targets) == answers & set(token_ids(values).ravel()) and len(first) > 1
        else:
            assert set(targets) == answers - FIRSTS
        count = len(values)
        if samples.is_marked:
            assert samples.num_targets(count, count) == len(targets)
            assert samples.num_targets(count, 1) == np.count_nonzero(is_target(samples.sample(count)[1:]))
        else:
            assert samples.num_targets(count, count) is None


def test_a_padded_sample_is_one_document_and_packed_ones_are_full(whole: str) -> None:
    padded = epoch_of(samples_of(whole, samples="padded"), 0)
    assert [len(documents_in(sample)[0]) for sample in padded] == [1] * len(EXAMPLES)
    packed = epoch_of(samples_of(whole, samples="packed"), 0)
    longest = SEQ_LENGTH + 1
    lengths = [sum(map(len, documents_in(sample)[0])) for sample in packed]
    # Greedy: any two neighbours in the order of packing hold more than one sample, so on average over half.
    assert len(packed) < 0.75 * len(EXAMPLES) and sum(lengths) > len(packed) * longest / 2


def test_packing_is_greedy_in_the_documented_order(whole: str) -> None:
    """Pins the order for good: a change here changes what resumed runs read."""
    packing = np.random.PCG64(np.random.SeedSequence([5, 0, 2**32 - 1]))
    groups: list[list[int]] = []
    for document in np.argsort(packing.random_raw(len(EXAMPLES)), kind="stable"):
        if groups and sum(len(EXAMPLES[one]) for one in (*groups[-1], document)) <= SEQ_LENGTH + 1:
            groups[-1].append(document)
        else:
            groups.append([document])
    order = np.argsort(np.random.PCG64(np.random.SeedSequence([5, 0, 2])).random_raw(len(groups)), kind="stable")
    expected = [[list(EXAMPLES[document]) for document in groups[place]] for place in order]
    samples = epoch_of(samples_of(whole, samples="packed"), 2)
    assert [documents_in(sample)[0] for sample in samples] == expected


def test_a_sample_with_marks_bit_by_bit(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "t", vocab_size=100, masked=True) as writer:
        writer.add_document(np.array([7, 8, 9]), np.array([0, 1, 1]))
        writer.commit({"vocab_size": 100, "tokens": 3})
    padded = samples_of(str(tmp_path / "t"), samples="padded", seq_length=5)
    assert padded.sample(0).tolist() == [7 | BEGINS | NOT_TARGET, 8, 9, *[9 | NOT_TARGET] * 3]
    assert samples_of(str(tmp_path / "t"), seq_length=2).sample(0).tolist() == [7 | NOT_TARGET, 8, 9]
    assert (ID_BITS, NOT_TARGET, BEGINS) == (32, 1 << 32, 1 << 33)


def test_a_stream_without_a_mask_is_plain_ids(prefix: str) -> None:
    samples = samples_of(prefix)
    assert not samples.is_marked and samples.batch(0, 100).max() < 60_000
    assert samples.num_targets(17, 5) is None


def test_blends_of_files_with_and_without_a_mask(prefix: str, masked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = TokenSamples([(prefix, 1.0), (masked, 1.0)], seq_length=SEQ_LENGTH, seed=5)
    assert samples.is_marked
    values = samples.batch(0, 40).numpy()[:, 1:]
    assert samples.num_targets(0, 40) == np.count_nonzero(is_target(values)) < 40 * SEQ_LENGTH
    monkeypatch.setattr(samples._sources[0], "sample", lambda _: pytest.fail("read for nothing"))
    samples.num_targets(0, 40)


@pytest.mark.parametrize("mode", ["padded", "packed"])
def test_a_document_longer_than_a_sample_is_named(prefix: str, mode: str) -> None:
    with pytest.raises(
        DataError,
        match=rf"^data\.train: .* has a document of {max(LENGTHS)} tokens, a sample of whole documents holds 9; "
        rf"set data\.seq_length={max(LENGTHS) - 1} or",
    ):
        samples_of(prefix, samples=mode)
    assert samples_of(prefix, samples=mode, seq_length=max(LENGTHS) - 1).samples_per_epoch[0] > 1


@pytest.mark.parametrize("mode", ["padded", "packed"])
def test_whole_documents_of_a_split(whole: str, mode: str) -> None:
    parts = [samples_of(whole, samples=mode, split=split) for split in ((0.0, 0.5), (0.5, 1.0))]
    read = [[document[0] for sample in epoch_of(part, 0) for document in documents_in(sample)[0]] for part in parts]
    assert sorted(read[0]) + sorted(read[1]) == sorted(FIRSTS) and max(read[0]) < min(read[1])
    with pytest.raises(
        DataError, match=r"^data\.valid_fraction: leaves 0 of 61 documents .* for validation; raise it or"
    ):
        samples_of(whole, samples=mode, split=(0.999, 1.0))


def test_documents_without_tokens_give_no_samples(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32)
    for tokens in ([1, 2], [], [3]):
        builder.add_document(np.array(tokens), [len(tokens), 0])
    builder.finalize(str(tmp_path / "m.idx"))
    assert samples_of(str(tmp_path / "m"), samples="padded").samples_per_epoch == (2,)


@pytest.mark.parametrize("mode", ["padded", "packed"])
def test_the_vocabulary_is_checked_of_ids_alone(masked: str, mode: str, tmp_path: Path) -> None:
    samples_of(masked, samples=mode, vocab_size=60_000).batch(0, 30)
    prefix = write_documents(tmp_path / "t", [range(5), range(99)], vocab_size=100_000)
    (tmp_path / "t.meta.json").unlink()
    assert token_ids(samples_of(prefix, samples=mode, vocab_size=99, seq_length=98).batch(0, 2)).max() == 98
    with pytest.raises(DataError, match="has the token id 98, the model a vocabulary of 98"):
        samples_of(prefix, samples=mode, vocab_size=98, seq_length=98).batch(0, 2)


def test_marks_of_numbers_and_of_torch() -> None:
    value = 5 | NOT_TARGET | BEGINS
    assert (token_ids(value), is_target(value), begins(value)) == (5, False, True)
    values = torch.tensor([value, 6])
    assert token_ids(values).tolist() == [5, 6]
    assert is_target(values).tolist() == [False, True] and begins(values).tolist() == [True, False]
