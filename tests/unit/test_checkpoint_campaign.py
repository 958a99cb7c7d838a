"""Random damage and craft: a checkpoint either gives exactly what was saved, or ends in one line, soon.

In checkpoints of the first format, which have no checksums, what changes the values of tensors (their bytes, or which of
two equal shapes is whose) does not show, and is left out.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_stand_ins import all_tensors, sign, write_checkpoint, write_first_format

from lime_dist.errors import CheckpointError
from lime_dist.generate import load_model
from lime_dist.lime.values import gather_logical

SECONDS = 20.0  # a case takes a fiftieth of one
MEMORY_BYTES = 2**30  # beyond what the process has already
LONGEST_LINE = 1000

NESTED: list = []
for _ in range(400):
    NESTED = [NESTED]
VALUES = (
    None, True, False, 0, -1, 1, 3, 7, 10**6, 2**31, 2**63, 10**40, 0.5, -0.0, float("nan"), float("inf"), "", "x", "²", "7",
    "/etc/hostname", "../a", "a\n", "edges:/dev/zero", "x" * 100_000, [], [[]], NESTED, [0] * 1000, {}, {"a": 1}, {"0": [0]},
)  # fmt: skip
JSON_FILES = ("meta.json", "a.json", "b.json")
FILES = (*JSON_FILES, "a.safetensors", "b.safetensors")
HEADER_LENGTH_BYTES = 8


def nodes(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON tree."""
    items = list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ())
    return [(tree, key) for key, _ in items] + [node for _, child in items for node in nodes(child)]


def change_json(text: bytes, draw: random.Random) -> bytes:
    """One value replaced, removed, or told under another name."""
    tree = json.loads(text)
    container, key = draw.choice(nodes(tree))
    act = draw.choice(("replace", "replace", "remove", "rename", "whole"))
    if act == "whole":
        tree = draw.choice(VALUES)
    elif act == "rename" and isinstance(container, dict):
        container[draw.choice(("x", "../x", f"{key}0", str(key)[:-1], str(key).replace("0", "1", 1)))] = container.pop(
            key
        )
    elif act == "remove":
        del container[key]
    else:
        container[key] = draw.choice(VALUES)
    return json.dumps(tree).encode()


def mutate_json(folder: Path, draw: random.Random) -> str:
    path = folder / draw.choice(JSON_FILES)
    path.write_bytes(change_json(path.read_bytes(), draw))
    return "a value in JSON"


def mutate_config(folder: Path, draw: random.Random) -> str:
    path = folder / "meta.json"
    meta = json.loads(path.read_bytes())
    section = draw.choice(list(meta["config"]))
    changed = json.loads(change_json(json.dumps({section: meta["config"][section]}).encode(), draw))
    meta["config"] = meta["config"] | changed if isinstance(changed, dict) else changed
    path.write_text(json.dumps(meta))
    return "a value in the config"


def mutate_header(folder: Path, draw: random.Random) -> str:
    """Of a safetensors file, with its length kept true; sizes and places of tensors among what changes."""
    path = folder / draw.choice(FILES[3:])
    content = path.read_bytes()
    end = HEADER_LENGTH_BYTES + int.from_bytes(content[:HEADER_LENGTH_BYTES], "little")
    header = change_json(content[HEADER_LENGTH_BYTES:end], draw)
    path.write_bytes(len(header).to_bytes(HEADER_LENGTH_BYTES, "little") + header + content[end:])
    return "a value in a header"


def flip_bit(folder: Path, draw: random.Random) -> str:
    """Not in a tensor."""
    path = folder / draw.choice(FILES)
    content = path.read_bytes()
    is_json = path.suffix == ".json"
    return flip(
        path,
        draw,
        len(content) if is_json else HEADER_LENGTH_BYTES + int.from_bytes(content[:HEADER_LENGTH_BYTES], "little"),
    )


def flip_any_bit(folder: Path, draw: random.Random) -> str:
    path = folder / draw.choice(FILES)
    return flip(path, draw, path.stat().st_size)


def flip(path: Path, draw: random.Random, end: int) -> str:
    content = bytearray(path.read_bytes())
    content[draw.randrange(end)] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return "a bit"


def zero_bytes(folder: Path, draw: random.Random) -> str:
    """As a page that was never written."""
    path = folder / draw.choice(FILES)
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    length = min(draw.choice((8, 64, 512, 4096)), len(content) - start)
    content[start : start + length] = bytes(length)
    path.write_bytes(content)
    return "zeroes"


def swap_tensors(folder: Path, draw: random.Random) -> str:
    """The bytes of two tensors of one shape change places, by their names in the header."""
    path = folder / draw.choice(FILES[3:])
    content = path.read_bytes()
    end = HEADER_LENGTH_BYTES + int.from_bytes(content[:HEADER_LENGTH_BYTES], "little")
    header = json.loads(content[HEADER_LENGTH_BYTES:end])
    first = draw.choice(list(header))
    second = draw.choice([key for key in header if header[key]["shape"] == header[first]["shape"]])
    header[first], header[second] = header[second], header[first]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(HEADER_LENGTH_BYTES, "little") + text + content[end:])
    return "tensors that change places"


def craft(folder: Path, draw: random.Random) -> str:
    """A value in JSON, with all checksums but the tensors' made anew."""
    what = draw.choice((mutate_json, mutate_config))(folder, draw)
    try:
        sign(folder)
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
        pass  # what cannot be signed stays as it is
    return f"{what}, signed"


def cut_or_lengthen(folder: Path, draw: random.Random) -> str:
    path = folder / draw.choice(FILES)
    content = path.read_bytes()
    at = draw.randrange(len(content))
    path.write_bytes(draw.choice((content[:at], content + content[:at], bytes(at), b"[" * at, content[at:])))
    return "a length"


def put_in_place(folder: Path, draw: random.Random) -> str:
    """Something else than the file: no file, a link to the file itself elsewhere, a pipe, a device, a folder, a neighbour."""
    path = folder / draw.choice(FILES)
    elsewhere = folder.parent / f"elsewhere{path.suffix}"
    path.rename(elsewhere)
    other = folder / draw.choice([name for name in FILES if name != path.name])
    kinds: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "a link": lambda: path.symlink_to(elsewhere),
        "a link to nowhere": lambda: path.symlink_to(folder / "nowhere"),
        "a link to itself": lambda: path.symlink_to(path),
        "a device": lambda: path.symlink_to("/dev/zero"),
        "a pipe": lambda: os.mkfifo(path),
        "a folder": lambda: path.mkdir(),
        "a neighbour": lambda: shutil.copy(other, path),
    }
    kind = draw.choice(list(kinds))
    kinds[kind]()
    return kind


MUTATIONS = (
    mutate_json,
    mutate_json,
    mutate_config,
    mutate_config,
    mutate_header,
    flip_bit,
    cut_or_lengthen,
    put_in_place,
)
WRITERS = {
    write_first_format: MUTATIONS,
    write_checkpoint: (
        craft,
        craft,
        craft,
        mutate_header,
        flip_any_bit,
        flip_any_bit,
        zero_bytes,
        swap_tensors,
        *MUTATIONS[-2:],
    ),
}


def outcome(folder: Path, expected: dict[str, np.ndarray]) -> str:
    """In a process of its own: how reading ends."""
    opened: list[Path] = []
    sys.addaudithook(lambda event, args: _note_opened(opened, event, args[0] if args else None))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    opened.clear()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    try:
        found = all_tensors(folder)
        model, _ = load_model(folder, torch.device("cpu"))
        loaded = {
            f"weight:{name}": value.numpy() for name, value in gather_logical(model, lambda p: p.detach()).items()
        }
        pairs = [(key, value) for tensors in (found, loaded) for key, value in tensors.items()]
        right = found.keys() == expected.keys() and all(np.array_equal(value, expected[key]) for key, value in pairs)
        ending = "loaded" if right else "OTHER VALUES"
    except CheckpointError as error:
        line = str(error)
        ending = "refused" if "\n" not in line and len(line) < LONGEST_LINE else f"A LONG LINE of {len(line)}"
    except BaseException as error:
        ending = f"{type(error).__name__.upper()} {str(error)[:200]}"
    outside = [path for path in opened if path.parent != folder and path.suffix not in (".py", ".pyc", ".so")]
    return f"READ {outside[0]}" if outside else ending


def _note_opened(opened: list[Path], event: str, path: Any) -> None:
    if event == "open" and isinstance(path, (str, os.PathLike)):
        opened.append(Path(path))


def run_case(folder: Path, expected: dict[str, np.ndarray]) -> str:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=lambda: sender.send_bytes(outcome(folder, expected).encode()))
    process.start()
    sender.close()
    try:
        return receiver.recv_bytes().decode() if receiver.poll(SECONDS) else "HANGS"
    except EOFError:
        return "ENDED WITHOUT A WORD"
    finally:
        process.kill()
        process.join()


@pytest.mark.campaign
@pytest.mark.parametrize("write", WRITERS)
def test_damaged_and_crafted_checkpoints(
    write: Callable[[Path], dict[str, np.ndarray]], tmp_path: Path, num_cases: int, case_seed: int
) -> None:
    whole = tmp_path / "whole" / "step_000007"
    expected = write(whole)
    assert run_case(whole, expected) == "loaded"
    counts, wrong = Counter(), {}
    for case in range(num_cases):
        draw = random.Random(f"{case_seed}/{case}")
        folder = tmp_path / str(case) / whole.name
        shutil.copytree(whole, folder)
        what = draw.choice(WRITERS[write])(folder, draw)
        ending = run_case(folder, expected)
        counts[ending.split()[0]] += 1
        if ending not in ("loaded", "refused"):
            wrong[f"case {case} ({what})"] = ending
        else:
            shutil.rmtree(folder.parent)
    print(dict(counts))
    assert wrong == {}
    assert counts["refused"] > num_cases // 2
