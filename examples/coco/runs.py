"""The folder of a training run: what is in it, how it is written so that a crash loses nothing, how it is read back.

``config.json`` how the run was started · ``environment.json`` with what · ``metrics.jsonl`` its log · ``last.pt`` and
``previous.pt`` everything needed to go on · ``model.safetensors`` and ``model.json`` the finished detector ·
``summary.json`` its scores · ``*.png`` pictures.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from models import build_detector, load_weights
from safetensors.torch import save
from torch import nn

import crosskd_assign

__all__ = [
    "ModelSpec",
    "RunError",
    "check_folder",
    "environment",
    "load_checkpoint",
    "load_model",
    "read_json",
    "save_checkpoint",
    "save_model",
    "write_json",
]


class RunError(ValueError):
    """A run's folder cannot be written to or read from."""


@dataclass(frozen=True)
class ModelSpec:
    """What it takes to build a detector again and to understand its labels.

    Attributes:
        architecture: "fcos" or "retinanet".
        backbone: Name of the backbone.
        size: Longer side of its images in pixels.
        channels: Of pyramid and head; 0 for the usual.
        head_convs: Of each branch of FCOS's head; 0 for the usual.
        one_to_many: Whether it needs NMS.
        categories: COCO category id and name of the labels 1, 2, ….
        short_side: What the shorter side of its images must not exceed; 0 for no such bound.
    """

    architecture: str
    backbone: str
    size: int
    channels: int
    head_convs: int
    one_to_many: bool
    categories: tuple[tuple[int, str], ...]
    short_side: int = 0

    @property
    def label_to_category(self) -> dict[int, int]:
        """COCO category id of each label."""
        return {label: category for label, (category, _) in enumerate(self.categories, start=1)}

    @property
    def label_to_name(self) -> dict[int, str]:
        """Name of each label."""
        return {label: name for label, (_, name) in enumerate(self.categories, start=1)}


def check_folder(folder: Path, *, resume: bool) -> None:
    """See that a run can start in, or go on in, a folder.

    Raises:
        RunError: It holds a run already and none is to be resumed, or the other way round.
    """
    checkpoint = folder / "last.pt"
    if resume and not checkpoint.exists() and not (folder / "previous.pt").exists():
        raise RunError(
            f"Expected a run to resume, but got none ({folder}). Fix: leave out --resume, or name its folder."
        )
    if not resume and folder.exists() and any(folder.iterdir()):
        raise RunError(
            f"Expected a new or empty folder, but got one in use ({folder}). Fix: choose another --output, add "
            "--resume to go on with it, or remove it yourself."
        )


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all; NaN and infinity, which JSON lacks, as null."""
    text = json.dumps(_without_nan(value), indent=2, ensure_ascii=False, allow_nan=False)
    _write(path, (text + "\n").encode())


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        RunError: No such file, or no JSON in it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise RunError(
            f"Expected a JSON file of a run, but got {error} ({path}). Fix: name the folder of a run."
        ) from error


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write ``last.pt``, keeping the one before as ``previous.pt``; at every moment one of them is whole."""
    temporary = folder / "last.pt.tmp"
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    last = folder / "last.pt"
    if last.exists():
        last.replace(folder / "previous.pt")
    temporary.replace(last)


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The newest readable checkpoint of a run; only tensors and plain types are accepted.

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
            reasons.append(f"{path.name}: {error}")
        else:
            if path == previous:
                with suppress(FileNotFoundError):  # never written, or another process was faster
                    last.replace(folder / "damaged.pt")
            return state
    raise RunError(
        f"Expected a readable checkpoint, but got none ({folder}): {'; '.join(reasons)}. Fix: start a new run."
    )


def save_model(folder: Path, model: nn.Module, spec: ModelSpec) -> None:
    """Write the finished detector: weights alone, and what they belong to."""
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    _write(folder / "model.safetensors", save(state))
    write_json(folder / "model.json", asdict(spec))


def load_model(folder: Path) -> tuple[nn.Module, ModelSpec]:
    """Build the finished detector of a run, in evaluation mode.

    Raises:
        RunError: The folder holds no finished run.
        ModelError: Its weights do not fit.
    """
    if not (folder / "model.json").exists():
        raise RunError(f"Expected a finished run, but got no model.json ({folder}). Fix: train it to the end first.")
    values = read_json(folder / "model.json")
    spec = ModelSpec(**{**values, "categories": tuple((int(c), str(n)) for c, n in values["categories"])})
    model = build_detector(
        spec.architecture,  # type: ignore[arg-type]  # checked there
        spec.backbone,  # type: ignore[arg-type]  # checked there
        len(spec.categories) + 1,
        size=spec.size,
        short_side=spec.short_side,
        channels=spec.channels,
        head_convs=spec.head_convs,
    )
    load_weights(model, folder / "model.safetensors")
    return model.eval(), spec


def environment() -> dict[str, str | int]:
    """Versions and hardware, so that a result can be traced to what made it."""
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
    """Of the code that runs; "unknown" outside a repository or without git."""
    here = Path(__file__).resolve().parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
