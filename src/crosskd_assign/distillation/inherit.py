"""A student that starts with parts of a trained detector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..detectors import DetectorAdapter, adapt
from ..end_to_end import EndToEndDetector
from ..errors import IncompatibleDetectorsError

__all__ = ["Inheritance", "inherit"]


@dataclass(frozen=True)
class Inheritance:
    """What `inherit` did: names of copied tensors, and of those left alone with the reason.

    Example:
        >>> print(Inheritance(("backbone.stem.weight",), {"neck.conv.weight": "the teacher has none"}))
        inherited 1 tensors, left 1 (the first: neck.conv.weight, the teacher has none)
    """

    copied: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line for a log."""
        text = f"inherited {len(self.copied)} tensors"
        if self.skipped:
            name, reason = next(iter(self.skipped.items()))
            text += f", left {len(self.skipped)} (the first: {name}, {reason})"
        return text


@torch.no_grad()
def inherit(
    student: nn.Module | DetectorAdapter | EndToEndDetector,
    teacher: nn.Module | DetectorAdapter,
    parts: Sequence[str] = ("backbone", "neck"),
) -> Inheritance:
    """Copy what fits of a trained detector into a student: same part, same name, same shape.

    A one-to-one student has few positives and gains from a start. The default leaves its head alone: a one-to-many head
    begins with many high scores an object, and copying it helped on some sets and harmed on another (docs/results.md).

    Args:
        student: torchvision's FCOS or RetinaNet, a `DetectorAdapter`, or an `EndToEndDetector`.
        teacher: Likewise.
        parts: Which of the modules that both adapters' ``parts()`` name: "backbone", "neck", "head".

    Returns:
        What was copied and what was not.

    Raises:
        DetectorError: One of the two does not name a part.
        IncompatibleDetectorsError: Nothing fits.

    Example:
        >>> from torchvision.models.detection import fcos_resnet50_fpn
        >>> options = dict(weights=None, weights_backbone=None, min_size=64)
        >>> student, teacher = (fcos_resnet50_fpn(num_classes=classes, **options) for classes in (3, 91))
        >>> print(inherit(student, teacher))
        inherited 334 tensors
    """
    # 1. The tensors of the parts, by part and name.
    own = student.adapter if isinstance(student, EndToEndDetector) else adapt(student)
    source, target = _tensors(adapt(teacher), parts), _tensors(own, parts)

    # 2. Copy those of one name and shape.
    copied: list[str] = []
    skipped: dict[str, str] = {}
    for name, value in target.items():
        if name not in source:
            skipped[name] = "the teacher has none"
        elif source[name].shape != value.shape:
            skipped[name] = f"{tuple(value.shape)} here, {tuple(source[name].shape)} in the teacher"
        else:
            value.copy_(source[name])
            copied.append(name)
    if not copied:
        raise IncompatibleDetectorsError(
            expected="tensors of equal name and shape",
            got=f"none of the student's {len(target)} tensors",
            where="inherit",
            fix="build the student with the teacher's backbone family, or leave inheritance out",
        )
    return Inheritance(tuple(copied), skipped)


def _tensors(adapter: DetectorAdapter, parts: Sequence[str]) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": x for part in parts for name, x in adapter.part(part).state_dict().items()}
