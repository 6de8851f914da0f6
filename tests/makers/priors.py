"""The spatial prior as its definition says it: every box with every point."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from crosskd_assign.assignment.candidates import Floats, Ints


def all_pairs(boxes: Floats, points: Tensor, strides: Tensor, radius: float) -> tuple[Ints, Ints]:
    """All pairs of a box and a candidate point, ascending by box, then by point."""
    corners, position = boxes.astype(np.float64)[:, None], points.detach().double().cpu().numpy()
    with np.errstate(invalid="ignore"):  # 0 · ∞
        reach = radius * strides.detach().double().cpu().numpy()[:, None]  # (A, 1)
    low, high = corners[..., :2], corners[..., 2:]  # (B, 1, 2)
    middle = (low + high) / 2
    inside = (position > low) & (position < high) & (position > middle - reach) & (position < middle + reach)
    box, point = np.nonzero(inside.all(axis=-1))
    return box, point
