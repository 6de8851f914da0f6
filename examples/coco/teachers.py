"""Where a trained detector comes from: a finished run, torchvision's COCO weights, or a Python file of your own."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from arms import Arm
from models import torchvision_detector
from runs import RunError, load_model
from torch import Tensor, nn

from crosskd_assign import Batch, DensePredictions, DetectorAdapter, adapt

__all__ = ["TeacherInTraining", "load_teacher", "python_detector"]


def load_teacher(reference: str, *, size: int, short_side: int = 0) -> tuple[nn.Module, dict[int, int]]:
    """A one-to-many teacher and the COCO category of each of its labels.

    Args:
        reference: Folder of a finished run, "torchvision:NAME" or "python:FILE:FUNCTION".
        size: Longer side of the images, for torchvision's.
        short_side: What their shorter side must not exceed; 0 for no such bound.

    Raises:
        RunError: The run is not finished or not one-to-many, or the Python file does not give a detector.
        ModelError: torchvision has no such weights.
    """
    kind, _, name = reference.partition(":")
    if kind == "torchvision" and name:
        detector = torchvision_detector(name, size=size, short_side=short_side)
        return detector, {category: category for category in range(1, 91)}
    if kind == "python" and name:
        return python_detector(reference)
    model, spec = load_model(Path(reference))
    if not spec.one_to_many:
        raise RunError(
            f"Expected a one-to-many teacher, but got a one-to-one detector ({reference}). Fix: train it with "
            "--arm one-to-many."
        )
    return model, spec.label_to_category


def python_detector(reference: str) -> tuple[DetectorAdapter, dict[int, int]]:
    """What a function of a user's own file returns: a trained detector, and the COCO category of each of its labels.

    The file is run as a module, and can import what lies beside it. What it raises is raised.

    Args:
        reference: "python:FILE:FUNCTION".

    Raises:
        RunError: No such file or function, or it returns something else.
    """
    path, _, name = reference.removeprefix("python:").rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise RunError(
            f"Expected python:FILE:FUNCTION with a Python file, but got none there ({reference}). Fix: check the path."
        )
    function = getattr(_module(file), name, None)
    if not callable(function):
        raise RunError(
            f"Expected a function {name} in {file}, but got {type(function).__name__} ({reference}). Fix: define it."
        )
    match function():
        case nn.Module() as model, Mapping() as labels if all(
            isinstance(n, int) for pair in labels.items() for n in pair
        ):
            return adapt(model).eval(), dict(labels)
        case other:
            raise RunError(
                f"Expected {name}() to return a DetectorAdapter and a dict from its labels to COCO category ids, but "
                f"got {_described(other)} ({reference}). Fix: return YourAdapter(model), {{0: 1, 1: 2}}, for example."
            )


def _module(file: Path) -> Any:
    """A file's module, under a name that is no other's."""
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # last: a file named like one of ours must not take its place
    name = f"_detector_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise RunError(f"Expected a Python file, but got something else ({file}). Fix: give one that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _described(value: object) -> str:
    return f"({', '.join(map(_described, value))})" if isinstance(value, tuple) else type(value).__name__


class TeacherInTraining(Arm):
    """A teacher that sees images as its student does: what it says of them is what it will teach.

    Args:
        teacher: The detector.
        student: Whose preprocessing makes the batches.
    """

    def __init__(self, teacher: DetectorAdapter, student: DetectorAdapter) -> None:
        super().__init__(teacher, teacher, one_to_many=True)
        self._student = (student,)  # in a tuple, because it is no part of the teacher

    @torch.no_grad()
    def predict(self, images: Sequence[Tensor]) -> tuple[DensePredictions, Batch]:
        """Dense predictions on the student's batch."""
        batch, _ = self._student[0].preprocess(images)
        return self.adapter.head(self.adapter.features(batch), batch), batch
