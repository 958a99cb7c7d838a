"""Words found in tokens, and the linear probe: what can be told apart is, what cannot is at chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lime_dist.analysis.activations import collect
from lime_dist.analysis.occurrences import WORDS, Occurrence, find_occurrences, find_words
from lime_dist.analysis.probe import collect_examples, separability
from lime_dist.config import check_config, parse_config
from lime_dist.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from lime_dist.lime.model import plain_model
from lime_dist.lime.values import initialize

PIECES = [
    "\n",
    " is",
    " are",
    " w",
    "as",
    "ere",
    " th",
    "is",
    "land",
    ".",
    "'",
    "t",
    "n",
    "\ufffd",
    " ",
    "Is",
    " island",
]


def words_in(*parts: str) -> list[tuple[int, str]]:
    return [(position, WORDS[label]) for position, label in find_words([PIECES.index(part) for part in parts], PIECES)]


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ((".", " is", "."), [(1, "is")]),
        ((".", " w", "as", " w", "ere", "."), [(2, "was"), (4, "were")]),  # the last of several tokens
        ((".", " ", "is", " are", "\n"), [(2, "is"), (3, "are")]),
        ((" th", "is", "."), []),
        ((".", " is", "land", "."), []),
        ((".", " island", "."), []),
        ((".", " is", "n", "'", "t"), []),
        ((".", " is", "'", "t"), []),  # is't
        ((".", " is", "'", "."), [(1, "is")]),  # the end of a quotation
        (("is", "."), []),  # may be the end of "this"
        ((".", " is"), []),  # may go on
        ((".", "Is", "."), []),
        ((".", " is", "\ufffd"), []),  # perhaps a letter
    ],
    ids=str,
)
def test_words(parts: tuple[str, ...], found: list[tuple[int, str]]) -> None:
    assert words_in(*parts) == found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text(
        "It is what they were. We are here, this was there; islands are where it is.\n" * 50
    )
    return load_tokenizer(train_tokenizer([folder / "text.txt"], folder / "t", vocab_size=300, workers=1))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("what is it", ["is"]),
        ("we were, they are; it was.\nThis is", ["were", "are", "was"]),
        ("it isn't; the isle, a wasp", []),
        ("a café was \u00e9is. is", ["was"]),
        ("\tis\nare\n", ["is", "are"]),
    ],
)
def test_words_of_a_sentencepiece_model(tokenizer: Tokenizer, text: str, found: list[str]) -> None:
    texts, tokens = tokenizer.id_texts(), tokenizer.encode(text)
    places = find_words(tokens, texts)
    assert [WORDS[label] for _, label in places] == found
    for position, label in places:
        assert tokenizer.decode(tokens[: position + 1]).endswith(WORDS[label])


def test_all_ids_of_a_tokenizer_have_a_text(tokenizer: Tokenizer) -> None:
    texts = tokenizer.id_texts()
    assert len(texts) == tokenizer.vocab_size and texts[tokenizer.eos_id] == "\n"
    assert "".join(texts[token] for token in tokenizer.encode("so it is\tthere")) == "so it is\tthere"


def test_as_many_of_each_word_in_the_order_of_the_text() -> None:
    def sequence(*parts: str) -> list[int]:
        return [PIECES.index(part) for part in (".", *parts, ".", ".")]

    was, were = (" w", "as"), (" w", "ere")
    sequences = [sequence(" is", " are", " is"), sequence(*was, *were, " is"), sequence(" are", *was, *were, " are")]
    found, counts = find_occurrences(sequences, PIECES, limit=9)
    assert counts == {"is": 3, "are": 3, "was": 2, "were": 2}
    assert [sum(one.label == label for one in found) for label in range(4)] == [2, 2, 2, 2]
    assert found[:4] == [Occurrence(0, 1, 0), Occurrence(0, 2, 1), Occurrence(0, 3, 0), Occurrence(1, 2, 2)]
    few, seen = find_occurrences(sequences, PIECES, limit=1)
    assert [(one.sequence, one.label) for one in few] == [(0, 0), (0, 1), (1, 2), (1, 3)]
    assert seen["was"] == 1, "no further than needed"
    assert find_occurrences(sequences[:1], PIECES, limit=9) == ([], {"is": 2, "are": 1, "was": 0, "were": 0})


def test_the_last_token_of_a_sequence_is_no_input() -> None:
    tokens = [PIECES.index(part) for part in (".", " is", ".", " are", ".")]
    assert len(find_words(tokens, PIECES)) == 2
    _, counts = find_occurrences([tokens[:4]], PIECES, limit=9)
    assert (counts["is"], counts["are"]) == (1, 0)


# ---- the probe


def labels_of(count: int) -> Tensor:
    return torch.arange(count) % 4


def test_what_is_separable_is_told_apart() -> None:
    labels, generator = labels_of(800), torch.Generator().manual_seed(0)
    features = torch.randn(4, 64, generator=generator)[labels] + torch.randn(800, 64, generator=generator) * 0.1
    found = separability(features, labels)
    assert (found.mean, found.std) == (1.0, 0.0)


def test_what_is_independent_of_the_words_is_at_chance() -> None:
    # The mean over 2,000 guesses at 1/4 has a standard deviation of 0.0097; four of them.
    features = torch.randn(2000, 16, generator=torch.Generator().manual_seed(1))
    labels = labels_of(2000)[torch.randperm(2000, generator=torch.Generator().manual_seed(2))]
    assert separability(features, labels).mean == pytest.approx(0.25, abs=0.04)


def test_the_same_seed_gives_the_same() -> None:
    features = torch.randn(400, 8, generator=torch.Generator().manual_seed(1))
    features[:, 0] += labels_of(400)
    torch.manual_seed(5)
    first = separability(features, labels_of(400), seed=3)
    torch.manual_seed(6)
    assert separability(features, labels_of(400), seed=3) == first
    assert separability(features, labels_of(400), seed=4) != first


def test_examples_are_the_representations_at_the_words() -> None:
    tree = {"model": dict(num_layers=2, hidden_size=16, intermediate_size=24, num_heads=2, vocab_size=40)}
    config = check_config(parse_config(tree))
    model = plain_model(config.model, config.pattern)
    initialize(model, 5)
    text = np.random.default_rng(0).integers(0, 40, (5, 9))
    places = [(0, 2, 1), (0, 5, 0), (2, 8, 3), (3, 0, 2), (4, 7, 1)]
    examples = collect_examples(
        model, [Occurrence(*place) for place in places], lambda index: text[index], sequences_at_once=3
    )
    assert examples.labels.tolist() == [1, 0, 3, 2, 1]
    for row, (sequence, position, _) in enumerate(places):
        states = collect(model, torch.from_numpy(text[sequence : sequence + 1]))
        for kind in ("hidden_states", "values"):
            for layer in range(2):
                torch.testing.assert_close(examples.features[kind][layer][row], states[kind][layer][0, position])
