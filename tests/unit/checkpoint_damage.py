"""Damage to a checkpoint's folder, by chance: each function does something to it and says what."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoint_stand_ins import sign

NESTED: list = []
for _ in range(400):
    NESTED = [NESTED]
VALUES = (
    None, True, False, 0, -1, 1, 3, 7, 10**6, 2**31, 2**63, 10**40, 0.5, -0.0, float("nan"), float("inf"), "", "x", "²", "7",
    "/etc/hostname", "../a", "a\n", "edges:/dev/zero", "x" * 100_000, [], [[]], NESTED, [0] * 1000, {}, {"a": 1}, {"0": [0]},
)  # fmt: skip
HEADER_LENGTH_BYTES = 8


def json_files(folder: Path) -> list[Path]:
    """Those that say what the tensors are."""
    return sorted(path for path in folder.glob("*.json") if path.name != "plan.json")


def tensor_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def files(folder: Path) -> list[Path]:
    return [*json_files(folder), *tensor_files(folder)]


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
    path = draw.choice(json_files(folder))
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
    path = draw.choice(tensor_files(folder))
    content = path.read_bytes()
    end = HEADER_LENGTH_BYTES + int.from_bytes(content[:HEADER_LENGTH_BYTES], "little")
    header = change_json(content[HEADER_LENGTH_BYTES:end], draw)
    path.write_bytes(len(header).to_bytes(HEADER_LENGTH_BYTES, "little") + header + content[end:])
    return "a value in a header"


def flip_bit(folder: Path, draw: random.Random) -> str:
    """Not in a tensor."""
    path = draw.choice(files(folder))
    content = path.read_bytes()
    is_json = path.suffix == ".json"
    return flip(
        path,
        draw,
        len(content) if is_json else HEADER_LENGTH_BYTES + int.from_bytes(content[:HEADER_LENGTH_BYTES], "little"),
    )


def flip_any_bit(folder: Path, draw: random.Random) -> str:
    path = draw.choice(files(folder))
    return flip(path, draw, path.stat().st_size)


def flip(path: Path, draw: random.Random, end: int) -> str:
    content = bytearray(path.read_bytes())
    content[draw.randrange(end)] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return "a bit"


def zero_bytes(folder: Path, draw: random.Random) -> str:
    """As a page that was never written."""
    path = draw.choice(files(folder))
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    length = min(draw.choice((8, 64, 512, 4096)), len(content) - start)
    content[start : start + length] = bytes(length)
    path.write_bytes(content)
    return "zeroes"


def swap_tensors(folder: Path, draw: random.Random) -> str:
    """The bytes of two tensors of one shape change places, by their names in the header."""
    path = draw.choice(tensor_files(folder))
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
    path = draw.choice(files(folder))
    content = path.read_bytes()
    at = draw.randrange(len(content))
    path.write_bytes(draw.choice((content[:at], content + content[:at], bytes(at), b"[" * at, content[at:])))
    return "a length"


def put_in_place(folder: Path, draw: random.Random) -> str:
    """Something else than the file: no file, a link to the file itself elsewhere, a pipe, a device, a folder, a neighbour."""
    path = draw.choice(files(folder))
    elsewhere = folder.parent / f"elsewhere{path.suffix}"
    path.rename(elsewhere)
    other = draw.choice(files(folder))
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
