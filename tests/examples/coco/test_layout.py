"""Five commands and one package: what they import, and how long they may become."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import train

FOLDER = Path(train.__file__).parent
COMMANDS = {"train", "evaluate", "predict", "export", "demo"}
SOURCES = sorted((FOLDER / "coco_example").rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Absolute dotted names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            assert node.module is not None
            yield node.module


def module(path: Path) -> str:
    return ".".join(path.relative_to(FOLDER).with_suffix("").parts)


def test_the_folder_holds_the_commands_and_one_package():
    assert {path.name for path in FOLDER.iterdir() if path.name != "__pycache__"} == {
        *(f"{name}.py" for name in COMMANDS),
        "coco_example",
    }


def test_no_command_but_the_demo_imports_another_and_the_package_imports_none():
    for path in [*SOURCES, *(FOLDER / f"{name}.py" for name in COMMANDS - {"demo"})]:
        assert not COMMANDS & set(imports(path)), path
    assert COMMANDS & set(imports(FOLDER / "demo.py")) == {"train"}


def test_modules_import_one_another_in_no_circle():
    TopologicalSorter({module(path): set(imports(path)) for path in SOURCES}).prepare()


@pytest.mark.parametrize("path", [*SOURCES, *FOLDER.glob("*.py")], ids=module)
def test_no_class_is_longer_than_220_lines_and_no_private_name_is_a_neighbours(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            assert (node.end_lineno or 0) - node.lineno < 220, node.name
        if isinstance(node, ast.ImportFrom):
            assert not [alias.name for alias in node.names if alias.name.startswith("_")], path
        private = isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
        if private and isinstance(node, ast.Attribute):
            assert isinstance(node.value, ast.Name), ast.unparse(node)
            assert node.value.id in {"self", "cls"}, ast.unparse(node)
