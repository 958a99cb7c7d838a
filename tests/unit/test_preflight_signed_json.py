"""What preflight's ranks tell one another: it arrives as it was, and nothing else is taken."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest

from lime_dist.preflight.checks import Verdict
from lime_dist.preflight.fabric import Crossing
from lime_dist.preflight.host import Arrival, Gpu, HostFacts
from lime_dist.preflight.signed_json import MAX_BYTES, Refused, conform, pack, unpack

SECRET = b"a secret of the job"
FACTS = HostFacts(
    memory_available=2**40, leftovers=("pid 7: lime-dist train",), file_bytes=(("a.bin", 3), ("a.idx", None)),
    versions=(("torch", "2.13"),),
)  # fmt: skip
ARRIVAL = Arrival(host="n1", local_rank=0, gpu=Gpu(uuid="x", free_bytes=1, total_bytes=2), facts=FACTS)
CROSSING = Crossing(
    boundary=0, direction="forward", rank=0, peer=1, message_bytes=2**20, bytes_sent=2**24, seconds=1e-3
)
VALUES = [
    (ARRIVAL, Arrival),
    (Arrival(host="n2", local_rank=1, problem="no config"), Arrival),
    (Verdict({"n1": ["its clock is 10.0 s ahead"]}), Verdict),
    (Verdict(user_error="run.steps: must be 1 or more"), Verdict),
    ([CROSSING], list[Crossing]),
    (None, int | None),
    (2**127 + 1, int | None),
    (1.5, float),
    (None, None),
]


@pytest.mark.parametrize("secret", [SECRET, None])
@pytest.mark.parametrize(("value", "shape"), VALUES)
def test_what_is_told_arrives_as_it_was(value: Any, shape: Any, secret: bytes | None) -> None:
    found = unpack("topic/3", pack("topic/3", value, secret).encode(), shape, secret)
    assert found == value and type(found) is type(value)


TREE = json.loads(pack("", ARRIVAL, None))
MISSHAPEN = [
    [],
    {},
    {**TREE, "more": 1},
    {**TREE, "host": 7},
    {**TREE, "host": None},
    {**TREE, "local_rank": "0"},
    {**TREE, "local_rank": True},
    {**TREE, "local_rank": 0.0},
    {**TREE, "gpu": {"uuid": "x"}},
    {**TREE, "gpu": [1]},
    {**TREE, "facts": {**TREE["facts"], "leftovers": "text"}},
    {**TREE, "facts": {**TREE["facts"], "versions": [["torch"]]}},
    {**TREE, "facts": {**TREE["facts"], "versions": [["torch", 2.13]]}},
    {**TREE, "facts": {**TREE["facts"], "file_bytes": [["a.bin", "3"]]}},
]


@pytest.mark.parametrize("tree", MISSHAPEN)
def test_another_shape_is_refused(tree: Any) -> None:
    assert conform(TREE, Arrival) == ARRIVAL
    with pytest.raises(Refused, match="^has "):
        conform(tree, Arrival)


@pytest.mark.parametrize(
    "text",
    [b"NaN", b"Infinity", b"1e999", b'"1"', b"true", b"null", b"1" * 4000, b"1" * 5000, b"", b"[" * 100_000, b"\xff"],
)
def test_what_is_no_plain_number_is_refused(text: bytes) -> None:
    with pytest.raises(Refused):
        unpack("clock/0", text, float, None)


def test_pickles_and_what_is_too_long_are_refused() -> None:
    with pytest.raises(Refused, match="^is no JSON$"):
        unpack("arrival/1", pickle.dumps(ARRIVAL), Arrival, None)
    with pytest.raises(Refused, match=f"{MAX_BYTES} at most are read"):
        unpack("arrival/1", b" " * MAX_BYTES + b"1", float, None)


FORGED = {
    "unsigned": pack("clock/1", 1.0, None),
    "with another secret": pack("clock/1", 1.0, b"another"),
    "told under another name": pack("clock/2", 1.0, SECRET),
    "changed": pack("clock/1", 1.0, SECRET)[:-1] + "7",
    "empty": "",
}


@pytest.mark.parametrize("data", FORGED.values(), ids=FORGED)
def test_what_this_job_has_not_signed_is_refused(data: str) -> None:
    with pytest.raises(Refused, match="^is not signed with this job's secret"):
        unpack("clock/1", data.encode(), float, SECRET)
