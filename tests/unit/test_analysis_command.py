"""`lime-dist analyze` as it is typed: on checkpoints of every kind of routing, its JSON, its page, its mistakes."""

from __future__ import annotations

import json
import math
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoint_stand_ins import write_checkpoint
from test_profile_page import browse, complaints, needs_browser

from lime_dist.analysis.sentences import describe
from lime_dist.analysis.text_report import layer_rows
from lime_dist.cli.command_line import main
from lime_dist.data.documents import TextFormat
from lime_dist.data.indexed import IndexedWriter
from lime_dist.data.tokenize import tokenize_files
from lime_dist.data.tokenizer import load_tokenizer, train_tokenizer
from lime_dist.generate import load_model
from lime_dist.lime.model import model_logits, model_loss
from lime_dist.training.run_data import open_held_out_data

VOCAB_SIZE = 300
LAYERS = 3
TEXT = "It is what they were, and we are here; that was there. It is so, you are right, he was not, you were late.\n"
KINDS = {
    "kv": {},
    "same_heads": {"heads": "same"},
    "hidden": {"entry": "hidden"},
    "dynamic": {"entry": "hidden", "router": "dynamic"},
    "pruned": {"entry": "hidden", "router": "dynamic", "head_top_p": 0.6},
    "average": {"router": "average"},
    "block": {"pattern": "block:2"},
    "llama": {"router": "none"},
}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token files, a tokenizer, and a checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("analyze")
    (folder / "text.txt").write_text("".join(f"{number} {TEXT}" for number in range(120)))
    (folder / "short.txt").write_text("It is.")
    train_tokenizer([folder / "text.txt"], folder / "tokenizer", vocab_size=VOCAB_SIZE, workers=1)
    tokenize_files([folder / "text.txt"], folder / "tokenizer.model", folder / "valid", workers=1)
    for name, depth in KINDS.items():
        write_checkpoint(folder / name / "checkpoints" / "step_000007", tree=tree_of(name, depth))
    return folder


def tree_of(name: str, depth: dict) -> dict:
    return {
        "model": {
            "num_layers": LAYERS, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "vocab_size": VOCAB_SIZE,
        },
        "depth": depth,
        "data": {
            "train": "valid", "valid": "valid", "tokenizer": "tokenizer.model", "seq_length": 16, "global_batch_size": 2,
        },
        "parallel": {"pp": 1 if name == "block" else 3},
    }  # fmt: skip


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def analyzed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["analyze", *arguments, "--device", "cpu", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_routing(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = analyzed(capsys, kind, "--batches", "2")
    assert (found["step"], found["text"]["sequences"], found["text"]["tokens"]) == (7, 16, 256)
    for figures in (*found["spectra"]["entropy"].values(), *found["spectra"]["effective_rank"].values()):
        assert len(figures["mean"]) == len(figures["std"]) == LAYERS
    assert None not in found["spectra"]["entropy"]["values"]["mean"]
    assert found["separability"]["used_of_each"] >= 100
    has_routers = kind not in ("average", "llama")
    assert bool(found["routers"]) == bool(found["edges"]) == has_routers
    assert ("routers" in found["left_out"]) == ("edges" in found["left_out"]) == (not has_routers)
    if found["routers"]:
        heads = np.array(found["routers"]["by_head"], dtype=float)
        assert heads.shape == (2, LAYERS, LAYERS)
        assert np.allclose(heads.mean(0), np.array(found["routers"]["mean"], dtype=float), rtol=1e-4, equal_nan=True)
        losses = {kept["rule"]: kept["loss"] for kept in found["edges"]}
        assert losses["heaviest 100%"] == found["held_out_loss"] != losses["heaviest 0%"]


def test_a_run_on_whole_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its samples have marks above the ids, and examples of unlike lengths."""
    prefix = tmp_path / "task"
    documents = [np.arange(40, 40 + length) for length in (4, 9, 15, 6) * 6]
    with IndexedWriter(prefix, vocab_size=VOCAB_SIZE, masked=True) as writer:
        for document in documents:
            writer.add_document(document, np.arange(len(document)) > 1)
        writer.commit({"vocab_size": VOCAB_SIZE, "tokens": sum(map(len, documents))})
    tree = {
        "model": {
            "num_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "vocab_size": VOCAB_SIZE,
        },
        "data": {
            "train": str(prefix), "valid": str(prefix), "tokenizer": "tokenizer.model", "seq_length": 16, "global_batch_size": 2,
            "samples": "padded",
        },
    }  # fmt: skip
    write_checkpoint(tmp_path / "run" / "checkpoints" / "step_000007", tree=tree)
    found = analyzed(capsys, str(tmp_path / "run"), "--batches", "3")
    model, _ = load_model(tmp_path / "run" / "checkpoints" / "step_000007", torch.device("cpu"))
    with torch.no_grad():
        losses = [
            F.cross_entropy(
                model_logits(model, torch.tensor(ids[None, :-1]))[0, 1:], torch.tensor(ids[2:]), reduction="none"
            )
            for ids in documents
        ]
    assert found["held_out_loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)


def test_the_loss_and_the_map_are_the_checkpoints(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = analyzed(capsys, "kv", "--batches", "1", "--text", "text.txt")
    model, _ = load_model(folder / "kv" / "checkpoints" / "step_000007", torch.device("cpu"))
    processor = load_tokenizer("tokenizer.model")
    tokens = processor.encode((folder / "text.txt").read_text())
    rows = torch.tensor([tokens[16 * row : 16 * row + 17] for row in range(8)])
    with torch.no_grad():
        assert found["held_out_loss"] == pytest.approx(float(model_loss(model, rows)), rel=1e-5)
    router = dict(model.named_parameters())["layers.2.self_attn.lime_router.weight"].detach().abs()
    assert found["routers"]["mean"][2] == pytest.approx(router.mean((0, 2)).tolist(), rel=1e-4)
    assert found["routers"]["mean"][0] == [None] * 3


@pytest.mark.parametrize("samples", ["padded", "packed"])
def test_samples_of_whole_documents(samples: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Padding counts in no loss, and a mark is no token."""
    (folder / "lines.txt").write_text("".join(f"It is {number}.\n" for number in range(40)))
    line = TextFormat(document_per_line=True)
    tokenize_files(
        [folder / "lines.txt"], folder / "tokenizer.model", folder / "lines", text_format=line, overwrite=True
    )
    tree = tree_of("kv", {})
    tree["data"] |= {"valid": "lines", "samples": samples}
    write_checkpoint(folder / samples / "checkpoints" / "step_000007", tree=tree)
    found = analyzed(capsys, samples, "--batches", "1")
    model, config = load_model(folder / samples / "checkpoints" / "step_000007", torch.device("cpu"))
    held_out = open_held_out_data(config)
    with torch.no_grad():
        assert found["held_out_loss"] == pytest.approx(float(model_loss(model, held_out.batch(0, 8))), rel=1e-5)
    assert held_out.is_marked


def test_a_step_folder_and_one_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    run = analyzed(capsys, "kv", "--batches", "1")
    step = analyzed(capsys, "kv/checkpoints/step_000007", "--batches", "1")
    other = analyzed(capsys, "llama", "--checkpoint", "kv/checkpoints/step_000007", "--batches", "1")
    assert run["held_out_loss"] == step["held_out_loss"] == other["held_out_loss"]


def test_a_step_folder_from_within_its_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir("kv/checkpoints")
    assert analyzed(
        capsys, "step_000007", "--batches", "1", "--text", "../../text.txt", "--tokenizer", "../../tokenizer.model"
    )


def test_names_with_dollar_signs_are_no_formulas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs, as one alone has no name in the plots."""
    name = r"a$\run$"
    Path(name).symlink_to("kv")
    assert (
        main(["analyze", name, "llama", "--batches", "1", "--device", "cpu", "--html", str(tmp_path / "page.html")])
        == 0
    )
    assert f"{name}: hidden states" in (tmp_path / "page.html").read_text()


def test_every_key_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    document = (Path(__file__).parents[2] / "docs" / "analysis.md").read_text()
    found = analyzed(capsys, "kv", "--batches", "1")
    keys = {
        *found,
        *found["model"],
        *found["text"],
        *found["routers"],
        *found["spectra"],
        *found["separability"],
        *found["edges"][0],
    }
    assert {key for key in keys if f"`{key}`" not in document} == set()


class Parsed(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    """Of a run with routers and one without; with the figures beside it."""
    runs = [str(folder / name) for name in ("kv", "llama")]
    text = ["--text", str(folder / "text.txt"), "--tokenizer", str(folder / "tokenizer.model")]
    page, figures = folder / "page.html", folder / "both.json"
    assert main(["analyze", *runs, *text, "--batches", "1", "--html", str(page), "--json", str(figures)]) == 0
    return page


def test_a_page_of_two_runs_asks_for_nothing(page: Path) -> None:
    runs = json.loads(page.with_name("both.json").read_text())["runs"]
    assert [Path(run["run"]).name for run in runs] == ["kv", "llama"]
    text = page.read_text()
    parsed = Parsed(text)
    assert parsed.tags.count("svg") == 2, "curves of both, and the maps of the run that has routers"
    assert all(link.startswith(("#", "data:image/png")) for link in parsed.links)
    assert "kv: values" in text and "llama: values" in text and "script" not in parsed.tags
    assert all(escape(sentence) in text for run in runs for sentence in run["sentences"])


@needs_browser
def test_a_browser_shows_the_page_and_has_nothing_to_complain_of(page: Path) -> None:
    browsed = browse(page, "--dump-dom")
    assert browsed.returncode == 0 and complaints(browsed) == []
    assert "Router maps of" in browsed.stdout


# ---- sentences


def made_up() -> dict[str, Any]:
    """Four layers; by hand."""
    row = {"mean": [1.0, 2.0, 3.0, 2.5], "std": [0.1] * 4}
    return {
        "step": 10,
        "model": {"num_layers": 4, "edges": 6, "pattern": "full"},
        "text": {"sequences": 8, "tokens": 128},
        "held_out_loss": 3.0,
        "routers": {
            "mean": [[None] * 4, [1.0, 3.0, None, None], [2.0, 1.0, 7.0, None], [3.0, 1.0, 2.0, 4.0]],
            "own_share": [None, 0.75, 0.7, 0.4],
            "expected_source": [None, 0.75, 1.5, 1.7],
        },
        "spectra": {"entropy": {"hidden_states": row, "values": row, "raw_values": {"mean": [1.0, 1.5, 3.5, 2.0]}}},
        "separability": None,
        "edges": [
            {"rule": "heaviest 0%", "edges": 0, "weight_share": 0.0, "loss": 4.0, "largest_bundle_bytes": None},
            {"rule": "heaviest 50%", "edges": 3, "weight_share": 0.7, "loss": 3.25, "largest_bundle_bytes": None},
        ],
        "left_out": {"separability": "no words"},
    }  # fmt: skip


def test_sentences_say_what_the_figures_are() -> None:
    said = " ".join(describe(made_up()))
    assert "Strong diagonal: the own layer has the largest |R| in 3 of 3 readers, on average 62% of sum |R|" in said
    assert "even weights would give 36%" in said and "from 40% in layer 3 to 75% in layer 1" in said
    assert "The earlier layer with the largest |R| is layer 0 for readers 2, 3." in said
    assert "Renyi entropy of values: lowest 1.00 in layer 0, highest 3.00 in layer 2, 2.50 in the last." in said
    assert "in 2 of 3 layers, on average by +0.17" in said
    assert "heaviest 0% (0 edges, 0% of |R|) +1.0000; heaviest 50% (3 edges, 70% of |R|) +0.2500" in said
    assert "Left out, separability: no words." in said


def test_a_weak_diagonal_is_called_none() -> None:
    report = made_up()
    report["routers"]["mean"] = [[None] * 4, [3.0, 1.0, None, None], [1.0, 2.0, 1.0, None], [1.0, 1.0, 3.0, 1.0]]
    report["routers"]["own_share"] = [None, 0.25, 0.25, 1 / 6]
    said = " ".join(describe(report))
    assert "No strong diagonal: the own layer has the largest |R| in 0 of 3 readers" in said
    assert "the preceding layer for readers 2, 3." in said


def test_columns_that_a_run_lacks_are_left_out() -> None:
    report = made_up() | {"routers": None, "separability": None}
    report["spectra"]["effective_rank"] = report["spectra"]["entropy"]
    assert layer_rows(report)[0] == ["layer", "S hidden", "S values", "S raw values", "rank values"]


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "checkpoint nowhere: neither a step_N folder"),
        (["kv", "--text", "nowhere.txt"], "--text: nowhere.txt is not a file"),
        (["kv", "--text", "short.txt"], r"--text: short.txt has \d+ tokens, one sequence needs 17"),
        (["kv", "--html", "page.png"], "--html: page.png must end in .html"),
        (["kv", "--json", "nowhere/a.json"], "--json: nowhere is no folder"),
        (["kv", "--tokenizer", "nowhere.model"], "tokenizer: nowhere.model does not exist"),
        (["kv", "llama", "--checkpoint", "kv"], "--checkpoint: works with one RUN"),
    ],
    ids=str,
)
def test_mistakes(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", *arguments, "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and re.match(f"lime-dist: {said}", captured.err)


def test_token_files_that_are_gone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["analyze", str(folder / "kv"), "--device", "cpu"]) == 2
    assert "data.valid" in (said := capsys.readouterr().err) and "give --text FILE" in said


def test_few_words_are_left_out_with_their_numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "few.txt").write_text("".join(f"{number} {TEXT}" for number in range(3)))
    found = analyzed(capsys, "kv", "--text", "few.txt", "--batches", "1")
    assert found["separability"] is None and re.search(
        r"is \d, are \d, was \d, were \d\): 100", found["left_out"]["separability"]
    )
    assert math.isfinite(found["held_out_loss"])
