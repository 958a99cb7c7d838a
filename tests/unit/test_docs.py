"""What the documents name is there: files, commands, keys."""

from __future__ import annotations

import argparse
import dataclasses
import re
import typing
from pathlib import Path

import pytest

from lime_dist.cli.command_line import build_parser
from lime_dist.config import Config

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docker/*.md")])
SECTIONS = {item.name: typing.get_type_hints(Config)[item.name] for item in dataclasses.fields(Config)}


def names(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", DOCUMENTS, ids=names)
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#]+)", path.read_text())
    assert [target for target in targets if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=names)
def test_commands_exist(path: Path) -> None:
    (commands,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    named = set(re.findall(r"^(?:srun .*?)?lime-dist ([a-z]+)", path.read_text(), re.MULTILINE))
    assert named <= commands.choices.keys()
    assert path.name != "README.md" or path.parent != ROOT or named == commands.choices.keys()


def test_the_table_for_those_who_come_from_elsewhere_has_our_keys() -> None:
    text = (ROOT / "README.md").read_text()
    table = text[text.index("| here | Megatron-LM |") :].partition("\n\n")[0]
    ours = [row.split(" | ")[0] for row in table.splitlines()[2:]]
    keys = {key for cell in ours for key in re.findall(r"`([a-z_]+\.[a-z_.]+)", cell)}
    assert len(keys) > 15
    assert {key for key in keys if not is_key(*key.split(".")[:2])} == set()


def is_key(section: str, name: str) -> bool:
    kind = SECTIONS.get(section)
    return section == "deepspeed" or kind is not None and name in {item.name for item in dataclasses.fields(kind)}
