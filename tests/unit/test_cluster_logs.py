"""`lime-dist logs` of made-up runs: which file, whose lines, and following from one start into the next."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lime_dist.cli.command_line import main
from lime_dist.cluster.logs import RunLogs, Wanted, follow
from lime_dist.config import dump_yaml, parse_config

MODEL = {"num_layers": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "vocab_size": 96}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Four ranks on SLURM; submitted, no logs yet."""
    (tmp_path / "slurm" / "logs").mkdir(parents=True)
    config = parse_config({"model": MODEL, "parallel": {"pp": 2, "tp": 2, "dp": 1}, "run": {"dir": "run"}})
    (tmp_path / "slurm" / "config.yaml").write_text(dump_yaml(config))
    (tmp_path / "slurm" / "history.tsv").write_text("2026-01-31T12:00:00Z\t9\t-\tsubmitted\t0\t\n")
    return tmp_path


def log(run: Path, name: str, text: str) -> None:
    with (run / "slurm" / "logs" / name).open("a") as file:
        file.write(text)


def show(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    capfd.readouterr()
    assert main(["logs", *map(str, arguments)]) == 0
    return capfd.readouterr().out


def refuse(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    capfd.readouterr()
    assert main(["logs", *map(str, arguments)]) == 2
    out, error = capfd.readouterr()
    assert out == "" and error.count("\n") == 1
    return error


def test_the_newest_start_and_its_first_rank(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for job, restart in ((9, 0), (9, 2), (9, 10), (8, 30)):
        for rank in range(4):
            log(run, f"{job}.{restart}.rank_{rank:03d}.log", f"{job}.{restart}, rank {rank}\n")
    log(run, "9.out", "the script\n")
    log(run, "notes.log", "not ours\n")
    assert show(capfd, run) == "9.10, rank 0\n"
    assert show(capfd, run, "--rank", 3) == "9.10, rank 3\n"
    assert show(capfd, run, "--restart", 2) == "9.2, rank 0\n"
    assert show(capfd, run, "--job", 8, "--rank", 1) == "8.30, rank 1\n"
    assert show(capfd, run, "--script") == "the script\n"


def test_under_torchrun_the_lines_of_one_rank(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    long = "x" * 3_000_000  # more than is read at once
    log(run, "9.0.node_000.log", "torchrun says\n[rank 0] step 1\n[rank 1] other\n[rank 0] step 2\n[rank 10] no\n")
    log(run, "9.0.node_001.log", f"[rank 2] two\n[rank 3] {long}\n[rank 3] end\n[rank 3] a line being writ")
    assert show(capfd, run) == "step 1\nstep 2\n"
    assert show(capfd, run, "--rank", 1) == "other\n"
    assert show(capfd, run, "--rank", 3) == f"{long}\nend\n"


def test_text_of_any_language_and_of_none(run: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    (run / "slurm" / "logs" / "9.0.rank_000.log").write_bytes("Größe \xff".encode("latin-1") + "雪\r".encode())
    assert main(["logs", str(run)]) == 0
    assert capfdbinary.readouterr().out == "Größe \xff".encode("latin-1") + "雪\r".encode()


def test_refusals(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    waiting = f"lime-dist: RUN: job 9 has no log yet; see `lime-dist status {run}`, or wait with -f\n"
    assert refuse(capfd, run) == waiting == refuse(capfd, run, "--script")
    assert refuse(capfd, run, "--job", 8).endswith("no log of that start; there are: none yet\n")
    log(run, "9.0.rank_000.log", "")
    assert refuse(capfd, run, "--rank", 4) == "lime-dist: --rank: no rank 4; the run has ranks 0 to 3\n"
    assert "the run has ranks 0 to 3" in refuse(capfd, run, "--rank", -1, "-f")
    assert refuse(capfd, run, "--restart", 7).endswith("there are: --job 9 --restart 0\n")


def test_a_run_that_was_not_started_on_slurm(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (run / "slurm" / "config.yaml").rename(run / "config.yaml")
    for path in (run / "slurm" / "logs", run / "slurm"):
        (run / "slurm" / "history.tsv").unlink(missing_ok=True)
        path.rmdir()
    assert "was not started on SLURM" in refuse(capfd, run)


# ---- following


class Interrupted(Exception):
    pass


def followed(run: Path, wanted: Wanted, *events: Callable[[], None]) -> str:
    """What is shown when `events` happen, one at each pause, and then an interrupt."""
    left, shown, logs = list(events), [], RunLogs(run)

    def pause() -> None:
        if not left:
            raise Interrupted
        left.pop(0)()

    with pytest.raises(Interrupted):
        for piece in follow(lambda: logs.find(wanted), pause):
            shown.append(piece.decode())
    return "".join(shown)


def test_follow_waits_for_the_first_start_and_goes_on_into_the_next(run: Path) -> None:
    def next_start() -> None:
        log(run, "9.0.rank_000.log", "last words\n")
        log(run, "9.1.rank_000.log", "resumed ")

    text = followed(
        run,
        Wanted(),
        lambda: None,
        lambda: log(run, "9.0.rank_000.log", "step 1\nste"),
        lambda: log(run, "9.0.rank_000.log", "p 2\n"),
        next_start,
        lambda: log(run, "9.1.rank_000.log", "from 2\n"),
    )
    assert text == "step 1\nstep 2\nlast words\nresumed from 2\n"


def test_follow_one_rank_of_a_shared_file(run: Path) -> None:
    log(run, "9.0.node_000.log", "[rank 0] a\n[rank 1] ")
    text = followed(
        run,
        Wanted(rank=3),
        lambda: log(run, "9.0.node_001.log", "[rank 3] b\n[ra"),  # until now it was not known that there are two nodes
        lambda: log(run, "9.0.node_001.log", "nk 3] c\n[rank 2] d\n"),
    )
    assert text == "b\nc\n"


def test_a_start_that_was_asked_for_is_not_left(run: Path) -> None:
    log(run, "9.0.rank_000.log", "first\n")
    text = followed(run, Wanted(restart=0), lambda: log(run, "9.1.rank_000.log", "second\n"), lambda: None)
    assert text == "first\n"


def _hear_interrupts() -> None:
    """What runs in the background of a shell begins without."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def command(run: Path, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "lime_dist.cli", "logs", str(run), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=_hear_interrupts,
    )


def test_an_interrupt_ends_it_quietly(run: Path) -> None:
    log(run, "9.0.rank_000.log", "step 1\n")
    process = command(run, "-f")
    assert process.stdout.readline() == b"step 1\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == (b"", b"") and process.returncode == 0


def test_a_reader_that_has_had_enough(run: Path) -> None:
    log(run, "9.0.rank_000.log", "step 1\n" * 1_000_000)
    process = command(run)
    assert process.stdout.readline() == b"step 1\n"
    process.stdout.close()
    assert process.wait(timeout=60) == 141 and process.stderr.read() == b""
    process.stderr.close()
