"""Every test may fork ranks: a child hangs in its first threaded CPU operation if the parent has run one."""

import os

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # megatron-core warns otherwise, once a layer and rank

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, default=50, help="cases of each campaign (-m campaign)")
    parser.addoption("--seed", type=int, default=0, help="of a campaign's random cases")


@pytest.fixture(scope="session")
def num_cases(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--cases")


@pytest.fixture(scope="session")
def case_seed(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--seed")
