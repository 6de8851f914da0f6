"""A student that starts with its teacher's backbone and neck."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from .detectors import DetectorAdapter, adapt
from .end_to_end import EndToEndDetector
from .errors import IncompatibleDetectorsError, problem

__all__ = ["Inheritance", "inherit"]


@dataclass(frozen=True)
class Inheritance:
    """What `inherit` did: names of copied tensors, and of those left alone with the reason."""

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
    student: nn.Module | DetectorAdapter | EndToEndDetector, teacher: nn.Module | DetectorAdapter
) -> Inheritance:
    """Copy what fits of the teacher's backbone and neck into the student: same name, same shape.

    A one-to-one student is starved of positives and gains from a start. Its head is not touched: a one-to-many head
    begins with many high scores an object, and copying it helped on some sets and harmed on another (docs/results.md).

    Args:
        student: torchvision's FCOS or RetinaNet, a `DetectorAdapter` (its ``trunk()`` is what is copied into), or an
            `EndToEndDetector`.
        teacher: Likewise.

    Returns:
        What was copied and what was not.

    Raises:
        IncompatibleDetectorsError: Nothing fits.
    """
    source = adapt(teacher).trunk().state_dict()
    own = student.adapter if isinstance(student, EndToEndDetector) else adapt(student)
    target = own.trunk().state_dict()
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
        got = f"none of the student's {len(target)} tensors"
        fix = "build the student with the teacher's backbone family, or leave inheritance out"
        raise IncompatibleDetectorsError(problem("tensors of equal name and shape", got, "inherit", fix))
    return Inheritance(tuple(copied), skipped)
