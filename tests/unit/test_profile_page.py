"""The page of a profile: what it holds, that it asks for nothing, and what a browser makes of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from recorded import written

from lime_dist.config import check_config, parse_config
from lime_dist.plan.run_plan import plan_run
from lime_dist.profiling.accounting import account
from lime_dist.profiling.page import write_page
from lime_dist.profiling.profile_files import read_profile
from lime_dist.profiling.timeline import Cause, read_timelines

BASE: dict[str, Any] = {
    "model": {"num_layers": 8, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "vocab_size": 512},
    "pipeline": {"num_microbatches": 8},
    "data": {"seq_length": 128, "global_batch_size": 64},
    "run": {"device": "cpu"},
}
THREE_STAGES = ("parallel.pp=3", "model.num_layers=6")
EIGHT_RANKS = (
    "parallel.pp=4", "parallel.dp=2", "parallel.virtual_stages=2", "model.num_layers=16",
    "pipeline.num_microbatches=24", "data.global_batch_size=48", "pipeline.min_message=0",
)  # fmt: skip
FINDINGS = (
    "Boundary 1>2 hides most of its transfers: see `lime-dist plan`.",
    "</script><script>document.title = 'broken out'</script>",
)
HOSTILE_HOST = "</script><img src=x>&amp;"
MAX_BYTES = 20 * 10**6
NAMES = ("chromium", "chromium-browser", "google-chrome")


def make_page(folder: Path, *overrides: str, num_steps: int = 2, host: str = "host") -> Path:
    """Beside the profile, in `folder`; all ranks on one host."""
    config = parse_config(BASE, overrides)
    plan = plan_run(check_config(config, config.layout.world_size))
    profile = written(folder / "profile", plan, num_steps)
    profile = replace(profile, ranks=tuple(replace(rank, host=host) for rank in profile.ranks))
    timelines = tuple(read_timelines(profile))
    page = folder / "page.html"
    write_page(profile, timelines, account(profile, timelines), page, FINDINGS)
    return page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_page(tmp_path_factory.mktemp("run"), *THREE_STAGES, host=HOSTILE_HOST)


class Parsed(HTMLParser):
    """tags: each with its attributes; texts: by the tag around them."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.tags[-1][0] if self.tags else "", data))


def read_data(page: Path) -> dict[str, Any]:
    parsed = Parsed(page.read_text())
    scripts = [attributes for tag, attributes in parsed.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "profile"}, {}]  # nothing of the data has made one of its own
    (data,) = (text for tag, text in parsed.texts if tag == "script" and text.startswith("{"))
    return json.loads(data)


# ---- without a browser


def test_nothing_in_it_leads_elsewhere(page: Path) -> None:
    parsed = Parsed(page.read_text())
    referring = {"src", "href", "srcset", "action", "data", "poster", "background", "formaction", "xlink:href", "ping"}
    assert [(tag, attributes) for tag, attributes in parsed.tags if referring & attributes.keys()] == []
    assert {tag for tag, _ in parsed.tags} & {"link", "iframe", "object", "embed", "img", "base", "form"} == set()
    styles = "".join(text for tag, text in parsed.texts if tag == "style")
    assert re.findall(r"url\(|@import", styles) == []
    policies = [
        attributes for _, attributes in parsed.tags if attributes.get("http-equiv") == "Content-Security-Policy"
    ]
    assert [policy["content"] for policy in policies] == [
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    ]


def test_the_pieces_of_a_rank_are_those_of_its_account(page: Path) -> None:
    """Added up as the page's script does. A moment is rounded once, so that errors do not add up."""
    data, profile = read_data(page), read_profile(page.parent / "profile")
    timelines = tuple(read_timelines(profile))
    for rank in account(profile, timelines).ranks:
        seconds = dict.fromkeys(Cause, 0.0)
        for step, timeline in zip(data["steps"], timelines, strict=True):
            begin, *pieces = step["pieces"][rank.rank]
            durations, causes = pieces[0::4], pieces[1::4]
            assert begin + sum(durations) == round(1e6 * timeline.pieces[rank.rank][-1].end)
            for duration, cause in zip(durations, causes, strict=True):
                seconds[Cause(data["causes"][cause][0])] += duration / 1e6 / len(timelines)
        number = len(timelines[0].pieces[rank.rank])
        assert seconds == pytest.approx(dict(rank.seconds), abs=number * 1e-6)
        assert sum(data["ranks"][rank.rank]["seconds"]) == pytest.approx(1e6 * rank.step_seconds, abs=len(Cause))


def test_messages_have_their_moments_in_order(page: Path) -> None:
    data = read_data(page)
    for step in data["steps"]:
        for message, _, sender, receiver, _, *moments, transfer, exposed in step["deliveries"]:
            handed, posted, started, arrived, needed, taken = moments
            assert 0 <= handed <= started <= arrived and posted <= started and needed <= taken
            assert abs(sender - receiver) == 1 and 0 <= transfer <= arrived - started + 1 and exposed >= 0
            assert data["messages"][message][1] == (receiver < sender)  # gradients go back


def test_a_critical_path_is_as_long_as_its_step(page: Path) -> None:
    data = read_data(page)
    for step in data["steps"]:
        path = step["path"]
        ends = [begin + sum(pieces[0::4]) for begin, *pieces in step["pieces"]]
        assert path[0][0] == 0 and path[-1][1] == max(ends)
        assert all(one[1] == following[0] for one, following in zip(path, path[1:]))


@pytest.mark.slow
def test_twenty_steps_of_eight_ranks_are_small(tmp_path: Path) -> None:
    page = make_page(tmp_path, *EIGHT_RANKS, num_steps=20)
    data = read_data(page)
    assert min(len(pieces) // 4 for step in data["steps"] for pieces in step["pieces"]) > 1000
    assert page.stat().st_size < MAX_BYTES
    assert sum(file.stat().st_size for file in (tmp_path / "profile").rglob("*") if file.is_file()) < MAX_BYTES


# ---- in a browser


@cache
def find_browser() -> str | None:
    """One that starts: a name may stand for a script that only says how to install it."""
    for name in NAMES:
        if shutil.which(name) and subprocess.run([name, "--version"], capture_output=True).returncode == 0:
            return name
    return None


needs_browser = pytest.mark.skipif(find_browser() is None, reason=f"none of {', '.join(NAMES)} is installed")


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """With no network, and as root without the sandbox, which root cannot have."""
    command = [
        find_browser() or "", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1400,1800",
        f"--user-data-dir={page.parent / 'browser'}", *options, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def complaints(browsed: subprocess.CompletedProcess[str]) -> list[str]:
    """Of the page to the console: errors of its script, and requests that its policy forbids."""
    return [line for line in browsed.stderr.splitlines() if "CONSOLE" in line]


@contextmanager
def pictured(page: Path) -> Iterator[None]:
    """A picture of what did not come out as it should."""
    try:
        yield
    except AssertionError:
        picture = page.with_suffix(".png")
        browse(page, f"--screenshot={picture}")
        print(f"a picture of the page: {picture}")
        raise


def seen(page: Path, script: str = "") -> Parsed:
    """The document behind the page's script, and `script` behind that."""
    used = page.with_name("used.html")
    used.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    browsed = browse(used, "--dump-dom")
    assert complaints(browsed) == []
    assert "</html>" in browsed.stdout, browsed.stderr
    return Parsed(browsed.stdout)


def with_id(parsed: Parsed, name: str) -> dict[str, str | None]:
    return next(attributes for _, attributes in parsed.tags if attributes.get("id") == name)


def count(parsed: Parsed, tag: str, **wanted: str) -> int:
    return sum(name == tag and wanted.items() <= attributes.items() for name, attributes in parsed.tags)


@needs_browser
def test_it_draws_itself_and_fills_its_tables(page: Path) -> None:
    with pictured(page):
        parsed = seen(page)
        canvas = with_id(parsed, "timeline")
        step = next(each for each in read_data(page)["steps"] if str(each["step"]) == canvas["data-step"])
        assert int(canvas["data-drawn"] or 0) > 100
        assert int(canvas["data-messages"] or 0) == len(step["deliveries"])
        assert int(canvas["data-path"] or 0) == len(step["path"])
        texts = [text for _, text in parsed.texts]
        assert {"0>1", "1>2", "2>1", "1>0", HOSTILE_HOST, FINDINGS[1]} <= set(texts)
        assert ("code", "lime-dist plan") in parsed.texts
        assert texts.count(HOSTILE_HOST) == 3  # as text, a rank each
        assert ("title", "Pipeline profile") in parsed.texts
        assert count(parsed, "img") == 0
        assert count(parsed, "option") == 2 + 2  # steps; orders of the critical path


HANDLED = """
const before = [...view];
canvas.dispatchEvent(new KeyboardEvent("keydown", {key: "+"}));
const closer = view[1] - view[0] < before[1] - before[0];
canvas.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight"}));
const around = momentAt(600);
const left = canvas.getBoundingClientRect().left;
canvas.dispatchEvent(new WheelEvent("wheel", {deltaY: -400, clientX: 600 + left, cancelable: true}));
const held = Math.abs(momentAt(600) - around) < 1;
canvas.dispatchEvent(new MouseEvent("dblclick"));
const whole = view[0] === 0 && view[1] === step.end;
id("messages").checked = id("critical").checked = false;
draw();
const off = canvas.dataset.messages === "0" && canvas.dataset.path === "0";
id("messages").checked = id("critical").checked = true;
const waiting = step.rows[1].awaited.findIndex((each) => each > 0);
const place = x((step.rows[1].begins[waiting] + step.rows[1].ends[waiting]) / 2);
const box = canvas.getBoundingClientRect();
canvas.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + place, clientY: box.top + rowTops[1] + 5}));
const last = canvas.dataset.step;
id(id("next").disabled ? "previous" : "next").click();
draw();
const turned = canvas.dataset.step !== last;
document.body.dataset.handled = [closer, held, whole, off, turned].join();
"""


@needs_browser
def test_it_zooms_pans_tells_and_turns_to_another_step(page: Path) -> None:
    with pictured(page):
        parsed = seen(page, HANDLED)
        (body,) = (attributes for tag, attributes in parsed.tags if tag == "body")
        assert body["data-handled"] == "true,true,true,true,true"
        told = [text for _, text in parsed.texts]
        for name in (
            "handed over",
            "receive posted",
            "on the link",
            "arrived",
            "needed",
            "taken",
            "transfer alone",
            "exposed",
        ):
            assert name in told  # the tip of a wait
        assert "rank 0 → rank 1" in told


ALL_TOLD = """
const tell = (found) => { fillTip(found); return tip.textContent.length > 20; };
const pieces = step.rows.flatMap((row, rank) => [...row.begins.keys()].map((at) => findPiece(rank, row.begins[at] + 0.5)));
const told = [...pieces, ...step.messages.map((message) => ({message})), ...step.path.map((segment) => ({segment}))].map(tell);
tip.replaceChildren();
show(0, step.end / 50);
draw();
document.body.dataset.told = [told.length, told.every((each) => each)].join();
"""


@needs_browser
def test_replicas_and_virtual_stages_are_drawn_and_all_of_their_pieces_told(tmp_path: Path) -> None:
    page = make_page(tmp_path, *EIGHT_RANKS)
    with pictured(page):
        parsed = seen(page, ALL_TOLD)
        canvas = with_id(parsed, "timeline")
        step = next(each for each in read_data(page)["steps"] if str(each["step"]) == canvas["data-step"])
        number = sum(len(pieces) // 4 for pieces in step["pieces"]) + len(step["deliveries"]) + len(step["path"])
        (body,) = (attributes for tag, attributes in parsed.tags if tag == "body")
        assert body["data-told"] == f"{number},true"
        assert 0 < int(canvas["data-drawn"] or 0) < number / 10  # a fiftieth of the step


@needs_browser
def test_a_page_that_asked_for_something_would_be_found_out(page: Path) -> None:
    asking = page.with_name("asking.html")
    asking.write_text(page.read_text().replace("</main>", '<img src="http://192.0.2.1/x.png"></main>'))
    assert any("Content Security Policy" in line for line in complaints(browse(asking, "--dump-dom")))
