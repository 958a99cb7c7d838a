"""Which of lm-eval's tasks, and of a user's own folder, are asked for. What is wrong with them is said before a model is loaded."""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager

from lime_dist.errors import ConfigError, one_line, shown
from lime_dist.harness.decoding import Room, read_decoding
from lime_dist.lifecycle.launcher import warn


@dataclass(frozen=True, kw_only=True)
class TaskChoice:
    """names: of tasks, groups or tags, or patterns such as arc_*. folder: of YAML files, beside lm-eval's own tasks.

    num_fewshot: None for each task's own.
    """

    names: tuple[str, ...]
    folder: Path | None = None
    num_fewshot: int | None = None


def load_tasks(choice: TaskChoice, room: Room) -> dict[str, Any]:
    """As `lm_eval.evaluate` takes them, with their data. Raises: ConfigError."""
    manager, names = _find(choice)
    built = [part for name in names for part in _build(manager, name)]
    try:
        loaded: dict[str, Any] = manager.load(built)
    except ValueError as error:  # a task that is also in a group
        raise ConfigError(f"--harness: {one_line(error)}; name one of them") from None
    for name, task in loaded["tasks"].items():
        _check(name, task, room)
        _set_shots(name, task, choice.num_fewshot)
    return loaded


def _find(choice: TaskChoice) -> tuple[TaskManager, list[str]]:
    """The folder alone where it has all of them: the list of lm-eval's own tasks takes a while to read."""
    if choice.folder is not None:
        manager = TaskManager(include_path=str(choice.folder), include_defaults=False)
        if all(map(manager.match_tasks, ([name] for name in choice.names))):
            return manager, _matching(manager, choice)
    print("lime-dist: reading lm-eval's list of tasks", file=sys.stderr, flush=True)
    manager = TaskManager(include_path=str(choice.folder) if choice.folder is not None else None)
    return manager, _matching(manager, choice)


def _matching(manager: TaskManager, choice: TaskChoice) -> list[str]:
    found: dict[str, None] = {}
    for name in choice.names:
        matching = manager.match_tasks([name])
        if not matching:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            fix = f"did you mean {near[0]}?" if near else "`lm-eval ls tasks` lists its own"
            place = "lm-eval" if choice.folder is None else f"lm-eval and {choice.folder}"
            raise ConfigError(f"--harness: {shown(name)} is no task of {place}; {fix}")
        found |= dict.fromkeys(matching)
    return list(found)


def _build(manager: TaskManager, name: str) -> list[Any]:
    """The group, or the task, or the tasks of the tag. Raises: ConfigError, whatever the task's own code or its data raise."""
    try:
        loaded = manager.load([name])
    except ConnectionError as error:
        raise ConfigError(
            f"--harness: task {name}: {one_line(error)}; run where the hub can be reached, or set HF_HOME to a cache that has the data"
        ) from None
    except Exception as error:
        raise ConfigError(f"--harness: task {name}: {one_line(error)}; mend the task or leave it out") from error
    return [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())


def _check(name: str, task: Any, room: Room) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(
            f"--harness: task {name} runs code that the model writes, which is not done here; leave it out"
        )
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"--harness: task {name} has pictures or sound, the model reads text only; leave it out")
    if task.OUTPUT_TYPE == "generate_until":
        try:
            read_decoding(task.get_config("generation_kwargs"), room)
        except (ConfigError, TypeError, ValueError) as error:
            raise ConfigError(f"--harness: task {name}: {one_line(error)}") from None


def _set_shots(name: str, task: Any, num_fewshot: int | None) -> None:
    """As lm-eval's own command: a task that says 0 means it."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own == 0 != num_fewshot:
        warn([f"--num-fewshot: task {name} stays at its own 0"])
    if own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot if num_fewshot is not None else own or 0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
