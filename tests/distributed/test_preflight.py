"""`lime-dist preflight` on three ranks, each as if on a host of its own: good ones pass, a bad one is named.

Ranks are forked, with the environment that srun and a job script set. All are on this machine, so what a host
of its own would change is changed for one rank: its folder, its limits, its clock.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
from ast import literal_eval
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from torch.distributed import TCPStore

from lime_dist.cli.command_line import main
from lime_dist.data.indexed import IndexedWriter
from lime_dist.lifecycle.launcher import SECRET_VARIABLE
from lime_dist.lifecycle.local import free_port
from lime_dist.preflight import checks, host  # slow imports: once, before ranks are forked
from lime_dist.preflight.fabric import MIN_MESSAGE_BYTES, Crossing, repetitions
from lime_dist.preflight.host import Arrival
from lime_dist.preflight.signed_json import MAX_BYTES, pack

CONFIG = {
    "model": {
        "num_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 96,
    },
    "parallel": {"pp": 3},
    "pipeline": {"num_microbatches": 3},
    "data": {"train": "train", "seq_length": 12, "global_batch_size": 12},
    "run": {"dir": "run", "device": "cpu", "steps": 5},
}  # fmt: skip
NUM_RANKS = 3
LONG, SHORT = "100", "4"  # seconds: for what must come, and for what will not


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of all hosts: tokens and the config."""
    write_tokens(tmp_path / "train", 40)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def leftovers_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What others have left on this machine before the test is no fault of its hosts."""
    find, before = host.find_leftovers, host.find_leftovers()
    monkeypatch.setattr(host, "find_leftovers", lambda: [text for text in find() if text not in before])


def write_tokens(prefix: Path, count: int) -> None:
    with IndexedWriter(prefix, vocab_size=96) as writer:
        writer.add_document(np.arange(count) % 96)
        writer.commit({"vocab_size": 96, "tokens": count})


@dataclass(frozen=True)
class Ended:
    code: int
    output: str
    errors: str

    @property
    def last_line(self) -> str:
        return self.errors.splitlines()[-1]


Change = Callable[[], object]


def launch(
    *arguments: str,
    changes: dict[int, Change] | None = None,
    ranks: tuple[int, ...] = (0, 1, 2),
    kill_on_bad_exit: bool = True,
) -> list[Ended]:
    """`lime-dist preflight run.yaml ARGUMENTS` as srun starts it on n1 to n3; `changes`: what a rank does before."""
    context, port = multiprocessing.get_context("fork"), free_port()
    processes = []
    for rank in ranks:
        command = ["preflight", "run.yaml", *arguments]
        process = context.Process(target=as_task, args=(rank, port, command, (changes or {}).get(rank)))
        process.start()
        processes.append(process)
    while running := [process.sentinel for process in processes if process.is_alive()]:
        wait(running)
        if kill_on_bad_exit and any(process.exitcode for process in processes):
            for process in processes:
                process.terminate()
    return [Ended(process.exitcode, *outputs(rank)) for rank, process in zip(ranks, processes)]


def as_task(rank: int, port: int, command: list[str], change: Change | None) -> None:
    for descriptor, path in zip((1, 2), output_paths(rank)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ |= {
        "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURM_NTASKS": str(NUM_RANKS), "SLURM_STEP_ID": "0",
        "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-3]", "SLURM_STEP_TASKS_PER_NODE": "1(x3)",
        "SLURMD_NODENAME": f"n{rank + 1}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    if change is not None:
        change()
    code = main(command)
    sys.stderr.flush()
    os._exit(code)


def output_paths(rank: int) -> tuple[Path, Path]:
    folder = Path(os.environ["PYTEST_OUTPUT_FOLDER"])
    return folder / f"{rank}.out", folder / f"{rank}.err"


def outputs(rank: int) -> tuple[str, str]:
    output, errors = output_paths(rank)
    return output.read_text(), errors.read_text()


@pytest.fixture(autouse=True)
def output_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_OUTPUT_FOLDER", str(tmp_path_factory.mktemp("output")))


def assert_bad(ended: list[Ended], host: str, problem: str) -> None:
    """All ranks left with 1, rank 0's last line names the host and the problem, and the file has the host."""
    assert [task.code for task in ended] == [1] * len(ended), ended
    assert ended[0].last_line.startswith(f"lime-dist: host {host} is bad: {problem}"), ended[0]
    assert Path("exclude").read_text() == f"{host}\n"


def bad(*arguments: str, seconds: str = LONG, **options) -> list[Ended]:
    return launch("--exclude-file", "exclude", "--timeout", seconds, *arguments, **options)


# ---- good


def test_good_hosts_pass_and_each_boundary_is_measured(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text('{"step": 1, "step_seconds": 0.25}\n')
    for path in folder.glob("train.*"):
        path.unlink()
    write_tokens(folder / "train", 3001)
    ended = bad("--json", "data.seq_length=3000", "data.global_batch_size=12")
    assert [task.code for task in ended] == [0, 0, 0], ended
    assert [task.output for task in ended[1:]] == ["", ""]
    report = json.loads(ended[0].output.splitlines()[-1])
    assert report["passed"] and report["bad"] == {}
    assert [(place["host"], place["pp"]) for place in report["ranks"]] == [("n1", 0), ("n2", 1), ("n3", 2)]
    plan = json.loads(plan_output("data.seq_length=3000"))
    for boundary, planned in zip(report["boundaries"], plan["hops"], strict=True):
        size = max(MIN_MESSAGE_BYTES, planned["bundle_bytes"])
        assert size > MIN_MESSAGE_BYTES  # the plan's own size is what is sent
        assert boundary["message_bytes"] == size and boundary["bytes_sent"] == 2 * repetitions(size) * size
        assert boundary["bytes_per_step"] == planned["bytes_per_step"]
        assert boundary["forward"]["min"] > 0 and boundary["backward"]["median"] > 0
        assert boundary["share_of_step"] == pytest.approx(boundary["seconds_per_step"] / 0.25)
    assert report["all_reduce_seconds"] > 0
    assert [path.name for path in (folder / "run").iterdir()] == ["metrics.jsonl"]  # nothing is left behind
    assert not Path("exclude").exists()


def plan_output(*overrides: str) -> str:
    command = [sys.executable, "-m", "lime_dist.cli", "plan", "run.yaml", "--json", *overrides]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_started_alone_it_starts_its_ranks(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["preflight", "run.yaml", "parallel.tp=2", "parallel.pp=2"]) == 0
    first = capfd.readouterr().out.splitlines()[0]
    assert first.endswith(": ranks 0-3, stages 0-1, tensor ranks 0-1")


# ---- bad hosts


def test_a_folder_that_is_not_shared() -> None:
    Path("elsewhere").mkdir()
    ended = bad("run.dir=run", changes={2: lambda: in_folder_of_its_own("elsewhere")})
    assert_bad(ended, "n3", "run.dir run is not the shared folder there")


def in_folder_of_its_own(path: str) -> None:
    """This rank's host has the data and the config, but another folder under the same name."""
    for file in (*Path().glob("train.*"), Path("run.yaml")):
        shutil.copy(file, path)
    os.chdir(path)


def test_a_folder_that_cannot_be_written() -> None:
    ended = bad(changes={1: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))})
    assert_bad(ended, "n2", "run.dir run is not writable there (File too large)")
    assert list(Path("run").iterdir()) == []


def test_a_folder_that_rank_0_cannot_write() -> None:
    assert_bad(bad("run.dir=/proc/run"), "n1", "run.dir /proc/run is not writable there (")


def test_tokens_of_another_size() -> None:
    def with_more_tokens() -> None:
        in_folder_of_its_own("elsewhere")
        write_tokens(Path("more"), 41)
        for suffix in ("bin", "idx", "meta.json"):
            os.replace(f"more.{suffix}", f"train.{suffix}")

    Path("elsewhere").mkdir()
    run_dir = f"run.dir={Path('run').absolute()}"
    assert_bad(bad(run_dir, changes={1: with_more_tokens}), "n2", "train.bin has 82 bytes there, 80 elsewhere")


def test_a_host_that_lacks_the_tokens() -> None:
    def without_tokens() -> None:
        in_folder_of_its_own("elsewhere")
        Path("train.bin").unlink()

    Path("elsewhere").mkdir()
    assert_bad(bad(changes={0: lambda: None, 2: without_tokens}), "n3", "data.train: train.bin does not exist")


def test_a_host_that_lacks_the_config() -> None:
    Path("elsewhere").mkdir()
    ended = bad(changes={1: lambda: os.chdir("elsewhere")})
    assert_bad(ended, "n2", "config run.yaml: No such file or directory")


def test_rank_0s_host_that_lacks_the_config() -> None:
    """The others have it, so it is the host's fault and not the user's."""
    Path("elsewhere").mkdir()
    ended = bad("--exclude-file", str(Path("exclude").absolute()), changes={0: lambda: os.chdir("elsewhere")})
    assert_bad(ended, "n1", "config run.yaml: No such file or directory")


def test_a_clock_that_is_wrong() -> None:
    def ahead() -> None:
        true_time = time.time
        time.time = lambda: true_time() + 10

    ended = bad(changes={2: ahead})
    assert_bad(ended, "n3", "its clock is 10.0 s ahead")


def test_a_training_that_is_left_over() -> None:
    pretends = [sys.executable, "-c", "import sys; sys.stdin.read()", "lime-dist", "train", "old.yaml"]
    environment = os.environ | {"SLURM_JOB_ID": "6"}
    with subprocess.Popen(pretends, env=environment, stdin=subprocess.PIPE) as process:
        ended = bad()
        process.stdin.close()
    assert [task.code for task in ended] == [1, 1, 1]
    lines = [line for line in ended[0].errors.splitlines() if f"(pid {process.pid}: " in line]
    assert [line.split(" is bad: ")[0] for line in lines] == [f"lime-dist: host n{index}" for index in (1, 2, 3)]
    assert Path("exclude").read_text() == "n1\nn2\nn3\n"  # they are one machine here


def test_a_rank_that_never_arrives() -> None:
    assert_bad(bad(seconds=SHORT, ranks=(0, 1)), "n3", f"rank 2 did not arrive within {SHORT} s")


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ({"MASTER_ADDR": "no-such-host.invalid"}, "no-such-host.invalid:"),
        ({"MASTER_PORT": "1"}, "127.0.0.1:1 (Connection refused)"),
    ],
)
def test_a_host_that_cannot_reach_rank_0(address: dict[str, str], problem: str) -> None:
    """It says so itself and waits, so that rank 0 names it too before the launcher ends all."""
    ended = bad(seconds=SHORT, changes={1: lambda: os.environ.update(address)})
    assert_bad(ended, "n2", f"rank 1 did not arrive within {SHORT} s")
    assert ended[1].last_line.startswith(
        f"lime-dist: host n2 is bad: it cannot reach MASTER_ADDR:MASTER_PORT {problem}"
    )


def test_without_rank_0_the_others_say_so() -> None:
    ended = launch("--timeout", "1", ranks=(1, 2), kill_on_bad_exit=False)
    assert [task.code for task in ended] == [1, 1]
    assert "n2 is bad: it cannot reach MASTER_ADDR:MASTER_PORT 127.0.0.1:" in ended[0].last_line


def test_when_rank_0_dies_the_others_blame_no_host() -> None:
    def dies_when_judging() -> None:
        checks._judge_hosts = lambda *_: os._exit(9)

    ended = bad(changes={0: dies_when_judging}, kill_on_bad_exit=False)
    assert [task.code for task in ended] == [9, 1, 1]
    assert ended[2].last_line == "lime-dist: host n3, rank 2: rank 0 has ended, or said nothing for 300 s"


# ---- who else reaches the store


class Harm:
    """What unpickles it makes a file."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (Path("canary"),)


SECRET = "a secret of the job"
FORGED = {
    "a pickle": pickle.dumps(Harm()),
    "unsigned": pack("arrival/1", Arrival(host="n2", local_rank=0), None),
    "with another secret": pack("arrival/1", Arrival(host="n2", local_rank=0), b"another"),
    "too long": " " * (MAX_BYTES + 1),
}


def write(key: str, value: str | bytes) -> None:
    """As a process that is no rank of the job and knows where its ranks meet, and nothing else."""
    store = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
    store.set(f"preflight/{key}", value)
    os._exit(0)


@pytest.mark.parametrize("value", FORGED.values(), ids=FORGED)
def test_what_stands_in_a_ranks_name_is_refused_unless_signed(
    value: str | bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    ended = bad(changes={1: lambda: write("arrival/1", value)})
    assert ended[0].last_line.startswith("lime-dist: host n1, rank 0: what stands in rank 1's name under arrival/1 ")
    assert ended[0].last_line.endswith("; it is refused") and "Traceback" not in ended[0].errors
    assert ended[0].code == 1 and ended[2].code != 0
    assert not Path("canary").exists() and not Path("exclude").exists()


@pytest.mark.parametrize("has_secret", [True, False])
def test_what_stands_in_rank_0s_name_is_refused(has_secret: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a secret whatever has the right shape is taken, but nothing else."""
    monkeypatch.setenv(SECRET_VARIABLE, SECRET if has_secret else "")
    ended = bad(changes={1: lambda: write("folder", '"../elsewhere"')})
    problem = "is not signed with this job's secret" if has_secret else "has a str where int"
    assert f"rank 2: what stands in rank 0's name under folder {problem}" in ended[2].last_line
    assert ended[2].code == 1 and "Traceback" not in ended[2].errors


def test_all_listen_on_the_meeting_places_address_alone() -> None:
    def note_listeners() -> None:
        measure = checks.time_crossings

        def measure_and_note(*arguments: Any) -> list[Crossing]:
            connections = psutil.Process().net_connections("inet")
            found = [tuple(one.laddr) for one in connections if one.status == psutil.CONN_LISTEN]
            is_store = [port == int(os.environ["MASTER_PORT"]) for _, port in found]
            Path(f"listening.{os.environ['SLURM_PROCID']}").write_text(f"{sum(is_store)} {[host for host, _ in found]}")
            return measure(*arguments)

        checks.time_crossings = measure_and_note

    assert [task.code for task in launch(changes=dict.fromkeys(range(NUM_RANKS), note_listeners))] == [0, 0, 0]
    for rank in range(NUM_RANKS):
        num_stores, addresses = Path(f"listening.{rank}").read_text().split(maxsplit=1)
        assert (int(num_stores), set(literal_eval(addresses))) == (int(rank == 0), {"127.0.0.1"})


# ---- a user's mistakes


def test_what_no_host_can_run_is_the_users_mistake() -> None:
    ended = bad("data.train=nothing")
    assert [task.code for task in ended] == [2, 2, 2]
    assert [task.errors.strip() for task in ended[1:]] == ["", ""]
    assert ended[0].last_line.startswith("lime-dist: data.train: nothing.idx does not exist")
    assert not Path("exclude").exists()


def test_another_number_of_ranks_is_the_users_mistake() -> None:
    ended = bad("parallel.pp=2")
    assert [task.code for task in ended] == [2, 2, 2]
    assert "needs 2 ranks, 3 were started" in ended[0].last_line
