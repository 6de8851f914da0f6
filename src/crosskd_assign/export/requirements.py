"""Check what an export needs before it starts: optional packages, and a place for its file."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ExportError

__all__ = ["required_packages", "validate_place"]


def required_packages(names: Sequence[str], *, where: str, extra: str = "export") -> dict[str, Any]:
    """Import optional packages, by name.

    Raises:
        ExportError: One is not installed.
    """
    try:
        return {name: importlib.import_module(name) for name in names}
    except ImportError as error:
        raise ExportError(
            expected=", ".join(names), got=str(error), where=where, fix=f'pip install "crosskd_assign[{extra}]"'
        ) from error


def validate_place(path: Path) -> None:
    """Raise `ExportError` unless a file can be written there: tracing takes minutes."""
    if path.is_dir():
        got = "a folder"
    elif not path.parent.is_dir():
        got = "no such folder"
    elif not os.access(path.parent, os.W_OK):
        got = "a folder that cannot be written to"
    else:
        return
    raise ExportError(
        expected="a file in a folder that is there", got=got, where=f"{path}", fix="make the folder, or choose another"
    )
