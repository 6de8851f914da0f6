"""Load trained detectors: from a finished run, torchvision's COCO weights, or a Python file of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from coco_example.data.annotations import Category
from coco_example.data.values import Identifier, key_of
from coco_example.errors import RunError
from coco_example.evaluation.evaluation import Detector
from coco_example.models.detectors import torchvision_detector
from coco_example.models.foreign import python_detector
from coco_example.models.saved_model import load_model
from coco_example.options import ModelOptions
from crosskd_assign import DetectorAdapter
from crosskd_assign.structures import Batch

__all__ = ["TeacherInTraining", "load_teacher"]


def load_teacher(
    reference: str, student: ModelOptions, classes: Sequence[Category] = (), *, option: str = "--teacher"
) -> tuple[nn.Module, dict[int, Identifier]]:
    """Load a one-to-many teacher.

    Args:
        reference: Folder of a finished run, "torchvision:NAME" or "python:FILE:FUNCTION".
        student: The detector to train; a teacher of torchvision's resizes images as it does.
        classes: The student's; of a run's labels, those of the same names are theirs, whatever the ids.
        option: What named the teacher.

    Returns:
        The teacher, and the category id of each of its labels.

    Raises:
        RunError: The run is not finished or not one-to-many, or the Python file does not give a detector.
        ModelError: torchvision has no such weights.
    """
    kind, _, name = reference.partition(":")
    if kind == "torchvision" and name:
        detector = torchvision_detector(name, size=student.size, short_side=student.short_side)
        return detector, {category: category for category in range(1, 91)}
    if kind == "python" and name:
        return python_detector(reference)
    model, spec = load_model(Path(reference), option)
    if not spec.one_to_many:
        raise RunError(
            expected="a one-to-many teacher",
            got="a one-to-one detector",
            where=reference,
            fix="train it with --arm one-to-many",
        )
    if not classes:
        return model, spec.label_to_category
    same = {(key_of(category.id), category.name): category.id for category in classes}
    named = {category.name: category.id for category in classes}
    pairs = [
        (label, same.get((key_of(i), name), named.get(name))) for label, (i, name) in enumerate(spec.categories, 1)
    ]
    return model, {label: category for label, category in pairs if category is not None}


@dataclass(frozen=True)
class TeacherInTraining(Detector):
    """A teacher that gets images as its student does: what it predicts on them is what it will teach.

    Attributes:
        student: The detector whose preprocessing makes the batches.
    """

    student: DetectorAdapter = field(kw_only=True)

    def preprocess(self, images: Sequence[Tensor]) -> Batch:
        """Make the batch that the student runs on."""
        batch, _ = self.student.preprocess(images)
        return batch
