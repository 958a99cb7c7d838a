"""Mutated configs: each is planned, or refused in one line. `-m campaign --cases 1000 --seed 0` for a thousand of them."""

from __future__ import annotations

import random
import re
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lime_dist.checkpoint.edges import ready_plan
from lime_dist.config import load_config
from lime_dist.errors import MAX_LINE, LimeDistError, one_line
from lime_dist.plan.table import stage_table

pytestmark = pytest.mark.campaign

CASE_SECONDS = 20  # of a machine that other tests share
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

SCALARS = (
    "2026-11-25", "2026-11-25 12:00:00", "12:00:00", "0b_", "0x", "0b1", "0o7", "089", "1_0", "!!float x", "!!bool maybe",
    "!!int ''", "!!int x", "!!timestamp 2026", "!!binary aGVq", "!!python/name:os.system", "!!python/object/apply:os.system [ls]",
    "!!set {a, b}", "!!omap [a: 1]", "!local x", "!!null x", "!!str 3", "? {}", "{? {a: b} : c}", "{? [a] : c}", "{[a, b]: c}",
    "~", "null", "''", "' '", "yes", "no", "on", "true", "=", "<<", "*unknown", "&a [*a]", "&a {a: *a}", "|", ">", "-", "%", "@", "`", "!", "[", "{", "]", "}", ",",
    ".inf", "-.inf", ".nan", "1e400", "-1e400", "1e-400", "1e30", "0", "-0.0", "-1", "1", "2", "3", "7", "511", "512", "513", "100000", "2147483648", "4294967296",
    "9223372036854775807", "9223372036854775808", "-9223372036854775809", "0.5", "1.0000001", "1e-3", "1e5", "5e8", "9" * 5000, "0x" + "f" * 5000, "9" * 400, "-" + "9" * 400,
    "x" * 100_000, "'" + "y " * 50_000 + "'", "[" * 1000, "[" * 1000 + "]" * 1000, "{a: " * 500 + "}" * 500, "[1, 2, 3]", "[[1], [2]]", "{a: 1}", "{0: [1]}", "{3: [0, 1]}",
    "{3: [0, x]}", "{true: [0]}", "{1: null}", "{-1: [0]}", "{3: [-1]}", "{'3': [0]}", "{1e3: [0]}", "[" + "1, " * 30_000 + "1]", "{5: first:2}", "{5: full}", "{5: {3: [0]}}",
    "{5: nonsense}", "full", "first:0", "first:²", "first:99999999999999999999", "last:2", "stride:1", "block:2", "block:2+block:3", "within_stage", "full+", "+", "budget:4MiB", "budget:1",
    "budget:x", "budget:99999999999999999999GiB", "top_p:0.9", "top_p:nan", "top_p:-1", "edges:", "edges:.", "edges:/dev/null", "edges:nothing.yaml", "auto", "'\\0'", '"\\0"', '"\\x1b[31m"',
    '"\\ud800"', "../../..", "/root/.ssh", "/proc/self/mem", "/dev/zero", "a/" * 3000, "z" * 300, "é", "\u2028", "{stage: 9}", "{stage: .nan}", "{stage: 1, stag: 2}", "{stage: auto}",
)  # fmt: skip

VALUE = re.compile(r"^(\s*[\w.]+:)[ ]+([^\s#].*)$")
Mutation = Callable[[list[str], random.Random], list[str]]


def replace_value(lines: list[str], choose: random.Random) -> list[str]:
    where = choose.choice([index for index, line in enumerate(lines) if VALUE.match(line)])
    key = VALUE.match(lines[where])[1]
    return [*lines[:where], f"{key} {choose.choice(SCALARS)}", *lines[where + 1 :]]


def replace_section(lines: list[str], choose: random.Random) -> list[str]:
    return [*lines, f"{choose.choice(SECTIONS)}: {choose.choice(SCALARS)}"]


def add_key(lines: list[str], choose: random.Random) -> list[str]:
    sections = [index for index, line in enumerate(lines) if re.match(r"^\w+:\s*$", line)]
    if not sections:
        return lines
    where = choose.choice(sections) + 1
    return [*lines[:where], f"  {choose.choice(KEYS)}: {choose.choice(SCALARS)}", *lines[where:]]


def delete_line(lines: list[str], choose: random.Random) -> list[str]:
    where = choose.randrange(len(lines))
    return lines[:where] + lines[where + 1 :]


def repeat_line(lines: list[str], choose: random.Random) -> list[str]:
    where = choose.randrange(len(lines))
    return [*lines[: where + 1], *lines[where:]]


def rename_key(lines: list[str], choose: random.Random) -> list[str]:
    where, name = choose.randrange(len(lines)), choose.choice(SCALARS)[:200]
    renamed = re.sub(r"\w+:", lambda _: f"{name}:", lines[where], count=1)
    return [*lines[:where], renamed, *lines[where + 1 :]]


def multiply_aliases(lines: list[str], choose: random.Random) -> list[str]:
    laughs = [
        f"  a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, choose.randrange(2, 12))
    ]
    return [*lines, "deepspeed: ", "  a0: &a0 [1]", *laughs]


def indent_line(lines: list[str], choose: random.Random) -> list[str]:
    where = choose.randrange(len(lines))
    return [*lines[:where], choose.choice((" ", "   ", "\t")) + lines[where], *lines[where + 1 :]]


def spoil_characters(lines: list[str], choose: random.Random) -> list[str]:
    text = list("\n".join(lines))
    for _ in range(choose.randrange(1, 4)):
        text[choose.randrange(len(text))] = chr(choose.choice((choose.randrange(256), choose.randrange(0xD800))))
    return "".join(text).split("\n")


MUTATIONS: tuple[Mutation, ...] = (
    replace_value, replace_value, replace_value, replace_section, add_key, delete_line, repeat_line, rename_key,
    multiply_aliases, indent_line, spoil_characters,
)  # fmt: skip
SECTIONS = (
    "model",
    "depth",
    "parallel",
    "pipeline",
    "optim",
    "data",
    "eval",
    "checkpoint",
    "run",
    "wandb",
    "deepspeed",
)
KEYS = (
    "switch_at", "pattern", "router", "entry", "policy", "partial_sum_dtype", "weights_from", "pattern_name", "dp", "recompute", "boundary_cost",
    "partition", "rope_theta", "rms_norm_eps", "valid_fraction", "resume", "device", "timeout_seconds", "zero_optimization", "min_lr", "eps", "router_init", "heads", "head_top_p", "samples",
)  # fmt: skip


def mutated(choose: random.Random) -> bytes:
    lines = choose.choice(CONFIGS).read_text().splitlines()
    for _ in range(choose.choice((1, 1, 1, 2, 3))):
        lines = choose.choice(MUTATIONS)(lines, choose)
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    if choose.random() < 0.05:
        where = choose.randrange(len(content))
        content = content[:where] + choose.randbytes(4) + content[where:]
    return content


class Overdue(Exception):
    pass


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def overdue(*_: object) -> None:
        raise Overdue(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, overdue)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(path: Path) -> str:
    """planned, refused, or what is wrong."""
    try:
        with time_limit(CASE_SECONDS):
            stage_table(ready_plan(load_config(path)))
        return "planned"
    except LimeDistError as error:
        line = one_line(error)
        fits = line.isprintable() and len(line) <= MAX_LINE
        return "refused" if fits else f"a line of {len(line)} characters: {line!r}"
    except BaseException:
        return traceback.format_exc(limit=-3)


def test_mutated_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_cases: int, case_seed: int) -> None:
    monkeypatch.chdir(tmp_path)
    outcomes: dict[str, list[str]] = {}
    for case in range(num_cases):
        path = tmp_path / f"case_{case}.yaml"
        path.write_bytes(mutated(random.Random(f"{case_seed} {case}")))
        outcomes.setdefault(outcome(path), []).append(path.name)
    planned, refused = (len(outcomes.pop(kind, [])) for kind in ("planned", "refused"))
    print(f"{num_cases} mutated configs: {planned} planned, {refused} refused in one line")
    assert outcomes == {}
    assert refused and {outcome(config) for config in CONFIGS} == {"planned"}  # without a mutation
