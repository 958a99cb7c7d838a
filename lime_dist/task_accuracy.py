"""How many examples of a synthetic task a checkpoint answers right, decoded greedily on one device, whatever layout wrote it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lime_dist.checkpoint.edges import evaluated_checkpoint, evaluated_config
from lime_dist.checkpoint.own_tokenizer import load_tokenizer_of, own_tokenizer
from lime_dist.config import Config, check_config
from lime_dist.data.indexed import TokenFiles, check_files, open_mask, open_tokens
from lime_dist.data.meta import require_tokenizer
from lime_dist.data.tasks.catalog import task_named
from lime_dist.data.tasks.examples import Task
from lime_dist.data.tokenizer import Tokenizer, require_eos
from lime_dist.errors import ConfigError, DataError
from lime_dist.generate import continue_all, load_model, single_device

_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class TaskRequest:
    """checkpoint: None for the newest of the run's folder. split: a prefix of token files, None for `data.valid`.

    limit: None for all examples. max_new_tokens: None for twice as many as the longest answer has.
    """

    checkpoint: Path | None = None
    split: str | None = None
    limit: int | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Question:
    """Token ids of an example: the prompt, and the answer up to its end."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of one example, in text; group: how hard it is."""

    group: int
    is_right: bool
    prompt: str
    answer: str
    generated: str


@dataclass(frozen=True, kw_only=True)
class Share:
    num_right: int
    num_examples: int

    @property
    def accuracy(self) -> float:
        return self.num_right / self.num_examples

    @property
    def standard_error(self) -> float:
        """Of a binomial share."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.num_examples)

    def report(self) -> dict[str, Any]:
        return {
            "examples": self.num_examples,
            "right": self.num_right,
            "accuracy": self.accuracy,
            "standard_error": self.standard_error,
        }


def share_of(verdicts: Sequence[Verdict]) -> Share:
    return Share(num_right=sum(verdict.is_right for verdict in verdicts), num_examples=len(verdicts))


@dataclass(frozen=True, kw_only=True)
class TaskAccuracy:
    """The verdicts on a checkpoint; as text, a table by group with a few wrong examples below."""

    task: Task
    checkpoint: Path
    prefix: str
    verdicts: Sequence[Verdict]

    def shares(self) -> dict[str, Share]:
        """By group, and of all."""
        groups = defaultdict(list)
        for verdict in self.verdicts:
            groups[verdict.group].append(verdict)
        return {str(group): share_of(groups[group]) for group in sorted(groups)} | {"all": share_of(self.verdicts)}

    def wrong(self) -> list[Verdict]:
        """The first few."""
        return [verdict for verdict in self.verdicts if not verdict.is_right][:_SHOWN]

    def report(self) -> dict[str, Any]:
        shares = {group: share.report() for group, share in self.shares().items()}
        return {
            "task": self.task.name,
            "checkpoint": str(self.checkpoint),
            "split": self.prefix,
            "group": self.task.group_name,
            "all": shares.pop("all"),
            "groups": shares,
            "wrong": [{"prompt": one.prompt, "answer": one.answer, "generated": one.generated} for one in self.wrong()],
        }

    def __str__(self) -> str:
        lines = [f"{self.task.name}, {self.prefix}, by {self.checkpoint}"]
        lines += [f"{self.task.group_name:>10}  {'examples':>9}  {'right':>9}  accuracy"]
        for group, share in self.shares().items():
            accuracy = f"{share.accuracy:8.1%}  ± {share.standard_error:.1%}"
            lines += [f"{group:>10}  {share.num_examples:>9,}  {share.num_right:>9,}  {accuracy}"]
        for one in self.wrong():
            texts = {"wrong": one.prompt, "answer": one.answer, "generated": one.generated}
            lines += ["", *(f"{name + ':':<10} {_printable(text)}" for name, text in texts.items())]
        return "\n".join(lines)


def _printable(text: str) -> str:
    """On one line and without what a terminal would act on; a model may generate any character."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def judge_checkpoint(config: Config, request: TaskRequest) -> TaskAccuracy:
    """Raises: ConfigError, DataError, CheckpointError."""
    config = check_config(config)
    prefix, key = _examples_of(config, request)
    files = check_files(prefix, key=key)
    task = task_named(files.task, key=key, prefix=prefix)
    folder = evaluated_checkpoint(config, request.checkpoint)
    tokenizer = _tokenizer_of(folder, config, files, key)
    _ = evaluated_config(config, folder)  # raises where the config is of another model
    model, _ = load_model(folder, single_device(config.run.device, "run.device"))
    questions = read_questions(files)[: request.limit]
    max_new_tokens = request.max_new_tokens or 2 * max(len(question.answer) for question in questions)
    prompts = [question.prompt for question in questions]
    continuations = continue_all(model, prompts, eos=require_eos(tokenizer), max_new_tokens=max_new_tokens)
    verdicts = [judge(task, tokenizer, *pair) for pair in zip(questions, continuations, strict=True)]
    return TaskAccuracy(task=task, checkpoint=folder, prefix=prefix, verdicts=verdicts)


def _examples_of(config: Config, request: TaskRequest) -> tuple[str, str]:
    """The prefix of the examples' token files, and what names it."""
    if request.split is not None:
        return request.split, "--split"
    if len(config.data.valid) != 1:
        raise ConfigError(f"data.valid: names {len(config.data.valid)} token files; name one, or give --split PREFIX")
    return config.data.valid[0].path, "data.valid"


def _tokenizer_of(checkpoint: Path, config: Config, files: TokenFiles, key: str) -> Tokenizer:
    path = own_tokenizer(checkpoint, config)
    if path is None:
        raise ConfigError("data.tokenizer: not set; name the tokenizer.model beside the task's files")
    require_tokenizer(path, files.tokenizer_sha256, key="data.tokenizer", made=f"{key} {files.prefix}")
    return load_tokenizer_of(config, path)


def read_questions(files: TokenFiles) -> list[Question]:
    """All examples of a task's token files: up to the first target is the prompt, from there on the answer.

    Raises: DataError where the files have no loss mask, or an example no prompt or answer.
    """
    if not files.has_mask:
        raise DataError(f"{files.prefix}.mask: does not exist; run lime-dist data build-task again")
    tokens, mask = (np.asarray(whole) for whole in (open_tokens(files), open_mask(files)))
    questions: list[Question] = []
    for start, stop in zip(files.document_bounds.tolist(), files.document_bounds[1:].tolist()):
        (targets,) = np.nonzero(mask[start:stop])
        if not len(targets) or not targets[0]:
            raise DataError(f"{files.prefix}: example {len(questions)} has no prompt or answer; build the task again")
        middle = start + int(targets[0])
        questions.append(Question(prompt=tokens[start:middle].tolist(), answer=tokens[middle : stop - 1].tolist()))
    return questions


def judge(task: Task, tokenizer: Tokenizer, question: Question, continuation: list[int]) -> Verdict:
    prompt, answer, generated = map(tokenizer.decode, (question.prompt, question.answer, continuation))
    return Verdict(
        group=task.group(prompt),
        is_right=task.is_right(answer, generated),
        prompt=prompt,
        answer=answer,
        generated=generated,
    )
