"""The folder of a training run: what is in it, how a crash loses nothing, how it is read back.

``config.json`` how the run was started · ``environment.json`` with what · ``metrics.jsonl`` its log · ``last.pt`` and
``previous.pt`` everything needed to go on · ``model.safetensors`` and ``model.json`` the finished detector ·
``summary.json`` its scores · ``*.png`` pictures.
"""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torchvision

import crosskd_assign
from coco_example.errors import RunError, first_line
from coco_example.files import read_json
from coco_example.options import Options

__all__ = ["check_folder", "check_options", "environment", "load_checkpoint", "save_checkpoint"]


def check_folder(folder: Path, *, resume: bool) -> None:
    """See that a run can start in, or continue in, a folder.

    Raises:
        RunError: It holds a run already and none is to be resumed, or the other way round.
    """
    checkpoint = folder / "last.pt"
    if resume and not checkpoint.exists() and not (folder / "previous.pt").exists():
        raise RunError(
            expected="a run to resume", got="none", where=f"{folder}", fix="leave out --resume, or name its folder"
        )
    if not resume and folder.exists() and any(folder.iterdir()):
        raise RunError(
            expected="a new or empty folder",
            got="one in use",
            where=f"{folder}",
            fix="choose another --output, add --resume to go on with it, or remove it yourself",
        )


def check_options(folder: Path, options: Options) -> None:
    """See that a resumed run has the options it was started with.

    Raises:
        RunError: It has others, which are named with both values.
    """
    differences = options.differences(read_json(folder / "config.json"))
    if differences:
        raise RunError(
            expected="the options the run was started with",
            got=f"others: {'; '.join(differences)}",
            where=f"{folder}",
            fix="repeat them, or start a new run",
        )


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write ``last.pt``, keeping the one before as ``previous.pt``; at every moment one of them is whole."""
    # 1. Write beside it.
    temporary = folder / "last.pt.tmp"
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())

    # 2. Exchange.
    last = folder / "last.pt"
    if last.exists():
        last.replace(folder / "previous.pt")
    temporary.replace(last)


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Read the newest readable checkpoint of a run; only tensors and plain types are accepted.

    An unreadable ``last.pt`` becomes ``damaged.pt``, or the next one saved would make it replace the good one.

    Raises:
        RunError: There is none.
    """
    reasons = []
    last, previous = folder / "last.pt", folder / "previous.pt"
    for path in (last, previous):
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: PERF203  # torch.load raises a dozen types for a damaged file
            reasons.append(f"{path.name}: {first_line(error)}")
        else:
            if path == previous:
                with suppress(FileNotFoundError):  # never written, or another process was faster
                    last.replace(folder / "damaged.pt")
            return state
    raise RunError(
        expected="a readable checkpoint",
        got=f"none: {'; '.join(reasons)}",
        where=f"{folder}",
        fix="start a new run",
    )


def environment() -> dict[str, str | int]:
    """List versions and hardware, so that a result can be traced to what made it."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "crosskd_assign": crosskd_assign.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "device": device,
        "threads": torch.get_num_threads(),
    }


def _commit() -> str:
    """Describe the commit of the code that runs; "unknown" outside a repository or without git."""
    here = Path(__file__).resolve().parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
