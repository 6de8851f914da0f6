"""The spatial prior: which points may learn which box.

A point is a candidate of a box if it lies inside the box and within ``radius`` strides of its centre: inside an open
rectangle, that is. On a grid these are a few whole rows' parts, found by arithmetic at a cost that depends on the
boxes and not on the image. On the host they are listed pair by pair; on an accelerator, where to know their number
would take a transfer, they are the marked entries of a window of fixed size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..structures import GridLevel

__all__ = ["Floats", "Ints", "grid_candidates", "nearest_free_point", "spread"]

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]


def spread(counts: Ints) -> tuple[Ints, Ints]:
    """Number the members of runs of these lengths: whose member each is, and the how manieth, both ``(Σ counts,)``."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (counts.cumsum() - counts)[owner]


def grid_candidates(boxes: Tensor, levels: Sequence[GridLevel], radius: float) -> tuple[Tensor, Tensor]:
    """Mark the candidate points on regular grids, without a transfer: the same as those of `grid_pairs`.

    Args:
        boxes: ``(B, 4)``.
        levels: The grids, in the order in which points are numbered.
        radius: Reach of the prior around the box centre, in strides.

    Returns:
        ``point (B, K)`` int64, ascending in each row where valid, and ``valid (B, K)`` bool; elsewhere the point is 0.
    """
    # float64 is exact for float32 boxes: the borders of the prior are open.
    corners = boxes.double().view(len(boxes), 1, 2, 2)  # (B, 1, low or high, x or y)
    points, valids = [], []
    for grid in _grids(tuple(levels), radius, boxes.device):
        # 1. A window of columns and of rows around each box's centre.
        low, high = corners[:, :, 0], corners[:, :, 1]
        middle = (low + high) / 2
        first = torch.floor((middle - grid.margin) / grid.step) + 1  # (B, L, 2)
        low, high = torch.maximum(low, middle - grid.reach), torch.minimum(high, middle + grid.reach)  # (B, L, 2)
        index = first[..., None] + grid.window  # (B, L, 2, k)

        # 2. Which of them lie in the prior, and on the grid.
        position = (index.float() * grid.step32 + grid.origin32).double()  # as GridLevel.points
        inside = (position > low[..., None]) & (position < high[..., None]) & (index >= 0) & (index < grid.size)

        # 3. Their points.
        index = torch.where(inside, index, 0.0).long()
        cell = index[:, :, 1, :, None] * grid.width + index[:, :, 0, None, :]  # (B, L, k, k)
        valid = (inside[:, :, 1, :, None] & inside[:, :, 0, None, :])[..., None].expand(*cell.shape, grid.anchors)
        point = cell[..., None] * grid.anchors + grid.start  # (B, L, k, k, anchors)
        points.append((point * valid).flatten(1))
        valids.append(valid.flatten(1))
    return torch.cat(points, dim=1), torch.cat(valids, dim=1)


@dataclass(frozen=True)
class _Grids:
    """Constants of L levels that are searched together: as many points of each can lie in a prior."""

    step: Tensor  # (L, 2)
    step32: Tensor  # (L, 2, 1)
    origin32: Tensor  # (L, 2, 1)
    margin: Tensor  # (L, 2), from the box centre back to the first point that may count
    reach: Tensor  # (L, 1)
    size: Tensor  # (L, 2, 1)
    width: Tensor  # (L, 1, 1)
    start: Tensor  # (L, 1, 1, anchors), index of the first point of each level
    window: Tensor  # (k,)
    anchors: int


@lru_cache(maxsize=256)
def _grids(levels: tuple[GridLevel, ...], radius: float, device: torch.device) -> list[_Grids]:
    """The levels in runs of equal window and anchors; usually one run."""
    starts = [0, *accumulate(len(level) for level in levels)]
    kind = [(_window(level, radius), level.anchors) for level in levels]
    runs = []
    for (window, anchors), run in groupby(range(len(levels)), key=kind.__getitem__):
        members = list(run)
        mine = [levels[i] for i in members]

        def constant(values: Sequence[Sequence[float]]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=device)

        step, origin = constant([level.step for level in mine]), constant([level.origin for level in mine])
        size = constant([(level.width, level.height) for level in mine])
        reach = constant([[radius * level.stride] for level in mine])
        first = torch.tensor([starts[i] for i in members], device=device).view(-1, 1, 1, 1)
        runs.append(
            _Grids(
                step=step,
                step32=step.float()[..., None],
                origin32=origin.float()[..., None],
                margin=reach + origin + constant([[_slack(level)] for level in mine]) * step,
                reach=reach,
                size=size[..., None],
                width=size[:, :1, None].long(),
                start=first + torch.arange(anchors, device=device),
                window=torch.arange(window, device=device),
                anchors=anchors,
            )
        )
    return runs


def _slack(level: GridLevel) -> float:
    """In steps: points are float32, and where their steps are not, one may lie a rounding off the ideal grid."""
    return 0.0 if all(float(64 * x).is_integer() for x in (*level.step, *level.origin)) else 1e-3


def _window(level: GridLevel, radius: float) -> int:
    """Grid points that the prior can hold along an axis; an open interval of length 2 · reach never holds more."""
    return max(1, math.ceil(2 * (radius * level.stride / min(level.step) + _slack(level))))


def nearest_free_point(points: Floats, center: Floats, taken: Ints) -> int:
    """Find the point ``(A, 2)`` nearest to ``center (2,)`` that is not ``taken``; −1 if all are. Ties: lower index."""
    if len(taken) >= len(points):
        return -1
    distance = ((points - center) ** 2).sum(axis=1)
    distance[taken] = np.inf
    return int(distance.argmin())
