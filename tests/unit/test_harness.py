"""lm-eval's tasks by a checkpoint: what the library is told equals what one request at a time gives, plainly worked out."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from checkpoint_stand_ins import write_checkpoint

# Before the library is imported: no data set is looked for elsewhere.
os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("lm_eval", reason="the extra harness is not installed")

import datasets
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lime_dist.api import Model, load_model
from lime_dist.checkpoint.checking import meta_text
from lime_dist.cli.command_line import main
from lime_dist.data.checksums import file_digest
from lime_dist.data.meta import find_meta
from lime_dist.data.tasks.arithmetic import Arithmetic
from lime_dist.data.tasks.build import build_task
from lime_dist.data.tokenizer import list_tokenizer, load_tokenizer
from lime_dist.errors import ConfigError, DataError
from lime_dist.harness.decoding import Room, read_decoding
from lime_dist.harness.evaluation import find_evaluated
from lime_dist.harness.language_model import CheckpointModel
from lime_dist.harness.prompt_encoder import PromptEncoder, prompt_encoder

SEQ_LENGTH = 24
# Passes of different sizes sum in different orders (fp32).
TOLERANCE = 1e-5
CHECKPOINT = Path("run/checkpoints/step_000007")
QUESTIONS = [
    {"question": "1 + 2 =", "options": ["3", "4", "12"], "answer": 0},
    {"question": "(1 + 2) - 4 + 5 * 7 - (3 + 9) * 2 =", "options": ["3", "-1"], "answer": 1},
    {"question": "x", "options": ["yes, of course", "no", "perhaps"], "answer": 2},
]
TEXTS = ["A text that is far longer than what the model sees at once, by some windows.", "Short.", "é" * SEQ_LENGTH]
PROMPTS = ["1 + 2 = ", "Say something:", "a", "(1 + 2) - 4 + 5 * 7 - (3 + 9) * 2 = "]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a checkpoint of large random weights, and tasks with their data."""
    folder = tmp_path_factory.mktemp("harness")
    build_task(Arithmetic((2, 3)), folder / "task", {"train": 5, "valid": 5})
    tree = {
        "model": dict(num_layers=3, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, vocab_size=277),
        "data": {"train": "task/train", "tokenizer": "task/tokenizer.model", "seq_length": SEQ_LENGTH},
        "run": {"dir": "run", "device": "cpu"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    write_checkpoint(folder / CHECKPOINT, tree=tree, std=0.4)
    write_task(folder, "choices", QUESTIONS, doc_to_text="{{question}}", doc_to_choice="{{options}}",
               doc_to_target="{{answer}}", output_type="multiple_choice", fewshot_split="test")  # fmt: skip
    write_task(folder, "texts", [{"text": text} for text in TEXTS], doc_to_text="", doc_to_target="{{text}}",
               output_type="loglikelihood_rolling",
               metric_list=[{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}])  # fmt: skip
    write_task(folder, "answers", [{"prompt": prompt, "answer": "?"} for prompt in PROMPTS], doc_to_text="{{prompt}}",
               doc_to_target="{{answer}}", output_type="generate_until", metric_list=[{"metric": "exact_match"}],
               generation_kwargs={"until": ["\n"], "max_gen_toks": 6})  # fmt: skip
    return folder


def write_task(folder: Path, name: str, documents: list[dict], **keys: object) -> None:
    place = folder / "tasks"
    place.mkdir(exist_ok=True)
    data = place / f"{name}.jsonl"
    data.write_text("".join(json.dumps(one) + "\n" for one in documents))
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test", "metadata": {"version": 1.5}, **keys}  # fmt: skip
    (place / f"{name}.yaml").write_text(yaml.safe_dump(task))


@pytest.fixture(autouse=True)
def in_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    # The list of lm-eval's own 14,000 tasks takes a minute to read.
    monkeypatch.setattr("lime_dist.harness.task_choice.TaskManager", partial(TaskManager, include_defaults=False))
    yield
    os.environ.pop("DISABLE_MULTIPROC", None)


@pytest.fixture(scope="module")
def own(folder: Path) -> Model:
    return load_model(folder / "run", device="cpu", tokenizer=folder / "task" / "tokenizer.model")


def harness_model(own: Model, bos: int | None = None, tokenizer: object = None) -> CheckpointModel:
    own_tokenizer = own.tokenizer if tokenizer is None else tokenizer
    encoder = PromptEncoder(tokenizer=own_tokenizer, bos=bos, eos=2)
    return CheckpointModel(own.network, encoder, Room(max_length=SEQ_LENGTH))


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=0, metadata=("some", index, 1))
        for index, one in enumerate(arguments)
    ]


@torch.no_grad()
def plain(own: Model, ids: list[int], count: int) -> tuple[float, bool]:
    """The log-likelihood of the last `count` of `ids`, and whether the model would have said them."""
    logits = own.logits([ids[:-1][-SEQ_LENGTH:]])[0, -count:]
    targets = torch.tensor(ids[-count:])
    chosen = logits.log_softmax(-1)[torch.arange(count), targets]
    return float(chosen.sum()), bool((logits.argmax(-1) == targets).all())


def plain_rolling(own: Model, prefix: int, tokens: list[int]) -> float:
    total, done, ids = 0.0, 0, [prefix, *tokens]
    while done < len(tokens):
        end = min(done + SEQ_LENGTH, len(tokens))
        total += plain(own, ids[: end + 1], end - done)[0]
        done = end
    return total


@torch.no_grad()
def greedy(own: Model, prompt: str, count: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The likeliest token after a prompt, again and again, without a cache; `lime-dist generate` says the same.

    The prompt is cut to what the model sees beside the answer.
    """
    ids = own.tokenizer.encode(prompt)[-(SEQ_LENGTH - count) :]
    shown, tokens = own.tokenizer.decode(ids), list[int]()
    while len(tokens) < count and 2 not in tokens:
        tokens.append(int(own.logits([ids + tokens])[0, -1].argmax()))
    answer = own.tokenizer.decode(ids + tokens).removeprefix(shown)
    capsys.readouterr()
    more = ["--temperature", "0", "--max-new-tokens", str(count), "--device", "cpu"]
    assert main(["generate", "run", "--prompt", shown, *more]) == 0
    printed = capsys.readouterr().out.removesuffix("\n").removeprefix(shown)
    assert answer.startswith(printed) and set(answer[len(printed) :]) <= {"\ufffd"}  # it holds back half a character
    return answer


def test_continuations_equal_one_by_one(own: Model) -> None:
    """Contexts of every length, beyond the model's too; a trailing space goes with the continuation."""
    pairs = [(one["question"], f" {option}") for one in QUESTIONS for option in one["options"]]
    pairs += [("abc " * count, "de") for count in range(1, 9)] + [("", "abc")]
    found = harness_model(own).loglikelihood(requests("loglikelihood", *pairs))
    encode = own.tokenizer.encode
    for (context, continuation), (log_likelihood, is_greedy) in zip(pairs, found, strict=True):
        whole = [2, *encode(continuation)] if not context else encode(context + continuation)
        expected = plain(own, whole, len(whole) - (len(encode(context.rstrip())) or 1))
        assert (log_likelihood, is_greedy) == (pytest.approx(expected[0], rel=TOLERANCE), expected[1])


def test_documents_with_bos(own: Model) -> None:
    model = harness_model(own, bos=1)
    encode = own.tokenizer.encode
    assert model.prefix_token_id == 1 and model.tok_encode("ab") == [1, *encode("ab")]
    ((found, _),) = model.loglikelihood(requests("loglikelihood", ("ab", "cd")))
    assert found == pytest.approx(plain(own, [1, *encode("abcd")], len(encode("cd")))[0], rel=TOLERANCE)
    (found,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", (TEXTS[0],)))
    assert found == pytest.approx(plain_rolling(own, 1, encode(TEXTS[0])), rel=TOLERANCE)


def test_rolling_windows_equal_one_by_one(own: Model) -> None:
    encode = own.tokenizer.encode
    texts = [*TEXTS, "", *(TEXTS[0][:length] for length in range(SEQ_LENGTH - 1, SEQ_LENGTH + 3))]
    assert max(len(encode(text)) for text in texts) > 2 * SEQ_LENGTH
    found = harness_model(own).loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in texts)))
    assert found == pytest.approx([plain_rolling(own, 2, encode(text)) for text in texts], rel=TOLERANCE)
    assert found[3] == 0.0


def test_a_continuation_that_joins_its_context(own: Model, tmp_path: Path) -> None:
    """ "ab" is one token: what follows "a" is nothing, so the joined token is scored."""
    path = list_tokenizer(tmp_path / "joined.model", words=["ab"], characters="abc")
    tokenizer = load_tokenizer(path)
    model = harness_model(own, tokenizer=tokenizer)
    pairs = [("a", "b"), ("ca", "b"), ("c", "a")]
    found = [log_likelihood for log_likelihood, _ in model.loglikelihood(requests("loglikelihood", *pairs))]
    ids = [[2, *tokenizer.encode("ab")], tokenizer.encode("cab"), tokenizer.encode("ca")]
    assert list(map(len, ids)) == [2, 2, 2]
    assert found == pytest.approx([plain(own, one, 1)[0] for one in ids], rel=TOLERANCE)


def test_what_cannot_be_scored(own: Model) -> None:
    model = harness_model(own)
    with pytest.raises(DataError, match=r"^--harness: task some scores an empty text; mend it or leave it out$"):
        model.loglikelihood(requests("loglikelihood", ("a", "")))
    with pytest.raises(DataError, match=r"^--harness: 26 tokens are to be scored at once, data\.seq_length is 24"):
        model.loglikelihood(requests("loglikelihood", ("", "é" * 13)))


def test_answers_equal_those_of_generate(own: Model, capsys: pytest.CaptureFixture[str]) -> None:
    """With stops that come and that do not, in one call with other settings; the stop is no part of the answer."""
    expected = [greedy(own, prompt, 6, capsys) for prompt in PROMPTS]
    assert len(set(expected)) == len(expected) and len(expected[0]) > 2
    stop = next(letter for letter in expected[0][1:] if letter.isascii())
    asked = [(prompt, {"until": [], "max_gen_toks": 6}) for prompt in PROMPTS]
    asked += [(prompt, {"until": stop, "max_gen_toks": 6, "do_sample": False}) for prompt in PROMPTS]
    found = harness_model(own).generate_until(requests("generate_until", *asked))
    assert found == [*expected, *(text.partition(stop)[0] for text in expected)]
    assert found[4] != expected[0]


def test_sampled_answers(own: Model) -> None:
    """Equal prompts get their own draws, and the same ones again; at a low temperature the likeliest token."""
    model = harness_model(own)

    def answers(**more: object) -> list[str]:
        kwargs = {"until": [], "max_gen_toks": 6, **more}
        return model.generate_until(requests("generate_until", *[("1 + 2 = ", kwargs)] * 4))

    drawn = answers(do_sample=True, temperature=1.5)
    assert len(set(drawn)) == 4 and answers(do_sample=True, temperature=1.5) == drawn
    assert set(answers(temperature=1e-4)) == set(answers())
    assert set(answers(do_sample=True, temperature=1.5, top_k=1)) == set(answers())


def test_settings_of_a_task() -> None:
    room = Room(max_length=100, max_new_tokens=50)
    assert read_decoding({}, room).max_new_tokens == 50
    decoding = read_decoding({"until": ["a", "", "b"], "max_new_tokens": 7, "temperature": 0.5, "num_beams": 1}, room)
    assert (decoding.stops, decoding.max_new_tokens, decoding.sampling.temperature) == (("a", "b"), 7, 0.5)
    assert read_decoding({"do_sample": False, "temperature": 0.5}, room).sampling.temperature == 0
    with pytest.raises(ConfigError, match=r"^generation_kwargs\.num_beams: 10 cannot be done here"):
        read_decoding({"num_beams": 10}, room)
    with pytest.raises(
        ConfigError, match=r"max_gen_toks: 256 leaves no room .* data\.seq_length=100; .* from 1 to 99$"
    ):
        read_decoding({}, Room(max_length=100))


def test_bos_is_what_the_token_files_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, _ = find_evaluated(Path("run.yaml"), [], None)
    assert (
        prompt_encoder(CHECKPOINT, config, add_bos=False).bos is None
        and prompt_encoder(CHECKPOINT, config, add_bos=True).bos == 1
    )
    meta = json.loads(Path("task/train.meta.json").read_text())
    (tmp_path / "begun.meta.json").write_text(json.dumps({**meta, "bos_id": 1}))
    begun, _ = find_evaluated(Path("run"), [f"data.train={tmp_path}/begun"], None)
    assert prompt_encoder(CHECKPOINT, begun, add_bos=False).prefix == 1 and capsys.readouterr().err == ""
    mixed, _ = find_evaluated(Path("run"), [f"data.train=[task/train, {tmp_path}/begun]"], None)
    assert prompt_encoder(CHECKPOINT, mixed, add_bos=False).prefix == 2
    away, _ = find_evaluated(Path("run"), ["data.train=elsewhere/train"], None)
    assert prompt_encoder(CHECKPOINT, away, add_bos=False).bos is None and "add --add-bos" in capsys.readouterr().err
    (tmp_path / "wrong.meta.json").write_text(json.dumps({**meta, "bos_id": "1"}))
    with pytest.raises(DataError, match=r"^data\.train: .*wrong\.meta\.json has no usable bos_id"):
        find_meta(tmp_path / "wrong.meta.json", key="data.train")


def test_the_tokenizer_is_the_checkpoints_own(tmp_path: Path) -> None:
    """The one that made its text, by name and by the copy in the run's folder."""
    run = shutil.copytree("run", tmp_path / "run")
    checkpoint, tokenizer = run / "checkpoints" / CHECKPOINT.name, Path("task/tokenizer.model")
    config, _ = find_evaluated(run, [], None)
    for sha256 in (file_digest(tokenizer), "0" * 64):
        meta = json.loads((checkpoint / "meta.json").read_text())
        del meta["sha256"]
        (checkpoint / "meta.json").write_bytes(meta_text(meta | {"origin": {"tokenizer": sha256}}))
        if sha256 == "0" * 64:
            with pytest.raises(
                DataError, match=r"^data\.tokenizer: task/tokenizer\.model is not the tokenizer that made"
            ):
                prompt_encoder(checkpoint, config, add_bos=False)
        else:
            shutil.copyfile(tokenizer, run / "tokenizer.model")
            away, _ = find_evaluated(run, ["data.tokenizer=nowhere.model"], None)
            assert prompt_encoder(checkpoint, away, add_bos=False).tokenizer.path == run / "tokenizer.model"


def test_the_command(own: Model, capsys: pytest.CaptureFixture[str]) -> None:
    """The metrics follow from plain log-likelihoods and from what `generate` says; all is kept, beside a run's own records."""
    board = Path("run/tensorboard")
    board.mkdir(exist_ok=True)
    (board / "events.out.tfevents.1").write_bytes(b"")
    right = [greedy(own, prompt, 6, capsys).partition("\n")[0] for prompt in PROMPTS[:3]] + ["something else"]
    Path("tasks/answers.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt, "answer": text}) + "\n" for prompt, text in zip(PROMPTS, right))
    )
    command = ["eval", "run", "--harness", "answers,choices,texts", "--harness-path", "tasks"]
    assert main([*command, "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    saved = Path("run/harness/step_000007-answers+choices+texts.json")
    assert json.loads(saved.read_text()) == report and str(saved) in printed.err.splitlines()[-1]
    assert (report["checkpoint"], report["step"], report["max_length"]) == (str(CHECKPOINT), 7, SEQ_LENGTH)
    assert report["versions"] == {"answers": 1.5, "choices": 1.5, "texts": 1.5}
    assert set(report["n-shot"].values()) == {0} and report["lm_eval_version"].startswith("0.4.")
    results = report["results"]
    assert results["answers"]["exact_match,none"] == 0.75
    assert results["choices"]["acc,none"] == pytest.approx(accuracy(own)) and results["choices"]["sample_len"] == 3
    total = sum(plain_rolling(own, 2, own.tokenizer.encode(text)) for text in TEXTS)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert results["texts"]["bits_per_byte,none"] == pytest.approx(-total / num_bytes / math.log(2), rel=TOLERANCE)
    assert results["texts"]["bits_per_byte_stderr,none"] is None
    points = EventAccumulator(str(board / "harness")).Reload()
    assert set(points.Tags()["scalars"]) == {
        "harness/answers/exact_match", "harness/choices/acc", "harness/choices/acc_norm", "harness/texts/bits_per_byte",
        "harness/texts/word_perplexity",
    }  # fmt: skip
    (point,) = points.Scalars("harness/choices/acc")
    assert (point.step, point.value) == (7, pytest.approx(accuracy(own)))
    assert [path.name for path in board.iterdir() if path.is_file()] == ["events.out.tfevents.1"]


def accuracy(own: Model) -> float:
    right = 0
    for one in QUESTIONS:
        context = own.tokenizer.encode(one["question"])
        wholes = [own.tokenizer.encode(f"{one['question']} {option}") for option in one["options"]]
        scores = [plain(own, whole, len(whole) - len(context))[0] for whole in wholes]
        right += scores.index(max(scores)) == one["answer"]
    return right / len(QUESTIONS)


def test_table_limit_and_shots(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "run.yaml", "--harness", "cho*", "--harness-path", "tasks", "--limit", "2", "--num-fewshot", "1"]
    assert main([*command, "data.seq_length=64"]) == 0
    printed = capsys.readouterr()
    table = printed.out.splitlines()
    assert re.match(rf"lm-eval 0\.4\.\S+, by {CHECKPOINT}$", table[0])
    assert table[1].split() == ["task", "metric", "value", "n"]
    assert [line.split()[:2] for line in table[2:]] == [["choices", "acc"], ["choices", "acc_norm"]]
    assert re.search(r"  \d\.\d{4}  ± \d\.\d{4}  +2$", table[2])
    saved = json.loads(Path("run/harness/step_000007-cho_-limit2-fewshot1.json").read_text())
    assert saved["n-shot"] == {"choices": 1} and saved["n-samples"]["choices"] == {"original": 3, "effective": 2}
    assert Path("run/tensorboard/harness-limit2-fewshot1").is_dir()


def test_a_checkpoint_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "average").symlink_to(CHECKPOINT.absolute())
    command = ["eval", str(tmp_path / "average"), "--harness", "choices", "--harness-path", "tasks", "--limit", "1"]
    assert main(command) == 0
    assert "is in no run's folder" in capsys.readouterr().err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir() if path.name != "datasets"] == ["average"]


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", "run", "--harness", "choices"]) == 2
    assert (
        capsys.readouterr().err == "lime-dist: --harness: needs the lm-eval library; pip install 'lime_dist[harness]'\n"
    )


OWN = "--harness-path tasks"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("run --harness choices --task", r"--harness: --task is another evaluation; give one of them"),
        ("run --harness choices --nproc 2", r"--harness: runs on one device"),
        ("run --harness choices --split x", r"--split: needs --task"),
        ("run.yaml --num-fewshot 0", r"--num-fewshot: needs --harness; add it"),
        ("run.yaml --task --harness-path tasks", r"--harness-path: needs --harness; add it"),
        ("run --harness , ", r"--harness: names no task; give some"),
        ("run --harness choices --harness-path nowhere", r"--harness-path: nowhere is no folder"),
        (f"run --harness choice {OWN}", r"--harness: 'choice' is no task of lm-eval and tasks; did you mean choices\?"),
        (f"run --harness hub {OWN}", r"--harness: task hub: .*nobody/nothing.*; run where the hub can be reached, or set HF_HOME"),
        (f"run --harness broken {OWN}", r"--harness: task broken: .*; mend the task or leave it out"),
        (f"run --harness long {OWN}", r"--harness: task long: generation_kwargs\.max_gen_toks: 99 leaves no room .*--max-new-tokens"),
        (f"run --harness code {OWN}", r"--harness: task code runs code that the model writes"),
        (f"run.yaml --harness choices {OWN} run.dir=other", r"run\.dir: no checkpoint under other/checkpoints"),
        (f"tasks --harness choices {OWN}", r"checkpoint tasks: neither a step_N folder nor a run's folder"),
        (f"run --harness choices {OWN} data.tokenizer=", r"data\.tokenizer: the run names none"),
        (f"run --harness choices {OWN} model.hidden_size=16", r"checkpoint .*: saved with model\.hidden_size=32, the run has 16"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(
    arguments: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the model is loaded."""
    write_task(Path(), "hub", [], dataset_path="nobody/nothing", dataset_kwargs={}, output_type="loglikelihood")
    write_task(Path(), "broken", [], output_type="loglikelihood", metric_list=[{"name": "acc"}])
    generates = dict(output_type="generate_until", doc_to_text="a", doc_to_target="b")
    write_task(Path(), "long", QUESTIONS, generation_kwargs={"until": [], "max_gen_toks": 99}, **generates)
    write_task(Path(), "code", QUESTIONS, unsafe_code=True, **generates)
    monkeypatch.setattr("lime_dist.harness.evaluation.load_model", None)
    assert main(["eval", *arguments.split()]) == 2
    assert re.match(f"lime-dist: {said}", capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize("arguments", ["--limit 0", "--num-fewshot -1", "--max-new-tokens 0"])
def test_counts_that_cannot_be(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["eval", "run", "--harness", "choices", *arguments.split()])
    assert caught.value.code == 2 and f"argument {arguments.split()[0]}" in capsys.readouterr().err.splitlines()[-1]
