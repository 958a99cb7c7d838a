"""One cluster for all tests of this folder, and one folder of training data that its nodes share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster, why_not_here
from site_files import Site
from training import curve, write_training

from lime_dist.cli.command_line import main


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not_here():
        pytest.skip(reason)
    with Cluster.start(tmp_path_factory.mktemp("cluster"), Site(nodes=10, cpus=2)) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a user works in: run.yaml, token files, runs."""
    folder = tmp_path_factory.mktemp("desk")
    write_training(folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed(desk: Path) -> Callable[..., list[tuple[int, float]]]:
    """(step, loss) of a layout's run on local ranks, made once."""
    curves: dict[tuple[str, ...], list[tuple[int, float]]] = {}

    def curve_of(*overrides: str) -> list[tuple[int, float]]:
        if overrides not in curves:
            run_dir = desk / "undisturbed" / str(len(curves))
            before = Path.cwd()
            os.chdir(desk)
            try:
                assert main(["train", "run.yaml", *overrides, f"run.dir={run_dir}"]) == 0
            finally:
                os.chdir(before)
            curves[overrides] = curve(run_dir)
        return curves[overrides]

    return curve_of
