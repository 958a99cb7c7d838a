"""The tasks by name."""

from __future__ import annotations

from lime_dist.data.tasks.arithmetic import Arithmetic
from lime_dist.data.tasks.examples import Task
from lime_dist.data.tasks.prosqa import ProsQA
from lime_dist.errors import DataError

TASKS: dict[str, type[Task]] = {task.name: task for task in (Arithmetic, ProsQA)}


def task_named(name: str | None, *, key: str, prefix: str) -> Task:
    """The task whose examples the token file at `prefix` holds. Raises: DataError, which names `key`, where it is none's."""
    if name not in TASKS:
        raise DataError(f"{key}: {prefix} holds no examples of a task; make some with lime-dist data build-task")
    return TASKS[name]()
