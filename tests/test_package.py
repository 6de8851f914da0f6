"""The package as a whole: what it imports, exports, promises and ships.

``python tests/test_package.py --update`` writes the present API to ``tests/api_surface.json``.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import shutil
import subprocess
import sys
import tarfile
import typing
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import crosskd_assign

ROOT = Path(__file__).parents[1]
PACKAGE = Path(crosskd_assign.__file__).parent
SURFACE = Path(__file__).with_name("api_surface.json")
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Modules may import from lines above their own, and from nowhere else.
FLOORS = [
    {"structures", "errors"},
    {"validation", "geometry"},
    {"fused_triton"},
    {"fused"},
    {"functional", "candidates"},
    {"matching"},
    {"assigner", "alignment"},
    {"detectors"},
    {"end_to_end"},
    {"inheritance", "crossing"},
    {"distiller"},
    {"diagnostics", "tensors", "conformance"},
    {"parity"},
    {"export"},
    {"__init__"},
]
EVERYWHERE = {"torch", "numpy", "scipy", "typing_extensions"}
ONLY_IN = {"detectors/torchvision.py": {"torchvision"}, "fused_triton.py": {"triton"}}


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def room(path: Path) -> str:
    """The room of design.md a file belongs to: its own name, or that of its subpackage."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(node: ast.AST, path: Path) -> Iterator[str]:
    """Absolute dotted names of all that is imported below a node, one for each imported name."""
    package = ["crosskd_assign", *path.relative_to(PACKAGE).parts[:-1]]
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = package[: len(package) - child.level + 1] if child.level else []
            prefix = ".".join([*base, *([child.module] if child.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in child.names)


def rooms_imported(path: Path) -> set[str]:
    own = {name.split(".")[1] for name in imports(tree(path), path) if name.startswith("crosskd_assign.")}
    return own - {room(path)}


def outside_functions(module: ast.Module, path: Path) -> set[str]:
    """Top packages that are imported as soon as the module is."""
    inner = {
        id(x) for f in ast.walk(module) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for x in ast.walk(f)
    }
    statements = [x for x in ast.walk(module) if isinstance(x, ast.Import | ast.ImportFrom) and id(x) not in inner]
    return {name.split(".")[0] for statement in statements for name in imports(statement, path)}


# --- imports ----------------------------------------------------------------------------------------------------------


def test_importing_the_package_prints_nothing_warns_of_nothing_and_needs_no_torchvision():
    code = (
        "import sys, crosskd_assign\n"
        "heavy = {'torchvision', 'torchvision.models', 'matplotlib', 'onnx', 'onnxscript'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    fresh = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=200, check=False
    )
    assert (fresh.returncode, fresh.stdout, fresh.stderr) == (0, "", "")


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_run_downwards_only(path):
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    assert room(path) in floor, f"{relative(path)} has no place in design.md's order of rooms; give it one in FLOORS"
    upwards = {name for name in rooms_imported(path) if floor.get(name, len(FLOORS)) >= floor[room(path)]}
    if room(path) == "__init__":
        upwards.clear()
    assert not upwards, f"{relative(path)} imports {upwards}, which may import it"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_other_peoples_packages_are_imported_where_the_design_says(path):
    allowed = EVERYWHERE | ONLY_IN.get(relative(path), set()) | {"crosskd_assign"} | set(sys.stdlib_module_names)
    assert outside_functions(tree(path), path) <= allowed
    everywhere = {name.split(".")[0] for name in imports(tree(path), path)}
    if relative(path) != "export.py":
        assert not {name for name in everywhere if name.startswith("onnx")}
    assert path.stem != "utils"


# --- source -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_source_asserts_or_prints(path):
    for node in ast.walk(tree(path)):
        where = f"{relative(path)}:{getattr(node, 'lineno', 0)}"
        assert not isinstance(node, ast.Assert), f"{where}: python -O removes assertions; raise an error of errors.py"
        called = node.func if isinstance(node, ast.Call) else None
        assert not (isinstance(called, ast.Name) and called.id == "print"), f"{where}: a library does not print"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_every_function_is_annotated_in_full(path):
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        bare = [a.arg for a in given if a is not None and a.annotation is None and a.arg not in ("self", "cls")]
        where = f"{relative(path)}:{node.lineno} {node.name}"
        assert not bare, f"{where}: {bare} lack annotations"
        assert node.returns is not None, f"{where}: the result lacks an annotation"


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()


# --- API --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_every_exported_name_exists_and_is_documented(path):
    name = ".".join(["crosskd_assign", *path.relative_to(PACKAGE).with_suffix("").parts])
    module = importlib.import_module(name.removesuffix(".__init__"))
    assert module.__doc__
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        thing = getattr(module, name)
        assert inspect.getdoc(thing), f"{module.__name__}.{name} has no docstring"
        if inspect.isclass(thing) and thing.__module__ == module.__name__:
            for method, value in vars(thing).items():
                if not method.startswith("_") and (inspect.isroutine(value) or isinstance(value, property)):
                    assert value.__doc__ or inspect.getdoc(getattr(thing, method)), f"{name}.{method} has no docstring"


def signature(thing: Any) -> str:
    return str(inspect.signature(thing)).replace("'", "")


def described(thing: Any) -> Any:
    """What users can rely on of a public object: its signature and those of its own public methods."""
    if isinstance(thing, ModuleType):
        return {name: described(getattr(thing, name)) for name in sorted(thing.__all__)}
    if not inspect.isclass(thing):
        return signature(thing)
    if issubclass(thing, Exception):
        return f"exception({thing.__base__.__name__})"  # type: ignore[union-attr]
    if typing.is_typeddict(thing) or hasattr(thing, "__total__"):
        return f"keys({', '.join(sorted(thing.__annotations__))})"
    members = {"": signature(thing)}
    for name in sorted(vars(thing)):
        if name == "__call__" or not name.startswith("_"):
            value = inspect.getattr_static(thing, name)
            if isinstance(value, property):
                members[name] = "property"
            elif inspect.isroutine(value):
                members[name] = signature(getattr(thing, name))
    return members


def flat(surface: Any, prefix: str = "crosskd_assign") -> dict[str, str]:
    if not isinstance(surface, dict):
        return {prefix: surface}
    return {k: v for key, value in surface.items() for k, v in flat(value, f"{prefix}.{key}").items()}


def test_the_public_api_is_the_recorded_one():
    recorded = flat(json.loads(SURFACE.read_text(encoding="utf-8")))
    present = flat(described(crosskd_assign))
    changes = [f"gone:    {name}{recorded[name]}" for name in recorded.keys() - present.keys()]
    changes += [f"new:     {name}{present[name]}" for name in present.keys() - recorded.keys()]
    changes += [
        f"changed: {name}\n         was {recorded[name]}\n         now {present[name]}"
        for name in recorded.keys() & present.keys()
        if recorded[name] != present[name]
    ]
    assert not changes, (
        "the public API has changed:\n"
        + "\n".join(sorted(changes))
        + "\nIf you meant it, say so in CHANGELOG.md and run: python tests/test_package.py --update"
    )


# --- distributions ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """File names in a wheel and an sdist built from a copy of the tree that a training run has littered."""
    folder = tmp_path_factory.mktemp("build")
    project = folder / "project"
    litter = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "runs", "data", "dist", ".hypothesis")
    shutil.copytree(ROOT, project, ignore=litter)
    for name in ("runs/a/last.pt", "data/coco/1.jpg", "dist/old.whl", "src/crosskd_assign/__pycache__/x.pyc"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("litter")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(project)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        metadata = next(name for name in wheel.namelist() if name.endswith("METADATA"))
        files = set(wheel.namelist()), wheel.read(metadata).decode()
    with tarfile.open(next(folder.glob("*.tar.gz"))) as sdist:
        return *files, {name.partition("/")[2] for name in sdist.getnames()}


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_marker_its_licence_and_nothing_else(distributions):
    wheel, metadata, _ = distributions
    info = f"crosskd_assign-{crosskd_assign.__version__}.dist-info"
    assert {name.split("/")[0] for name in wheel} == {"crosskd_assign", info}
    package = {name for name in wheel if name.startswith("crosskd_assign/")}
    assert package == {f"crosskd_assign/{relative(path)}" for path in SOURCES} | {"crosskd_assign/py.typed"}
    assert f"{info}/licenses/LICENSE" in wheel
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata


@pytest.mark.slow
def test_the_sdist_can_be_built_and_tested_and_carries_no_data(distributions):
    _, _, sdist = distributions
    needed = {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "tests/test_package.py",
        "tests/api_surface.json",
    }
    assert needed | {f"src/crosskd_assign/{relative(path)}" for path in SOURCES} <= sdist
    extra = {"PKG-INFO", ".gitignore", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile"}
    assert {name.split("/")[0] for name in sdist} <= extra | {"src", "tests", "examples", "docs"}
    assert not [name for name in sdist if "__pycache__" in name]


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(f"usage: python {sys.argv[0]} --update")
    SURFACE.write_text(json.dumps(described(crosskd_assign), indent=2) + "\n", encoding="utf-8")
    print(f"wrote {SURFACE}; say in CHANGELOG.md what changed")
