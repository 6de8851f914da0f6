"""Files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from coco_example.errors import RunError, first_line

__all__ = ["digest", "read_json", "write_json", "write_whole", "write_with"]


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one."""
    write_with(path, lambda file: file.write(content))


def write_with(path: Path, write: Callable[[BinaryIO], object], *, keep: Path | None = None) -> None:
    """Let a function write a file that takes its place when it is complete; a failure leaves nothing behind.

    Args:
        path: The file.
        write: Writes the content into an open file.
        keep: Where to keep the file that is replaced, if there is one.

    Raises:
        OSError: It cannot be written. The error names it, even where the system's own does not, as on a full disk.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            path.replace(keep)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON, with null for NaN and infinity, which JSON lacks."""
    value = _without_nan(value)
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    if any("\ud800" <= character <= "\udfff" for character in text):  # as in paths that are no UTF-8
        text = json.dumps(value, indent=2, allow_nan=False)
    write_whole(path, (text + "\n").encode())


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RunError: No such file, or something else in it.
    """
    reason = ""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        value, reason = None, first_line(error)
    if not isinstance(value, dict):
        raise RunError(
            expected="a JSON file of a run",
            got=reason or f"{type(value).__name__} instead of an object",
            where=f"{path}",
            fix="name the folder of a run, or restore that file",
        )
    return value


def digest(value: Any) -> str:
    """Compute a digest of nested containers of tensors and plain values: equal for equal content, on any device."""
    state = hashlib.sha256()
    _feed(state.update, value)
    return state.hexdigest()


def _feed(update: Callable[[Any], None], value: Any) -> None:
    if isinstance(value, Tensor):
        update(f"tensor {value.dtype} {tuple(value.shape)}:".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        if len(flat) > 0:  # an empty tensor may have strides of 0, which bytes cannot be read through
            update(flat.view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        update(f"mapping {len(value)}:".encode())
        for pair in value.items():
            _feed(update, pair)
    elif isinstance(value, (list, tuple)):
        update(f"list {len(value)}:".encode())
        for entry in value:
            _feed(update, entry)
    else:
        content = f"{type(value).__name__} {value!r}".encode("utf-8", "surrogatepass")
        update(f"{len(content)}:".encode() + content)
