"""What is wrong with a host, from facts; and the facts that a host can be asked for here."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from lime_dist.config import Config, parse_config
from lime_dist.preflight.host import Gpu, Host, HostFacts, blame_missing, find_leftovers, is_training, judge, read_facts

GIB = 2**30
FACTS = HostFacts(
    memory_available=64 * GIB,
    leftovers=(),
    file_bytes=(("a.bin", 100), ("a.idx", 10)),
    versions=(("torch", "2.13.0"), ("lime_dist", "0.1.0")),
)
GPUS = tuple(Gpu(uuid=f"GPU-{index}", free_bytes=79 * GIB, total_bytes=80 * GIB) for index in range(2))
GOOD = Host(name="n1", ranks=(0, 1), facts=FACTS, gpus=GPUS)


def config(device: str = "auto") -> Config:
    model = {"num_layers": 2, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "vocab_size": 8}
    return parse_config({"model": model, "run": {"device": device}})


def judged(bad: Host, device: str = "auto", others: int = 2) -> list[str]:
    """`bad` as the last host, after good ones, which stay good."""
    hosts = [*[replace(GOOD, name=f"good{index}") for index in range(others)], bad]
    assert [judge(host, hosts, config(device)) for host in hosts[:-1]] == [[]] * others
    return judge(bad, hosts, config(device))


def with_facts(**changes: Any) -> Host:
    return replace(GOOD, facts=replace(FACTS, **changes))


def test_a_good_host() -> None:
    assert judged(GOOD) == judged(GOOD, "cuda") == []


BAD = [
    (replace(GOOD, gpus=GPUS[:1]), "1 GPUs for 2 ranks"),
    (replace(GOOD, gpus=()), "0 GPUs for 2 ranks"),  # a driver that fails on one host, where run.device is auto
    (replace(GOOD, gpus=(GPUS[0], GPUS[0])), "1 GPUs for 2 ranks"),  # two ranks were given the same
    (
        replace(GOOD, gpus=(GPUS[0], replace(GPUS[1], free_bytes=71 * GIB))),
        "GPU GPU-1 has 71 GiB of 80 GiB free; end what holds the rest",
    ),
    (with_facts(memory_available=GIB), "1 GiB of host memory for 2 ranks, 2 GiB needed"),
    (with_facts(leftovers=("pid 7: python lime-dist train",)), "a training is left over there (pid 7: python lime-dist train)"),
    (with_facts(file_bytes=(("a.bin", 99), ("a.idx", 10))), "a.bin has 99 bytes there, 100 elsewhere"),
    (with_facts(file_bytes=(("a.bin", 100), ("a.idx", None))), "a.idx cannot be read there"),
    (with_facts(versions=(("torch", "2.12.0"), FACTS.versions[1])), "torch 2.12.0 is installed there, 2.13.0 elsewhere"),
    (replace(GOOD, clock=(3.0, 0.5)), "its clock is 3.0 s ahead"),
    (replace(GOOD, clock=(-9.0, 0.5)), "its clock is 9.0 s behind"),
    (replace(GOOD, problems=("run.dir x is not writable there (y)",)), "run.dir x is not writable there (y)"),
    (replace(GOOD, facts=None), "its local rank 0 did not speak for it"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "problem"), BAD)
def test_a_bad_host(bad: Host, problem: str) -> None:
    assert judged(bad) == [problem]


def test_of_two_hosts_rank_0s_counts() -> None:
    assert judged(with_facts(file_bytes=(("a.bin", 99), ("a.idx", 10))), others=1) != []
    assert judged(replace(GOOD, clock=(3.0, 0.0)), others=1) == ["its clock is 3.0 s ahead"]


def test_rank_0s_host_may_be_the_bad_one() -> None:
    """Else every other host would be left out."""
    hosts = [with_facts(file_bytes=(("a.bin", 99), ("a.idx", 10))), *[replace(GOOD, clock=(8.0, 0.1))] * 3]
    assert judge(hosts[0], hosts, config()) == [
        "a.bin has 99 bytes there, 100 elsewhere",
        "its clock is 8.0 s behind",
    ]
    assert [judge(host, hosts, config()) for host in hosts[1:]] == [[], [], []]


def test_a_slow_answer_is_no_wrong_clock() -> None:
    assert judged(replace(GOOD, clock=(2.4, 0.5))) == []


def test_gpus_do_not_count_on_the_cpu() -> None:
    assert judge(replace(GOOD, gpus=()), [GOOD], config("cpu")) == []
    assert judge(replace(GOOD, gpus=()), [replace(GOOD, gpus=())], config("auto")) == []
    assert judge(replace(GOOD, gpus=()), [replace(GOOD, gpus=())], config("cuda")) == ["0 GPUs for 2 ranks"]


# ---- who did not come

PLANNED = dict(enumerate(["n1", "n1", "n2", "n2", "n3", "n3"]))


def test_missing_ranks_are_named_by_host() -> None:
    came = {0: "n1", 1: "n1", 2: "n2"}
    assert blame_missing(PLANNED, came, 9) == {
        "n2": "rank 3 did not arrive within 9 s",
        "n3": "ranks 4-5 did not arrive within 9 s",
    }
    assert blame_missing(PLANNED, {rank: host for rank, host in PLANNED.items()}, 9) == {}


def test_missing_ranks_of_unknown_hosts() -> None:
    assert blame_missing(dict.fromkeys(range(4), ""), {0: "a", 2: "b"}, 9) == {
        "": "ranks 1, 3 did not arrive within 9 s"
    }


def test_when_nobody_else_came_it_is_rank_0s_host() -> None:
    assert blame_missing(PLANNED, {0: "n1", 1: "n1"}, 9) == {"n1": "none of the 2 other hosts reached it within 9 s"}
    two = dict(enumerate(["n1", "n2"]))
    assert blame_missing(two, {0: "n1"}, 9) == {"n2": "rank 1 did not arrive within 9 s"}


# ---- facts

COMMANDS = [
    ("/env/bin/python3 /env/bin/lime-dist train run.yaml", True),
    ("python -m lime_dist.cli train run.yaml", True),
    ("python -m lime_dist train run.yaml", True),
    ("python /env/lib/lime_dist/__main__.py train run.yaml", True),
    ("python /env/bin/torchrun --nnodes 2 /env/bin/lime-dist train run.yaml", True),
    ("python /env/bin/lime-dist preflight run.yaml", False),
    ("python /env/bin/lime-dist plan train", False),
    ("srun lime-dist train run.yaml", False),
    ("vi lime-dist train", False),
    ("", False),
]


@pytest.mark.parametrize(("command", "answer"), COMMANDS)
def test_what_is_a_training(command: str, answer: bool) -> None:
    assert is_training(command.split()) is answer


PRETENDS = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", "lime-dist", "train", "run.yaml"]


@pytest.mark.parametrize("job", [{"SLURM_JOB_ID": "17"}, {}])
def test_a_training_whose_launcher_has_gone(job: dict[str, str]) -> None:
    """What SLURM started and slurmstepd no longer watches is left over; what a person has just started is not."""
    environment = {key: value for key, value in os.environ.items() if key != "SLURM_JOB_ID"} | job
    with subprocess.Popen(PRETENDS, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        found = [text for text in find_leftovers() if text.startswith(f"pid {process.pid}: ")]
        process.stdin.close()
    assert len(found) == len(job)
    assert all(text.endswith("lime-dist train run.yaml") for text in found)


def test_facts_of_this_host(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"12345")
    here = config()
    here = parse_config(
        {"model": {**vars(here.model)}, "data": {"train": str(tmp_path / "a")}, "run": {"device": "cpu"}}
    )
    facts = read_facts(here)
    assert dict(facts.file_bytes) == {str(tmp_path / "a.bin"): 5, str(tmp_path / "a.idx"): None}
    assert 0 < facts.memory_available <= psutil.virtual_memory().total
    assert dict(facts.versions)["torch"].startswith("2.")
