"""`lime-dist bench pipeline` for real, tiny: hosts and their limits, bytes as planned, the same model in every pipeline."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lime_dist.bench.hosts import Host, hosts, why_no_hosts
from lime_dist.lifecycle.ending import INTERRUPTED

pytestmark = pytest.mark.slow  # 14 ways, each with an optimiser of its own
needs_hosts = pytest.mark.skipif(bool(why := why_no_hosts()), reason=str(why))

TINY = (
    "model.hidden_size=64",
    "model.intermediate_size=96",
    "model.vocab_size=64",
    "data.seq_length=256",
    "pipeline.num_microbatches=8",
    "data.global_batch_size=8",
)
BYTES = 0.03  # headers and acknowledgements, which weigh more where messages are small
SAME_LOSS = 1e-4  # fp32 sums in another order
COMMAND = (sys.executable, "-m", "lime_dist.cli", "bench", "pipeline")


def namespaces() -> set[str]:
    """Network namespaces that any process here is in or has open, the bench's own among them."""
    found = set()
    for link in (*Path("/proc").glob("[0-9]*/ns/net"), *Path("/proc").glob("[0-9]*/fd/*")):
        try:
            found.add(os.readlink(link))
        except OSError:  # it has ended
            continue
    return {name for name in found if name.startswith("net:")}


@needs_hosts
def test_every_way_on_hosts_with_limits(tmp_path: Path) -> None:
    before, path = namespaces(), tmp_path / "bench.json"
    ended = subprocess.run(
        [*COMMAND, *TINY, "--rounds", "1", "--json", str(path)], capture_output=True, text=True, timeout=280
    )
    assert ended.returncode == 0, ended.stderr
    assert namespaces() <= before
    records = json.loads(path.read_text())["records"]
    assert {record["share"] for record in records} == {None, 0.25, 0.5}
    assert ended.stdout.count("\n| ") == 1 + len(records) / 3 and "round 1 of 1" in ended.stderr
    for record in records:
        for counted in (record["sent_bytes"], record["received_bytes"]):
            assert 1 <= counted / record["planned_bytes"] <= 1 + BYTES, record
    full = [record["first_loss"] for record in records if record["model"] in ("relay", "least", "torch", "DeepSpeed")]
    assert full == pytest.approx([full[0]] * len(full), rel=SAME_LOSS)
    assert all((record["bytes_per_second"] is None) == (record["share"] is None) for record in records)


def test_without_hosts_it_says_so_and_uses_loopback(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import shutil\nshutil.which = lambda *_, **__: None\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    arguments = [*COMMAND, *TINY, "--rounds", "1", "--models", "least", "--json", str(tmp_path / "bench.json")]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=280, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert "no hosts here: ip and tc (iproute2) not installed; ranks on loopback" in ended.stderr
    records = json.loads((tmp_path / "bench.json").read_text())["records"]
    assert {(record["share"], record["sent_bytes"]) for record in records} == {(None, None)}


def interrupt(command: tuple[str, ...], mark: str) -> tuple[int, str]:
    """Press Ctrl-C, which a terminal sends to the whole group, when standard error has `mark`; exit code and errors."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job has it ignored
    )
    assert process.stderr is not None
    try:
        seen = ""
        while mark not in seen:
            line = process.stderr.readline()
            assert line, seen
            seen += line
        os.killpg(process.pid, signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
        with pytest.raises(ProcessLookupError):  # the group has nobody left in it
            os.killpg(process.pid, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, errors


@needs_hosts
@pytest.mark.parametrize("mark", ["building", "round 2"])
def test_an_interrupt_is_one_line_and_leaves_nothing(mark: str) -> None:
    before = namespaces()
    code, errors = interrupt((*COMMAND, *TINY, "--rounds", "1000", "--models", "least"), mark)
    assert code == INTERRUPTED and errors.splitlines()[-1] == "lime-dist: interrupted"
    assert "Traceback" not in errors and namespaces() <= before


def test_an_interrupt_of_a_bench_without_ranks() -> None:
    code, errors = interrupt((*COMMAND[:-1], "depth", "--repeats", "100000"), "\n")
    assert (code, errors.splitlines()[-1]) == (INTERRUPTED, "lime-dist: interrupted") and "Traceback" not in errors


# ---- the hosts themselves


def receive_all(host: Host, port: int, listening: threading.Event) -> None:
    host.enter()
    with socket.create_server((host.address, port)) as server:
        listening.set()
        connection, _ = server.accept()
        while connection.recv(2**20):
            pass


def send(source: Host, target: Host, port: int, count: int, seconds: list[float]) -> None:
    """Threads are each in a namespace of their own."""
    listening = threading.Event()
    receiver = threading.Thread(target=receive_all, args=(target, port, listening))
    receiver.start()
    listening.wait()
    source.enter()
    with socket.create_connection((target.address, port)) as connection:
        start = time.monotonic()
        connection.sendall(bytes(count))
        connection.shutdown(socket.SHUT_WR)
        receiver.join()
        seconds.append(time.monotonic() - start)


@needs_hosts
@pytest.mark.parametrize("pairs", [[(0, 1)], [(0, 1), (1, 0)], [(0, 1), (0, 2)], [(0, 2), (1, 2)]])
def test_a_card_carries_no_more_than_its_limit_each_way(pairs: list[tuple[int, int]]) -> None:
    """Alone, both ways at once, out of one card to two hosts, into one card from two. How much less it is, is not tested."""
    rate, count, seconds = 20e6, 8_000_000, []  # bytes
    with hosts(3) as three:
        for host in three:
            host.limit(rate)
        threads = [
            threading.Thread(target=send, args=(three[a], three[b], 5000 + index, count, seconds))
            for index, (a, b) in enumerate(pairs)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    shared = len({a for a, _ in pairs}) == 1 or len({b for _, b in pairs}) == 1
    least = count * (len(pairs) if shared else 1) / rate
    assert max(seconds) > 0.95 * least
