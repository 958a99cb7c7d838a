"""`lime-dist logs`: a rank's output in a run's newest start or another, followed into the next one. Changes nothing. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lime_dist.cluster.history import read_history
from lime_dist.cluster.run_folder import find_config
from lime_dist.cluster.starts import last_job
from lime_dist.errors import ConfigError

_NAME = re.compile(r"(?P<job>\d+)\.(?P<restart>\d+)\.(?P<kind>rank|node)_(?P<index>\d+)\.log")
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, order=True)
class LogFile:
    """The output of one rank (launcher srun) or of one node's ranks (torchrun) in one start."""

    job: int
    restart: int
    kind: str  # rank | node
    index: int
    path: Path


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a user asks for; None: the newest."""

    rank: int = 0
    job: int | None = None
    restart: int | None = None
    script: bool = False  # the job script's own log


@dataclass(frozen=True)
class Source:
    """A file, and what of it is wanted."""

    path: Path
    prefix: bytes = b""  # of the rank's lines, in a file that several share; it is not shown


class RunLogs:
    """The logs of one run on SLURM."""

    def __init__(self, run_dir: Path):
        """Raises: ConfigError where there is no run, or one that SLURM did not start."""
        self._run_dir, self._folder = run_dir, run_dir / "slurm" / "logs"
        self._world_size = find_config(run_dir).layout.world_size
        if not (run_dir / "slurm").is_dir():
            raise ConfigError(
                f"RUN: {run_dir} was not started on SLURM, so it has no logs; see where its command printed"
            )

    def find(self, wanted: Wanted) -> Source | None:
        """None while no start that is wanted has written anything. Raises: ConfigError for a rank that there is not."""
        if not 0 <= wanted.rank < self._world_size:
            raise ConfigError(f"--rank: no rank {wanted.rank}; the run has ranks 0 to {self._world_size - 1}")
        if wanted.script:
            path = self._folder / f"{wanted.job if wanted.job is not None else self._last_job()}.out"
            return Source(path) if path.is_file() else None
        files = _newest_start([file for file in _list_logs(self._folder) if _fits(file, wanted)])
        return _source_of(files, wanted.rank, self._world_size)

    def explain_nothing(self, wanted: Wanted) -> str:
        """Why `find` finds none, and what there is, on one line."""
        if self._last_job() is None:
            return f"RUN: no job of {self._run_dir} was ever submitted; do so with `lime-dist submit`"
        if wanted.job is None and wanted.restart is None:
            return (
                f"RUN: job {self._last_job()} has no log yet; see `lime-dist status {self._run_dir}`, or wait with -f"
            )
        known = sorted({(file.job, file.restart) for file in _list_logs(self._folder)})
        listed = ", ".join(f"--job {job} --restart {restart}" for job, restart in known) or "none yet"
        return f"--job, --restart: no log of that start; there are: {listed}"

    def _last_job(self) -> str | None:
        return last_job(read_history(self._run_dir / "slurm" / "history.tsv"))


def _list_logs(folder: Path) -> list[LogFile]:
    matches = ((path, _NAME.fullmatch(path.name)) for path in folder.glob("*.log"))
    return sorted(
        LogFile(int(name["job"]), int(name["restart"]), name["kind"], int(name["index"]), path)
        for path, name in matches
        if name
    )


def _fits(file: LogFile, wanted: Wanted) -> bool:
    return wanted.job in (None, file.job) and wanted.restart in (None, file.restart)


def _newest_start(files: list[LogFile]) -> list[LogFile]:
    """All files of the start of the last one."""
    return [file for file in files if (file.job, file.restart) == (files[-1].job, files[-1].restart)]


def _source_of(files: list[LogFile], rank: int, world_size: int) -> Source | None:
    """The rank's own file, or that of its node, where ranks are in order and as many on each."""
    if any(file.kind == "rank" for file in files):
        return next((Source(file.path) for file in files if file.index == rank), None)
    node = rank * len(files) // world_size
    return next((Source(file.path, f"[rank {rank}] ".encode()) for file in files if file.index == node), None)


# ---- showing


def copy(source: Source) -> Iterator[bytes]:
    """The rank's output, in pieces."""
    with source.path.open("rb") as file:
        yield from _Reader(file, source.prefix).read_on()


def follow(find: Callable[[], Source | None], pause: Callable[[], None]) -> Iterator[bytes]:
    """What `find` gives, and what comes to it; when it gives another file, the rest of the one, then the other. Has no end.

    pause: is called between looks.
    """
    while (source := find()) is None:
        pause()
    while True:
        with source.path.open("rb") as file:
            reader, following = _Reader(file, source.prefix), source
            while following == source:
                following = find() or source  # looked for first: what the old file still gets is read after
                yield from reader.read_on()
                if following == source:
                    pause()
        source = following


class _Reader:
    """Reads on from where it was; of a shared file only whole lines, as a part could be anyone's."""

    def __init__(self, file: BinaryIO, prefix: bytes):
        self._file, self._prefix, self._rest = file, prefix, b""

    def read_on(self) -> Iterator[bytes]:
        while piece := self._file.read(_CHUNK_BYTES):
            yield self._own_lines(piece) if self._prefix else piece

    def _own_lines(self, piece: bytes) -> bytes:
        *lines, self._rest = (self._rest + piece).split(b"\n")
        return b"".join(line.removeprefix(self._prefix) + b"\n" for line in lines if line.startswith(self._prefix))
