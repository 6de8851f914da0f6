"""Functions of the user's own Python files, named on a command line as ``python:FILE:FUNCTION``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coco_example.errors import RunError

__all__ = ["load_function"]


def load_function(reference: str) -> Callable[..., Any]:
    """Run a file as a module, and return one of its functions.

    The file imports what lies beside it before anything else of the same name. What it raises is raised.

    Args:
        reference: "python:FILE:FUNCTION".

    Raises:
        RunError: No such file or function.
    """
    path, _, name = reference.removeprefix("python:").rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise RunError(
            expected="python:FILE:FUNCTION with a Python file", got="none there", where=reference, fix="check the path"
        )
    function = getattr(_module(file), name, None)
    if not callable(function):
        raise RunError(
            expected=f"a function {name} in {file}", got=type(function).__name__, where=reference, fix="define it"
        )
    return function  # type: ignore[no-any-return]  # of the user's own


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
