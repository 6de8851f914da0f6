"""Brings a student's feature pyramid into the form a teacher's head expects: channels, sizes, statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .errors import OptionError, problem
from .functional import align_statistics

__all__ = ["FeatureAligner"]

Alignment = Literal["statistics", "none"]


class FeatureAligner(nn.Module):
    """Aligns pyramid levels of the student with the same levels of the teacher.

    A level whose channels differ passes a 1 × 1 convolution; these are the only parameters that distillation adds. They
    belong to the optimiser during training and to nothing afterwards.

    Args:
        student_channels: Channels of each shared level of the student.
        teacher_channels: Channels of the same levels of the teacher.
        alignment: "statistics" gives the student's maps the teacher's mean and standard deviation per channel; "none"
            leaves them as they are.
    """

    def __init__(
        self, student_channels: Sequence[int], teacher_channels: Sequence[int], alignment: Alignment = "statistics"
    ) -> None:
        super().__init__()
        if alignment not in ("statistics", "none"):
            raise OptionError(
                problem('alignment "statistics" or "none"', repr(alignment), "FeatureAligner", "choose one of the two")
            )
        self.alignment = alignment
        self.adapters = nn.ModuleList(
            nn.Identity() if s == t else nn.Conv2d(s, t, kernel_size=1)
            for s, t in zip(student_channels, teacher_channels, strict=True)
        )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[Tensor]:
        """Align maps ``(N, *, H, W)`` level by level; where sizes differ (rounding), bilinearly to the teacher's."""
        aligned = []
        for adapter, x, reference in zip(self.adapters, student, teacher, strict=True):
            y: Tensor = adapter(x)
            if y.shape[-2:] != reference.shape[-2:]:
                y = F.interpolate(y, size=reference.shape[-2:], mode="bilinear", align_corners=False)
            aligned.append(align_statistics(y, reference) if self.alignment == "statistics" else y)
        return aligned

    def extra_repr(self) -> str:
        """Shown by ``repr``."""
        return f"alignment={self.alignment!r}"
