"""`lime-dist eval --harness`: tasks of lm-eval, by a checkpoint of any layout, on one device."""

from __future__ import annotations

import os
import random
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import lm_eval
import numpy
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate

from lime_dist.checkpoint.edges import evaluated_checkpoint, evaluated_config
from lime_dist.checkpoint.reader import CheckpointReader, find_run, get_checkpoint
from lime_dist.config import Config, check_config, load_config, parse_config, to_dict
from lime_dist.errors import ConfigError
from lime_dist.generate import load_model, single_device
from lime_dist.harness.decoding import Room
from lime_dist.harness.harness_report import HarnessReport, chart_report, save_report
from lime_dist.harness.language_model import CheckpointModel
from lime_dist.harness.prompt_encoder import prompt_encoder
from lime_dist.harness.task_choice import TaskChoice, load_tasks

_RESAMPLES = 1000  # of a standard error that has no formula: within a few per cent


@dataclass(frozen=True, kw_only=True)
class HarnessRequest:
    """limit: the first examples of each task only. max_new_tokens: of an answer, whatever its task says."""

    asked: str
    folder: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    max_new_tokens: int | None = None
    add_bos: bool = False

    def __post_init__(self) -> None:
        if not self.names:
            raise ConfigError("--harness: names no task; give some, such as --harness hellaswag,arc_easy")
        if self.folder is not None and not self.folder.is_dir():
            raise ConfigError(f"--harness-path: {self.folder} is no folder; give one with YAML files of tasks")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(filter(None, (name.strip() for name in self.asked.split(","))))


def find_evaluated(source: Path, overrides: list[str], checkpoint: Path | None) -> tuple[Config, Path]:
    """The config, and the checkpoint: of a config's file, of a run's folder or of a step_N folder. Raises: LimeDistError."""
    if source.is_dir():
        folder = get_checkpoint(checkpoint or source)
        saved = CheckpointReader(folder).config
        return check_config(parse_config(to_dict(saved), overrides)), folder
    config = check_config(load_config(source, overrides))
    return config, evaluated_checkpoint(config, checkpoint)


def evaluate_checkpoint(config: Config, checkpoint: Path, request: HarnessRequest) -> HarnessReport:
    """Raises: ConfigError, DataError, CheckpointError; whatever can be found out before, before the model is loaded."""
    _ = evaluated_config(config, checkpoint)  # raises where the config is of another model
    device = single_device(config.run.device, "run.device")
    encoder = prompt_encoder(checkpoint, config, add_bos=request.add_bos)
    room = Room(max_length=config.data.seq_length, max_new_tokens=request.max_new_tokens)
    choice = TaskChoice(names=request.names, folder=request.folder, num_fewshot=request.num_fewshot)
    with redirect_stdout(sys.stderr):  # tasks print as they like
        _as_lm_eval_starts()
        tasks = load_tasks(choice, room)
        network, _ = load_model(checkpoint, device)
        model = CheckpointModel(network, encoder, room)
        found = evaluate(model, tasks, limit=request.limit, bootstrap_iters=_RESAMPLES, log_samples=False)
    return HarnessReport(
        asked=",".join(request.names),
        checkpoint=checkpoint,
        step=CheckpointReader(checkpoint).meta.step,
        facts={
            "lm_eval_version": lm_eval.__version__,
            "limit": request.limit,
            "num_fewshot": request.num_fewshot,
            "max_length": room.max_length,
            "max_new_tokens": request.max_new_tokens,
            "begins_with_bos": encoder.bos is not None,
        },
        found=found,
    )


def _as_lm_eval_starts() -> None:
    """Its seeds, for tasks that draw examples, and no processes forked off this one, which may have threads and a GPU."""
    random.seed(DEFAULT_RANDOM_SEED)
    numpy.random.seed(DEFAULT_OTHER_SEED)
    os.environ["DISABLE_MULTIPROC"] = "1"


def keep_report(report: HarnessReport) -> str:
    """In the folder of the checkpoint's run. Returns what to tell of it."""
    run = find_run(report.checkpoint)
    if run is None:
        return f"not saved: {report.checkpoint} is in no run's folder"
    try:
        path = save_report(report, run)
        chart_report(report, run)
    except OSError as error:
        return f"not saved: {error.filename or run}: {error.strerror}"
    return f"wrote {path}"
