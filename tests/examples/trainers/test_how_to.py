"""docs/how-to/other-trainers.md: the code it shows is that of the files, or names what is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "examples" / "trainers"
PAGE = (ROOT / "docs" / "how-to" / "other-trainers.md").read_text(encoding="utf-8")
SECTIONS = {
    "Lightning": "lightning_module.py",
    "Accelerate": "accelerate_loop.py",
    "torchvision's reference scripts": "torchvision_reference.py",
}


def blocks(section: str) -> list[str]:
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```py\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("section", SECTIONS)
def test_the_lines_shown_are_lines_of_the_file(section):
    shown = blocks(section)
    assert shown
    source = (FOLDER / SECTIONS[section]).read_text(encoding="utf-8")
    assert all(block in source for block in shown)


def test_ultralytics_trainer_is_used_as_its_tests_use_it():
    first, second = blocks("Ultralytics")
    used = {node.arg for node in ast.walk(ast.parse(first)) if isinstance(node, ast.keyword)}
    assert used == {"trainer", "data", "epochs", "nms"}
    (assignment,) = ast.parse(second).body[0].body  # type: ignore[attr-defined]
    source = (FOLDER / "ultralytics_trainer.py").read_text(encoding="utf-8")
    assert f"    {assignment.targets[0].id}: " in source


def test_every_loop_has_its_row():
    files = {path.name for path in FOLDER.glob("*.py")} - {"rectangles.py"}
    assert set(re.findall(r"trainers/(\w+\.py)\)", PAGE)) == files
