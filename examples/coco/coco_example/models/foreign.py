"""Detectors of a user's own Python file."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from coco_example.data.values import Identifier
from coco_example.errors import RunError
from crosskd_assign import DetectorAdapter, adapt

__all__ = ["python_detector", "python_file"]


def python_file(reference: str) -> tuple[Path, str]:
    """Split "python:FILE:FUNCTION" into the file and the name of the function."""
    path, _, name = reference.removeprefix("python:").rpartition(":")
    return Path(path), name


def python_detector(reference: str) -> tuple[DetectorAdapter, dict[int, Identifier]]:
    """Call a function of the user's own file for a trained detector and the COCO category of each of its labels.

    The file is run as a module, and imports what lies beside it before anything else of the same name. What it raises
    is raised.

    Args:
        reference: "python:FILE:FUNCTION".

    Raises:
        RunError: No such file or function, or it returns something else.
    """
    # 1. The function.
    file, name = python_file(reference)
    if not file.is_file():
        raise RunError(
            expected="python:FILE:FUNCTION with a Python file", got="none there", where=reference, fix="check the path"
        )
    function = getattr(_module(file), name, None)
    if not callable(function):
        raise RunError(
            expected=f"a function {name} in {file}", got=type(function).__name__, where=reference, fix="define it"
        )

    # 2. What it returns.
    match function():
        case nn.Module() as model, Mapping() as labels if all(
            isinstance(n, int) for pair in labels.items() for n in pair
        ):
            return adapt(model).eval(), dict(labels)
        case other:
            raise RunError(
                expected=f"{name}() to return a DetectorAdapter and a dict from its labels to COCO category ids",
                got=_types(other),
                where=reference,
                fix="return YourAdapter(model), {0: 1, 1: 2}, for example",
            )


def _module(file: Path) -> Any:
    """Run a file as a module, under a name that no other has."""
    # Its folder comes first, and stays there: a neighbour may be called evaluate.py, as one of our commands is, and may
    # be imported by a function that is called later. The commands import nothing bare from then on.
    folder = str(file.resolve().parent)
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)
    name = f"_detector_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise RunError(expected="a Python file", got="something else", where=f"{file}", fix="give one that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _types(value: object) -> str:
    return f"({', '.join(map(_types, value))})" if isinstance(value, tuple) else type(value).__name__
