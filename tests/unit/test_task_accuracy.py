"""Accuracy on a task: batched greedy decoding equals decoding one by one, and the command judges what it decoded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from checkpoint_stand_ins import write_checkpoint

from lime_dist.cli.command_line import main
from lime_dist.config import check_config, parse_config
from lime_dist.data.indexed import check_files
from lime_dist.data.tasks.arithmetic import Arithmetic
from lime_dist.data.tasks.build import build_task
from lime_dist.data.tasks.prosqa import ProsQA
from lime_dist.data.tokenizer import load_tokenizer
from lime_dist.generate import (
    Sampling,
    batches_of_like_length,
    continue_all,
    generate_greedily,
    generate_ids,
    load_model,
)
from lime_dist.lime.model import LimeChunk, plain_model
from lime_dist.lime.values import specified_parameters
from lime_dist.task_accuracy import (
    Share,
    TaskAccuracy,
    Verdict,
    read_questions,
)

GREEDY = Sampling(temperature=0)
MODELS = {
    "kv": ["model.num_kv_heads=2"],
    "dynamic": ["depth.entry=hidden", "depth.router=dynamic"],
    "llama": ["depth.router=none"],
}


def make_model(overrides: list[str]) -> LimeChunk:
    """Large random weights, so that continuations vary."""
    tree = {"model": dict(num_layers=3, hidden_size=32, intermediate_size=48, num_heads=4, vocab_size=40)}
    config = check_config(parse_config(tree, overrides))
    model = plain_model(config.model, config.pattern).eval()
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for _, parameter in specified_parameters(model):
            parameter.normal_(0, 0.4, generator=generator)
    return model


def one_by_one(model: LimeChunk, prompt: list[int], max_new_tokens: int) -> list[int]:
    return list(generate_ids(model, prompt, GREEDY, max_new_tokens))


def up_to(eos: int, ids: list[int]) -> list[int]:
    return ids[: ids.index(eos)] if eos in ids else ids


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_equals_one_by_one(name: str) -> None:
    """With prompts of several lengths, and sequences that end at different times, at once, and not at all."""
    model = make_model(MODELS[name])
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(40, (4 + index % 5,), generator=generator).tolist() for index in range(12)]
    whole = [one_by_one(model, prompt, 10) for prompt in prompts]
    expected = {eos: [up_to(eos, ids) for ids in whole] for eos in range(40)}
    num_lengths = {eos: len(set(map(len, found))) for eos, found in expected.items()}
    most_varied = max(num_lengths, key=num_lengths.__getitem__)
    assert num_lengths[most_varied] > 3, "hardly any sequence ended before another"
    first = whole[0][0]
    unused = next(eos for eos in range(40) if not any(eos in ids for ids in whole))
    for eos in (most_varied, first, unused):
        assert generate_greedily(model, prompts, eos=eos, max_new_tokens=10) == expected[eos]
    assert generate_greedily(model, prompts[:1], eos=first, max_new_tokens=10) == [[]]
    assert generate_greedily(model, prompts, eos=unused, max_new_tokens=1) == [ids[:1] for ids in whole]


def test_batches_hold_prompts_of_like_length() -> None:
    lengths = [3, 5, 3, 30, 5, 9] * 3000
    batches = list(batches_of_like_length(lengths, slack=7))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        found = [lengths[index] for index in batch]
        assert max(found) - min(found) <= 7 and len(batch) * (max(found) + 7) <= 2**15
    assert len(batches) < 12
    assert list(batches_of_like_length([2**20, 2**20], 1)) == [[0], [1]]


def test_what_a_model_may_generate_is_printed_on_one_line() -> None:
    verdict = Verdict(group=3, is_right=False, prompt="p", answer="a", generated="one\ntwo\x1b[2J")
    accuracy = TaskAccuracy(task=ProsQA(), checkpoint=Path("c"), prefix="p", verdicts=[verdict])
    assert str(accuracy).splitlines()[-1] == r"generated: one\ntwo\x1b[2J"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task, a config and a checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("accuracy")
    build_task(Arithmetic((2, 3)), folder / "task", {"train": 5, "valid": 12})
    tree = {
        "model": dict(num_layers=3, hidden_size=8, intermediate_size=12, num_heads=2, vocab_size=277),
        "data": {"train": "task/train", "valid": "task/valid", "tokenizer": "task/tokenizer.model"},
        "run": {"dir": "run", "device": "cpu"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    write_checkpoint(folder / "run" / "checkpoints" / "step_000007", tree=tree)
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def test_questions_are_the_examples(folder: Path) -> None:
    tokenizer = load_tokenizer("task/tokenizer.model")
    records = [json.loads(line) for line in Path("task/valid.jsonl").read_text().splitlines()]
    questions = read_questions(check_files("task/valid"))
    assert [tokenizer.decode(question.prompt) for question in questions] == [one["prompt"] for one in records]
    assert [tokenizer.decode(question.answer) for question in questions] == [one["answer"] for one in records]


def test_the_command_judges_what_the_checkpoint_generates(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each answer is that of `generate_ids`, which knows no batch."""
    assert main(["eval", "run.yaml", "--task", "--json", "--max-new-tokens", "9"]) == 0
    report = json.loads(capsys.readouterr().out)
    checkpoint = Path("run/checkpoints/step_000007")
    assert (report["task"], report["checkpoint"], report["group"]) == ("arithmetic", str(checkpoint), "operands")
    assert {group: share["examples"] for group, share in report["groups"].items()} == {"2": 12, "3": 12}
    assert report["all"] == {"examples": 24, "right": 0, "accuracy": 0.0, "standard_error": 0.0}
    model, _ = load_model(checkpoint, torch.device("cpu"))
    tokenizer = load_tokenizer("task/tokenizer.model")
    for wrong in report["wrong"]:
        ids = one_by_one(model, tokenizer.encode(wrong["prompt"]), 9)
        assert wrong["generated"] == tokenizer.decode(up_to(tokenizer.eos_id, ids))
    assert len(report["wrong"]) == 3


def test_a_model_that_knows_the_answers_is_right(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers in the right order, whatever order the batches had."""
    questions = read_questions(check_files("task/valid"))
    known = {tuple(question.prompt): question.answer for question in questions}

    def knows(_: object, prompts: list[list[int]], **more: object) -> list[list[int]]:
        return [known[tuple(prompt)] for prompt in prompts]

    monkeypatch.setattr("lime_dist.generate.generate_greedily", knows)
    prompts = [one.prompt for one in questions]
    assert continue_all(make_model([]), prompts, eos=2, max_new_tokens=5) == [one.answer for one in questions]


def test_limit_split_and_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "run.yaml", "--task", "--limit", "3", "--split", "task/train", "--checkpoint", "run"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "arithmetic, task/train, by run/checkpoints/step_000007"
    assert re.split(r"\s{2,}", table[2].strip()) == ["2", "2", "0", "0.0%", "± 0.0%"]
    assert re.split(r"\s{2,}", table[4].strip()) == ["all", "3", "0", "0.0%", "± 0.0%"]
    assert table[6].startswith("wrong:     ") and table[8].startswith("generated: ")


def test_shares_by_group() -> None:
    def verdict(group: int, is_right: bool) -> Verdict:
        return Verdict(group=group, is_right=is_right, prompt="p", answer="a", generated="g")

    verdicts = [verdict(5, True), verdict(3, False), *[verdict(3, True)] * 3]
    accuracy = TaskAccuracy(task=ProsQA(), checkpoint=Path("c"), prefix="p", verdicts=verdicts)
    assert list(accuracy.shares()) == ["3", "5", "all"]
    assert accuracy.shares()["3"] == Share(num_right=3, num_examples=4)
    assert accuracy.shares()["3"].standard_error == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert accuracy.report()["all"]["accuracy"] == 0.8 and len(accuracy.wrong()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--limit 3", r"--limit: needs --task or --harness; add it"),
        ("--json", r"--json: needs --task or --harness; add it"),
        ("--task --nproc 2", r"--task: runs on one device"),
        ("--task data.valid=", r"data\.valid: names 0 token files; name one, or give --split PREFIX"),
        ("--task data.tokenizer=", r"data\.tokenizer: not set; name the tokenizer\.model beside"),
        ("--task --split nowhere", r"--split: nowhere\.idx does not exist"),
        ("--task --split plain", r"--split: plain holds no examples of a task; make some with lime-dist data build-task"),
        ("--task run.dir=other", r"run\.dir: no checkpoint under other/checkpoints"),
        ("--task model.hidden_size=16", r"checkpoint .*: saved with model\.hidden_size=8, the run has 16"),
        ("--task --checkpoint task", r"checkpoint task: neither a step_N folder nor"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(arguments: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for suffix in ("bin", "idx"):
        Path(f"plain.{suffix}").write_bytes(Path(f"task/valid.{suffix}").read_bytes())
    assert main(["eval", "run.yaml", *arguments.split()]) == 2
    assert re.match(f"lime-dist: {said}", capsys.readouterr().err.splitlines()[-1])
