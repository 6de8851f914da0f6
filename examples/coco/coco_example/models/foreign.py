"""Detectors of a user's own Python file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from coco_example.data.values import Identifier
from coco_example.errors import RunError
from coco_example.functions import load_function
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
    function, (_, name) = load_function(reference), python_file(reference)

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


def _types(value: object) -> str:
    return f"({', '.join(map(_types, value))})" if isinstance(value, tuple) else type(value).__name__
