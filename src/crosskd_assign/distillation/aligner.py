"""Alignment: a student's maps in the form that a teacher's head expects, in channels, sizes and statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from ..detectors.entry import HeadEntry
from ..distributed import channel_statistics
from ..errors import IncompatibleDetectorsError
from ..functional import align_statistics
from ..geometry import at_least_float32
from ..validation import validate_choice

__all__ = ["Alignment", "FeatureAligner", "MatchedLevel", "match_levels"]

Alignment = Literal["statistics", "none"]


@dataclass(frozen=True)
class MatchedLevel:
    """A map that both detectors have: its index among the maps of each, and its channels in each.

    Example:
        >>> MatchedLevel(student=0, teacher=1, student_channels=96, teacher_channels=256).teacher
        1
    """

    student: int
    teacher: int
    student_channels: int
    teacher_channels: int


def match_levels(student: HeadEntry, teacher: HeadEntry) -> list[MatchedLevel]:
    """Match the maps of equal branch and stride.

    Raises:
        IncompatibleDetectorsError: The heads have other branches, or the pyramids share no stride.
    """
    # 1. The same branches.
    if set(student.branches) != set(teacher.branches):
        raise IncompatibleDetectorsError(
            expected="heads of equal branches",
            got=f"student {list(student.branches)} and teacher {list(teacher.branches)}",
            where=f"entry={student.convolutions}",
            fix="enter at the feature pyramid, entry=0",
        )

    # 2. The maps of one branch and stride.
    index = {name: j for j, name in enumerate(teacher.names)}
    matched = [
        MatchedLevel(i, index[name], student.levels[i].channels, teacher.levels[index[name]].channels)
        for i, name in enumerate(student.names)
        if name in index
    ]
    if not matched:
        own, others = [level.stride for level in student.pyramid], [level.stride for level in teacher.pyramid]
        raise IncompatibleDetectorsError(
            expected="a common stride in both pyramids",
            got=f"student {own} and teacher {others}",
            where="feature levels",
            fix="build both on pyramids that share at least one level",
        )
    return matched


class FeatureAligner(nn.Module):
    """Aligns maps of the student with the same maps of the teacher.

    A map whose channels differ passes a 1 × 1 convolution; these are the only parameters that distillation adds. They
    belong to the optimiser during training and to nothing afterwards.

    Args:
        levels: The maps that both detectors have.
        alignment: "statistics" gives the student's maps the teacher's mean and standard deviation per channel; "none"
            leaves them as they are.

    Raises:
        OptionError: ``alignment`` is neither.

    Example:
        >>> import torch
        >>> aligner = FeatureAligner([MatchedLevel(student=0, teacher=1, student_channels=8, teacher_channels=16)])
        >>> teacher = [torch.zeros(1, 16, 8, 8), torch.zeros(1, 16, 4, 4)]
        >>> [tuple(x.shape) for x in aligner([torch.rand(1, 8, 4, 4)], teacher)]
        [(1, 16, 8, 8), (1, 16, 4, 4)]
    """

    def __init__(self, levels: Sequence[MatchedLevel], alignment: Alignment = "statistics") -> None:
        super().__init__()
        validate_choice("alignment", alignment, ("statistics", "none"))
        self.levels = tuple(levels)
        self.alignment = alignment
        self.adapters = nn.ModuleList(
            nn.Identity()
            if level.student_channels == level.teacher_channels
            else nn.Conv2d(level.student_channels, level.teacher_channels, kernel_size=1)
            for level in levels
        )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[Tensor]:
        """Return the teacher's maps with those that the student has replaced by the student's.

        A map that the student lacks stays the teacher's own: predictions agree there, and no gradient comes from it.

        Args:
            student: The student's maps ``(N, *, H, W)``.
            teacher: The teacher's; where sizes differ (rounding), the student's are resized to them bilinearly.
        """
        # 1. The channels and the size of the teacher's maps.
        references = [teacher[level.teacher] for level in self.levels]
        maps: list[Tensor] = []
        for adapter, level, reference in zip(self.adapters, self.levels, references, strict=True):
            x: Tensor = adapter(student[level.student])
            if x.shape[-2:] != reference.shape[-2:]:
                x = F.interpolate(x, size=reference.shape[-2:], mode="bilinear", align_corners=False)
            maps.append(x)

        # 2. Their statistics; in training over all ranks, those of all maps in one exchange.
        if self.alignment == "statistics":
            precise = [at_least_float32(x) for x in maps]  # once: gradients would be rounded before they are summed
            known = channel_statistics([*precise, *(x.detach() for x in references)], across_ranks=self.training)
            pairs = zip(known[: len(maps)], known[len(maps) :], strict=True)
            maps = [
                align_statistics(x, reference, known=pair).to(given.dtype)
                for given, x, reference, pair in zip(maps, precise, references, pairs, strict=True)
            ]

        # 3. The teacher's own where the student has none.
        aligned = list(teacher)
        for level, x in zip(self.levels, maps, strict=True):
            aligned[level.teacher] = x
        return aligned

    @override
    def extra_repr(self) -> str:
        return f"alignment={self.alignment!r}"
