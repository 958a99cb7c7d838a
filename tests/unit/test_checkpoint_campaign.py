"""Random damage and craft: a checkpoint either gives exactly what was saved, or ends in one line, soon.

In checkpoints of the first format, which have no checksums, what changes the values of tensors (their bytes, or which of
two equal shapes is whose) does not show, and is left out.
"""

from __future__ import annotations

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
from checkpoint_damage import (
    craft,
    cut_or_lengthen,
    flip_any_bit,
    flip_bit,
    mutate_config,
    mutate_header,
    mutate_json,
    put_in_place,
    swap_tensors,
    zero_bytes,
)
from checkpoint_stand_ins import all_tensors, write_checkpoint, write_first_format

from lime_dist.errors import CheckpointError
from lime_dist.generate import load_model
from lime_dist.lime.values import gather_logical

SECONDS = 20.0  # a case takes a fiftieth of one
MEMORY_BYTES = 2**30  # beyond what the process has already
LONGEST_LINE = 1000

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
