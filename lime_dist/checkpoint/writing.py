"""Writing what ranks have staged, so that the checkpoint is whole or not there. Knows no rank and no device: ranks take
part by what they tell one another.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from lime_dist.checkpoint.checking import Meta, meta_text
from lime_dist.checkpoint.chunk_files import write_chunks
from lime_dist.checkpoint.full_disk import FullDisk, disk_problem, full_disk
from lime_dist.checkpoint.reader import (
    REPLACED,
    UNFINISHED,
    find_before,
    find_checkpoints,
    step_folder,
    step_of,
    take_back_replaced,
)
from lime_dist.checkpoint.safe_files import flush_to_disk, write_bytes
from lime_dist.checkpoint.staging import Staged, chunks_of
from lime_dist.config import RUN_PLAN
from lime_dist.errors import TrainingDiverged
from lime_dist.lifecycle.pulse import Pulse
from lime_dist.plan.record import plan_record
from lime_dist.plan.run_plan import RunPlan


class Agreement:
    """What one rank cannot do ends the work on all ranks. Collective: the end of each `with`, over all ranks."""

    def __init__(self, checkpoints: Path, gather: Callable[[Any], list[Any]], pulse: Pulse):
        self._checkpoints, self._gather, self._pulse = checkpoints, gather, pulse
        self.found: Any = None  # to tell the others
        self.told: list[Any] = []  # what each rank found

    def __enter__(self) -> Agreement:
        self.found = None
        self._pulse.beat("save")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._pulse.finish()
        problem = None
        if isinstance(error, TrainingDiverged):
            problem = {"diverged": str(error)}
        elif error is not None and (reason := disk_problem(error)) is not None:
            problem = {"disk": reason}
        elif error is not None:
            return
        told = self._gather([problem, self.found])
        problems = [problem for problem, _ in told if problem is not None]
        if problems:
            self._give_up(problems[0])
        self.told = [found for _, found in told]

    def _give_up(self, problem: dict[str, str]) -> NoReturn:
        if "diverged" in problem:
            raise TrainingDiverged(problem["diverged"]) from None
        raise full_disk(f"checkpoint {self._checkpoints}", problem["disk"], self._checkpoints) from None


@dataclass(frozen=True, kw_only=True)
class Unwritten:
    """One rank's part in a checkpoint.

    stem: of its files. meta: but for the files. check_owner: on the first rank, which writes what is written once; raises
    where another start has the run.
    """

    checkpoints: Path
    stem: str
    staged: list[Staged]
    meta: Meta
    run_plan: RunPlan
    is_first: bool
    check_owner: Callable[[], None]

    @property
    def final(self) -> Path:
        return step_folder(self.checkpoints, self.meta.step)

    @property
    def folder(self) -> Path:
        """Its name until it is whole."""
        return self.final.with_name(f"{UNFINISHED}{self.final.name}")


def write_checkpoint(part: Unwritten, agreement: Agreement) -> Path:
    """Returns the whole checkpoint. Raises: FullDisk, on all ranks, and the checkpoints that are there stay."""
    try:
        with agreement:
            if part.is_first:
                _make_room(part.folder)
        with agreement:
            agreement.found = _write(part)
        files = dict(filter(None, agreement.told))
        with agreement:
            if part.is_first:
                _finish(part, files)
    except FullDisk:
        if part.is_first:
            shutil.rmtree(part.folder, ignore_errors=True)
            take_back_replaced(part.checkpoints)
        raise
    return part.final


def _make_room(folder: Path) -> None:
    """Remove what an interrupted save left, and nothing else; then make the folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    take_back_replaced(folder.parent)
    for left_behind in (*folder.parent.glob(f"{UNFINISHED}*step_*"), *folder.parent.glob(f"{REPLACED}step_*")):
        _delete(left_behind)
    folder.mkdir()


def _write(part: Unwritten) -> tuple[str, str] | None:
    """The stem of what this rank has, and its index's checksum; None where it has nothing."""
    return (part.stem, write_chunks(part.folder, part.stem, dict(chunks_of(part.staged)))) if part.staged else None


def _finish(part: Unwritten, files: dict[str, str | None]) -> None:
    write_bytes(part.folder / RUN_PLAN, json.dumps(plan_record(part.run_plan)).encode())
    write_bytes(part.folder / "meta.json", meta_text(asdict(replace(part.meta, files=files))))
    flush_to_disk(part.folder)
    part.check_owner()
    _rename(part.folder, part.final)
    _remove_old_ones(part)


def _rename(folder: Path, final: Path) -> None:
    """One of the same step keeps a name from which a start would take it back, until this one has its own."""
    replaced = final.with_name(f"{REPLACED}{final.name}")
    if os.path.lexists(final):
        os.rename(final, replaced)
    os.rename(folder, final)
    flush_to_disk(final.parent)
    if os.path.lexists(replaced):
        _delete(replaced)


def _remove_old_ones(part: Unwritten) -> None:
    """All but the last `keep`, those of every `keep_every`-th step, and what a next bad step would lead back to."""
    settings, bad_steps = part.run_plan.config.checkpoint, part.meta.spikes.bad_steps
    needed = find_before(part.checkpoints, bad_steps[0]) if bad_steps else None
    for old in find_checkpoints(part.checkpoints)[: -settings.keep]:
        stays = settings.keep_every > 0 and step_of(old) % settings.keep_every == 0
        if old != needed and not stays:
            _remove(old)


def _remove(folder: Path) -> None:
    """Under a name that is no checkpoint's first, so that none is ever half there."""
    leaving = folder.with_name(f"{UNFINISHED}old-{folder.name}")
    os.rename(folder, leaving)
    _delete(leaving)


def _delete(path: Path) -> None:
    """A link goes, and what it leads to stays."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)
