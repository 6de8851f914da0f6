"""Which options go together: the table of docs/training.md is what the command line does."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import pytest
import train
from coco_example.command_line import parse_options

PAGE = Path(train.__file__).parents[2] / "docs" / "training.md"

# What a user types for each entry of the table, with what it needs.
GIVEN = {
    "one-to-many": ["--arm", "one-to-many"],
    "one-to-one": ["--arm", "one-to-one"],
    "cross-head": ["--arm", "cross-head"],
    "imitation": ["--arm", "feature-imitation"],
    "own-head": ["--arm", "own-head-imitation"],
    "--convert": ["--convert", "torchvision:fcos_resnet50_fpn"],
    "--teacher": ["--teacher", "run"],
    "--inherit": ["--teacher", "run", "--inherit"],
    "--inherit-from": ["--inherit-from", "run"],
    "--entry": ["--entry", "1"],
    "--auxiliary-head": ["--auxiliary-head"],
    "--detach": ["--auxiliary-head", "--detach"],
    "--freeze backbone": ["--freeze", "backbone"],
    "--freeze backbone-neck": ["--freeze", "backbone-neck"],
    "--freeze all": ["--freeze", "all", "--selection"],
    "--selection": ["--selection"],
    "--unlabelled": ["--unlabelled", "pictures"],
}
ARMS, OPTIONS = list(GIVEN)[:5], list(GIVEN)[5:]


def cells() -> list[tuple[str, str, str]]:
    """Row, column and sign of every cell of the table."""
    text = PAGE.read_text(encoding="utf-8").split("## What goes together", 1)[1].split("\n## ")[0]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*$", text, re.M)]
    head, _, *body = rows
    return [(row[0], column, sign) for row in body for column, sign in zip(head[1:], row[1:], strict=True) if sign]


def accepted(*names: str) -> bool:
    """Whether the command line takes entries together, with any arm where none of them is one."""
    words = [word for name in names for word in GIVEN[name]]
    arms = [[]] if "--arm" in words else [GIVEN[name] for name in ARMS]
    for arm in arms:
        with suppress(SystemExit):
            parse_options([*words, *arm, "--data", "demo", "--output", "run"])
            return True
    return False


def test_the_table_has_every_pair_once():
    pairs = [frozenset(cell[:2]) for cell in cells()]
    assert len(set(pairs)) == len(pairs)
    assert {name for cell in cells() for name in cell[:2]} == set(GIVEN)
    assert len(pairs) == len(ARMS) * len(OPTIONS) + len(OPTIONS) * (len(OPTIONS) - 1) // 2 - 3  # of --freeze and itself


@pytest.mark.parametrize("row", OPTIONS)
def test_the_command_line_does_what_the_table_says(row, capsys):
    said = {(one, other): sign != "–" for one, other, sign in cells() if one == row}
    assert said == {pair: accepted(*pair) for pair in said}
