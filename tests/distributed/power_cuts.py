"""What a power cut leaves of a folder.

A journal records, over all processes, each fsync and rename within the folder, and what processes saw there right before
it. From that, a disk knows at each moment what is sure: the content that a file had when it was flushed, under the names
that its folder had when that was flushed. All later changes are pending: each is there after a cut or not. A cut may
leave a rename but no half of one, and of bytes that were not flushed all, some, or zeros. A file that is removed and made
again between two events counts as written anew.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, Union

import pytest

Tree: TypeAlias = dict[str, Union["Tree", bytes]]  # a folder: by name, folders and the bytes of files


def read_tree(folder: Path) -> Tree:
    """What goes meanwhile is left out."""
    tree: Tree = {}
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):
            path = Path(entry.path)
            tree[entry.name] = read_tree(path) if entry.is_dir() else path.read_bytes()
    return tree


def write_tree(folder: Path, tree: Tree) -> None:
    folder.mkdir()
    for name, node in tree.items():
        if isinstance(node, bytes):
            (folder / name).write_bytes(node)
        else:
            write_tree(folder / name, node)


# ---- recording


@dataclass(frozen=True)
class Event:
    """Of `path`: an fsync, or a rename to `target`; both from the recorded folder. before: what processes saw there."""

    path: Path
    target: Path | None
    before: Tree


class Journal:
    """Patches what this process and its forks call from then on."""

    def __init__(self, recorded: Path, events: Path):
        self._recorded, self._events = recorded, events
        self._fsync, self._rename = os.fsync, os.rename
        events.mkdir()
        self._write(Path(), None)  # what was there before is sure

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "rename", self.rename)
        monkeypatch.setattr(os, "replace", self.rename)

    def fsync(self, descriptor: int) -> None:
        with self._recording(Path(os.readlink(f"/proc/self/fd/{descriptor}"))):
            self._fsync(descriptor)

    def rename(self, source: Any, target: Any, **more: Any) -> None:
        with self._recording(Path(source), Path(target)):
            self._rename(source, target, **more)

    def events(self) -> list[Event]:
        return [pickle.loads(path.read_bytes()) for path in sorted(self._events.iterdir())]

    @contextmanager
    def _recording(self, path: Path, target: Path | None = None) -> Iterator[None]:
        """One at a time over all processes."""
        if not path.is_relative_to(self._recorded):
            yield
            return
        with self._events.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._write(path.relative_to(self._recorded), target and target.relative_to(self._recorded))
            yield

    def _write(self, path: Path, target: Path | None) -> None:
        event = Event(path, target, read_tree(self._recorded))
        (self._events / f"{len(os.listdir(self._events)):06d}").write_bytes(pickle.dumps(event))


# ---- what is left


class File:
    def __init__(self) -> None:
        self._content = self._flushed = b""

    def see(self, content: bytes) -> None:
        self._content = content

    def flush(self) -> None:
        self._flushed = self._content

    def left(self, draw: random.Random, chance: float) -> bytes:
        if draw.random() >= chance:
            return self._flushed
        begin = self._flushed if self._content.startswith(self._flushed) else b""  # else it was written anew
        rest = self._content[len(begin) :]
        return begin + draw.choice((rest, rest[: draw.randint(0, len(rest))], bytes(len(rest))))


class Folder:
    def __init__(self) -> None:
        self.names: dict[str, Folder | File] = {}
        self._flushed: dict[str, Folder | File] = {}
        self._pending: list[dict[str, Folder | File | None]] = []  # each: names, and what they lead to from then on

    def see(self, tree: Tree) -> None:
        for name in self.names.keys() - tree.keys():
            self._remove(name)
        for name, seen in tree.items():
            if name not in self.names:
                self._change({name: File() if isinstance(seen, bytes) else Folder()})
            self.names[name].see(seen)

    def rename(self, source: str, target: str) -> None:
        self._change({target: self.names[source], source: None})

    def flush(self) -> None:
        self._flushed, self._pending = dict(self.names), []

    def flush_all(self) -> None:
        self.flush()
        for node in self.names.values():
            node.flush_all() if isinstance(node, Folder) else node.flush()

    def left(self, draw: random.Random, chance: float) -> Tree:
        names: dict[str, Folder | File | None] = dict(self._flushed)
        for change in self._pending:
            if draw.random() < chance:
                names |= change
        return {name: node.left(draw, chance) for name, node in names.items() if node is not None}

    def _remove(self, name: str) -> None:
        node = self.names[name]
        if isinstance(node, Folder):
            node.see({})
        self._change({name: None})

    def _change(self, change: dict[str, Folder | File | None]) -> None:
        self._pending.append(change)
        self.names = {name: node for name, node in (self.names | change).items() if node is not None}


class Disk:
    """The disk under the recorded folder, where all of `begun` is flushed."""

    def __init__(self, begun: Tree) -> None:
        self._root = Folder()
        self._root.see(begun)
        self._root.flush_all()

    def go_on(self, event: Event) -> None:
        self._root.see(event.before)
        if event.target is None:
            self._find(event.path).flush()
        else:
            assert event.path.parent == event.target.parent
            self._find(event.path.parent).rename(event.path.name, event.target.name)

    def left(self, draw: random.Random, chance: float) -> Tree:
        """By a cut now. chance: that a pending change is there."""
        return self._root.left(draw, chance)

    @property
    def sure(self) -> Tree:
        return self.left(random.Random(), 0.0)

    def _find(self, path: Path) -> Any:
        node: Any = self._root
        for name in path.parts:
            node = node.names[name]
        return node


def moments(journal: Journal) -> Iterator[tuple[Event, Disk]]:
    """The disk after each event."""
    begun, *events = journal.events()
    disk = Disk(begun.before)
    for event in events:
        disk.go_on(event)
        yield event, disk
