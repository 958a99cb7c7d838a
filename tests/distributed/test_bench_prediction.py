"""`lime-dist bench prediction` for real, tiny: every way at every rate is recorded and predicted."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from lime_dist.bench.hosts import why_no_hosts

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why := why_no_hosts()), reason=str(why))]

TINY = ("model.hidden_size=64", "model.intermediate_size=96", "model.vocab_size=64", "data.seq_length=256")
FACTOR = 2.0  # a tiny model on a busy machine; how near a real one comes is in the README


def test_each_way_at_each_rate() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "lime_dist.cli", "bench", "prediction", *TINY, "--quick", "--rounds", "2"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr
    rows = re.findall(r"^\| (\S+) \| (no limit|\S+ [KM]iB/s) \| (\S+) s \| (\S+) s \|", ended.stdout, re.MULTILINE)
    assert [row[0] for row in rows] == ["LLaMA", "relay", "least", "first:2"] * 3
    assert [row[1] == "no limit" for row in rows] == [True] * 4 + [False] * 8
    for _, _, measured, predicted in rows:
        assert 1 / FACTOR < float(predicted) / float(measured) < FACTOR
    assert re.search(r"A recorded step takes \d\.\d+ of a plain one \(.* 8 pairs\)", ended.stdout)
