"""The package as a whole: what it imports, exports, promises and ships.

``python tests/test_package.py --update`` writes the present API to ``tests/api_surface.json``.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
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

# Rooms may import from lines above their own, and from nowhere else; inside a folder, files from lines above theirs.
FLOORS = [
    {"version", "errors", "remedies"},
    {"geometry"},
    {"distributed", "transfer"},
    {"structures"},
    {"validation", "symptoms"},
    {"kernels"},
    {"functional"},
    {"assignment", "losses", "detectors"},
    {"postprocessing", "auxiliary", "selection"},
    {"end_to_end"},
    {"distillation"},
    {"diagnostics", "export", "testing"},
    {"__init__"},
]
INSIDE = {
    "kernels": [{"chunked"}],
    "assignment": [
        {"begin", "candidates"},
        {"lattices", "strips"},
        {"points"},
        {"lookup"},
        {"matching"},
        {"assigner", "one_to_many"},
    ],
    "detectors": [{"base"}, {"probing", "resizing", "functions", "torchvision"}, {"entry"}],
    "diagnostics": [{"duplicates", "thresholds"}, {"comparisons"}],
    "distillation": [{"schedule", "aligner"}, {"distiller", "inherit"}, {"cross_head"}],
    "export": [
        {"requirements", "graph", "tensor_detector", "translations"},
        {"checking", "compare", "running"},
        {"tracing"},
        {"onnx", "precision", "openvino"},
    ],
    "testing": [{"report"}, {"examination"}, {"shapes", "inputs", "positions", "robustness", "gradients"}, {"units"}],
}
EVERYWHERE = {"torch", "numpy", "scipy", "typing_extensions"}
ONLY_IN = {"detectors/torchvision.py": {"torchvision"}}
# torch has no public name for these.
PRIVATE_IN_TORCH = {"_apply", "_buffers", "_modules", "_NormBase", "_version"}


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


def level(floors: list[set[str]], name: str) -> int:
    return next((i for i, names in enumerate(floors) if name in names), len(floors))


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_run_downwards_only(path):
    assert level(FLOORS, room(path)) < len(FLOORS), f"{relative(path)} has no place in design.md's order; see FLOORS"
    if room(path) != "__init__":
        own = level(FLOORS, room(path))
        upwards = {name for name in rooms_imported(path) if level(FLOORS, name) >= own}
        assert not upwards, f"{relative(path)} imports {upwards}, which may import it"


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parent != PACKAGE], ids=relative)
def test_inside_a_folder_imports_run_downwards_too(path):
    folder, floors = path.parent.name, INSIDE[path.parent.name]
    if path.stem == "__init__":
        return
    own = level(floors, path.stem)
    assert own < len(floors), f"{relative(path)} has no place in INSIDE"
    for name in imports(tree(path), path):
        _, room, *rest = name.split(".")[:3] if name.startswith("crosskd_assign.") else ("", "")
        if room == folder:
            assert level(floors, rest[0]) < own, f"{relative(path)} imports {name}"


def other_peoples_private_names(path: Path) -> Iterator[str]:
    """Names with a leading underscore that are imported, or read of anything but ``self`` and ``cls``."""
    for node in ast.walk(tree(path)):
        where = f"{relative(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ImportFrom):
            yield from (f"{where} {alias.name}" for alias in node.names if alias.name.startswith("_"))
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            inside = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "ctx")
            # What an object keeps in an attribute of its own, such as the hidden teacher, is its own.
            inside |= isinstance(node.value, ast.Subscript) and ast.unparse(node.value).startswith("self.")
            if not inside:
                yield f"{where} {node.attr}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_module_uses_another_ones_private_names(path):
    found = [name for name in other_peoples_private_names(path) if name.split()[-1] not in PRIVATE_IN_TORCH]
    assert not [name for name in found if name.split()[-1] != "__version__"], found


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_other_peoples_packages_are_imported_where_the_design_says(path):
    allowed = EVERYWHERE | ONLY_IN.get(relative(path), set()) | {"crosskd_assign"} | set(sys.stdlib_module_names)
    assert outside_functions(tree(path), path) <= allowed
    everywhere = {name.split(".")[0] for name in imports(tree(path), path)}
    if relative(path) != "export/onnx.py":
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
        if typing.get_origin(thing):  # an alias, such as Literal["exact", "greedy"]
            continue
        assert inspect.getdoc(thing), f"{module.__name__}.{name} has no docstring"
        if inspect.isclass(thing) and thing.__module__ == module.__name__:
            for method, value in vars(thing).items():
                if not method.startswith("_") and (inspect.isroutine(value) or isinstance(value, property)):
                    assert value.__doc__ or inspect.getdoc(getattr(thing, method)), f"{name}.{method} has no docstring"


USED = [
    "",
    "diagnostics",
    "distillation",
    "errors",
    "export",
    "functional",
    "losses",
    "postprocessing",
    "structures",
    "testing",
]


def surface() -> dict[str, Any]:
    """All that a user imports, by module."""
    modules = {name: importlib.import_module(f"crosskd_assign{name and '.'}{name}") for name in USED}
    return {name: described(module) for name, module in modules.items()}


@pytest.mark.parametrize("module", [name for name in USED if name != "errors"])
def test_what_a_user_calls_has_an_example_that_is_run(module):
    module = importlib.import_module(f"crosskd_assign{module and '.'}{module}")
    for name in module.__all__:
        thing = getattr(module, name)
        report = name.endswith("Report") or name in ("AdapterCheck", "Inheritance")  # what others return
        if callable(thing) and not report and not hasattr(thing, "__total__") and not typing.get_origin(thing):
            assert ">>> " in (inspect.getdoc(thing) or ""), f"{module.__name__}.{name} shows no example"


def test_at_most_sixteen_names_stand_at_the_top():
    assert len(crosskd_assign.__all__) <= 16


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_class_is_longer_than_one_can_hold_in_ones_head(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno < 220, f"{relative(path)} {node.name}"


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
    present = flat(surface())
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


def built(folder: Path) -> None:
    """Build a wheel and an sdist from a copy of the tree that a training run has littered."""
    project = folder / "project"
    litter = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "runs", "data", "dist", ".hypothesis")
    shutil.copytree(ROOT, project, ignore=litter)
    for name in ("runs/a/last.pt", "data/coco/1.jpg", "dist/old.whl", "src/crosskd_assign/__pycache__/x.pyc"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("litter")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(project)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """File names in a wheel and an sdist, and the wheel's metadata; tools/release.py names the folder of its own."""
    if "DISTRIBUTIONS" in os.environ:
        folder = Path(os.environ["DISTRIBUTIONS"])
    else:
        folder = tmp_path_factory.mktemp("build")
        built(folder)
    name = f"crosskd_assign-{crosskd_assign.__version__}"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl") as wheel:
        metadata = next(name for name in wheel.namelist() if name.endswith("METADATA"))
        files = set(wheel.namelist()), wheel.read(metadata).decode()
    with tarfile.open(folder / f"{name}.tar.gz") as sdist:
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
    extra |= {"CITATION.cff", "CONTRIBUTING.md"}
    assert {name.split("/")[0] for name in sdist} <= extra | {
        "src",
        "tests",
        "examples",
        "benchmarks",
        "experiments",
        "docs",
        "tools",
    }
    assert not [name for name in sdist if "__pycache__" in name]


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(f"usage: python {sys.argv[0]} --update")
    SURFACE.write_text(json.dumps(surface(), indent=2) + "\n", encoding="utf-8")
    print(f"wrote {SURFACE}; say in CHANGELOG.md what changed")
