"""The flight recorder: switched on before there are groups, and written where the watchdog says. Here over gloo."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lime_dist.lifecycle.collective_trace import record_collectives, write_collectives
from lime_dist.lifecycle.local import free_port, run_local

NAMES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT", "TORCH_FR_DUMP_TEMP_FILE")


def test_what_is_wanted_of_the_recorder() -> None:
    environment: dict[str, str] = {}
    record_collectives(Path("/run/collectives"), environment)
    assert tuple(environment) == NAMES
    assert environment["TORCH_FR_DUMP_TEMP_FILE"] == "/run/collectives/nccl_rank_"  # torch appends the rank


@pytest.mark.parametrize("name", [*NAMES, "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"])
def test_the_users_own_stays(name: str) -> None:
    """torch takes the newer of two names first."""
    environment = {name: "mine"}
    record_collectives(Path("/run/collectives"), environment)
    assert environment[name] == "mine" and len(environment) == len(NAMES)


def test_it_is_wanted_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    record_collectives(Path("/run/collectives"))
    assert all(os.environ[name] for name in NAMES)


def test_without_groups_there_is_nothing_to_write(tmp_path: Path) -> None:
    assert write_collectives(tmp_path, 0, patience=30) is None
    assert list(tmp_path.iterdir()) == []


def sum_and_write(port: int, folder: Path) -> Path | None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    for _ in range(3):
        dist.all_reduce(torch.ones(5))
    return write_collectives(folder, 0, patience=30)


def test_operations_are_written(tmp_path: Path) -> None:
    (path,) = run_local(sum_and_write, 1, free_port(), tmp_path / "collectives")
    assert path == tmp_path / "collectives" / "rank_00000.json"
    entries = json.loads(path.read_text())["entries"]
    assert [(entry["profiling_name"], entry["input_sizes"]) for entry in entries] == [("gloo:all_reduce", [[5]])] * 3


def test_a_folder_that_cannot_be_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "collectives").touch()
    assert run_local(sum_and_write, 1, free_port(), tmp_path / "collectives") == [None]
