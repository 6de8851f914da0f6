"""Candidate points of boxes, and one-to-one matching among them. Tensors or arrays in, indices out.

Points of different images never compete: a *column* is a point numbered through the whole batch (image · A + point), so
that one call solves all images.

Why the exact solver hardly ever solves anything. Let every box take its best column. The sum of these is an upper bound
of any matching, so where no two boxes want the same column it *is* the optimum. Otherwise only the contested boxes are
solved exactly among themselves; if their solution takes no column that another box has chosen, the bound
Σ best(others) + optimum(contested) is attained, and the whole is optimal. If it does take one, that other box is
contested too and joins. Within a group of R boxes a box never needs its (R + 1)-th best column: of its R best at least
one is left free by the R − 1 others.
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
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from .structures import GridLevel

__all__ = ["grid_candidates", "match_exact", "match_greedy", "nearest_free_point", "point_candidates"]

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]


# --- the spatial prior: points inside the box and within `radius` strides of its centre -----------------------------


def grid_candidates(boxes: Tensor, levels: Sequence[GridLevel], radius: float) -> tuple[Tensor, Tensor]:
    """Candidate points on regular grids, by arithmetic: the cost depends on the boxes, not on the image.

    Args:
        boxes: ``(B, 4)``.
        levels: The grids, in the order in which points are numbered.
        radius: Reach of the prior around the box centre, in strides.

    Returns:
        ``point (B, K)`` int64, ascending in each row where valid, and ``valid (B, K)`` bool; elsewhere the point is 0.
    """
    # float64 is exact for float32 boxes: the borders of the prior are open.
    corners = boxes.double().view(len(boxes), 1, 2, 2)  # (B, 1, low or high, x or y)
    low, high = corners[:, :, 0], corners[:, :, 1]  # (B, 1, 2)
    points, valids = [], []
    for grid in _grids(tuple(levels), radius, boxes.device):
        middle = (low + high) / 2
        first = torch.floor((middle - grid.margin) / grid.step) + 1  # (B, L, 2)
        index = first[..., None] + grid.window  # (B, L, 2, k)
        position = (index.float() * grid.step32 + grid.origin32).double()  # as GridLevel.points
        inside = (position - middle[..., None]).abs() < grid.reach
        inside &= (position > low[..., None]) & (position < high[..., None]) & (index >= 0) & (index < grid.size)
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
    reach: Tensor  # (L, 1, 1)
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
                reach=reach[..., None],
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


def point_candidates(
    boxes: Tensor, points: Tensor, strides: Tensor, radius: float, *, chunk: int = 256
) -> tuple[Tensor, Tensor]:
    """Candidate points of an arbitrary point set; as `grid_candidates`, but compares every box with every point.

    Args:
        boxes: ``(B, 4)``.
        points: ``(A, 2)``.
        strides: ``(A,)``.
        radius: Reach of the prior around the box centre, in strides.
        chunk: Boxes compared at once, which bounds the memory.

    Returns:
        ``point (B, K)`` and ``valid (B, K)`` as `grid_candidates`, K the most candidates any box has.
    """
    rows, columns = [], []
    position, reach = points.double(), radius * strides.double()  # (A, 2), (A,)
    for start in range(0, max(1, len(boxes)), chunk):
        corners = boxes[start : start + chunk, None].double()  # (b, 1, 4)
        middle = (corners[..., :2] + corners[..., 2:]) / 2
        inside = (position > corners[..., :2]) & (position < corners[..., 2:])
        inside &= (position - middle).abs() < reach[:, None]
        row, column = inside.all(dim=-1).nonzero(as_tuple=True)
        rows.append(row + start)
        columns.append(column)
    row, column = torch.cat(rows), torch.cat(columns)
    counts = torch.bincount(row, minlength=len(boxes))
    slot = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    most = int(counts.max()) if len(boxes) else 0
    point = boxes.new_zeros((len(boxes), max(1, most)), dtype=torch.int64)
    point[row, slot] = column
    return point, torch.arange(point.shape[1], device=row.device) < counts[:, None]


def nearest_free_point(points: Floats, center: Floats, taken: Ints) -> int:
    """Index of the point ``(A, 2)`` nearest to ``center (2,)`` and not ``taken``; −1 if all are. Ties: lower index."""
    if len(taken) >= len(points):
        return -1
    distance = ((points - center) ** 2).sum(axis=1)
    distance[taken] = np.inf
    return int(distance.argmin())


# --- one-to-one matching ---------------------------------------------------------------------------------------------


def match_exact(metric: Floats, column: Ints, rank: Ints | None = None) -> Ints:
    """The matching with the greatest sum of metrics.

    Args:
        metric: ``(B, K)``; only pairs with a metric above 0 can be matched.
        column: ``(B, K)``; the columns of a row that can be matched are distinct.
        rank: ``(B,)`` place of each box in an order that does not depend on how boxes came in; None for 0, 1, ….

    Returns:
        ``(B,)`` index into K, −1 for boxes that the optimum leaves unmatched. Of equal metrics of a box the first wins.
    """
    rows = np.arange(len(metric))
    choice: Ints = metric.argmax(axis=1)
    wants = metric[rows, choice] > 0
    choice[~wants] = -1
    favourite = column[rows, choice]
    contested = wants & _repeated(favourite, wants)
    while contested.any():
        group = np.flatnonzero(contested)
        if rank is not None:
            group = group[np.argsort(rank[group])]
        choice[group] = _match_group(metric[group], column[group])
        solved = group[choice[group] >= 0]
        robbed = wants & ~contested & np.isin(favourite, column[solved, choice[solved]])
        if not robbed.any():
            break
        contested |= robbed
    return choice


def match_greedy(metric: Floats, column: Ints, rank: Ints | None = None) -> Ints:
    """Best metric first: what sorting all pairs and taking each whose box and column are both free would give.

    Every box asks for its best column, each column keeps the best of those who ask, the others ask for their next. The
    result is the sorted order's because both sides rank a pair by the same number. Arguments and result as
    `match_exact`; of equal metrics the box of lower rank wins.
    """
    remaining = metric.copy()
    rows = np.arange(len(metric))
    rank = rows if rank is None else rank
    while True:
        choice: Ints = remaining.argmax(axis=1)
        value = remaining[rows, choice]
        asking = np.flatnonzero(value > 0)
        order = asking[np.lexsort((rank[asking], -value[asking], column[asking, choice[asking]]))]
        wanted = column[order, choice[order]]
        losers = order[1:][wanted[1:] == wanted[:-1]]
        if len(losers) == 0:
            choice[value <= 0] = -1
            return choice
        remaining[losers, choice[losers]] = -1


def _repeated(values: Ints, where: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which of ``values``, among those ``where`` holds, occur more than once."""
    repeated = np.zeros(len(values), dtype=bool)
    _, inverse, counts = np.unique(values[where], return_inverse=True, return_counts=True)
    repeated[where] = counts[inverse] > 1
    return repeated


def _match_group(metric: Floats, column: Ints) -> Ints:
    """Exact matching of boxes that compete: one assignment problem for each connected component."""
    choice = np.full(len(metric), -1)
    names, edges = np.unique(column, return_inverse=True)
    row, slot = np.nonzero(metric > 0)
    edge = len(metric) + edges.reshape(column.shape)[row, slot]
    size = len(metric) + len(names)
    graph = coo_array((np.ones(len(row), dtype=np.int8), (row, edge)), shape=(size, size))
    _, component = connected_components(graph, directed=False)
    for label in np.unique(component[: len(metric)]):
        members = np.flatnonzero(component[: len(metric)] == label)
        choice[members] = _solve(metric[members], column[members])
    return choice


def _solve(metric: Floats, column: Ints) -> Ints:
    """`scipy.optimize.linear_sum_assignment` on the R best columns of R boxes."""
    best = np.argsort(-metric, axis=1, kind="stable")[:, : len(metric)]  # (R, ≤ R)
    value = np.take_along_axis(metric, best, axis=1)
    names, index = np.unique(np.take_along_axis(column, best, axis=1), return_inverse=True)
    matrix = np.zeros((len(metric), len(names)))
    # A column that is infeasible for a box counts 0, so that leaving the box unmatched costs nothing but its metric.
    np.put_along_axis(matrix, index.reshape(best.shape), np.maximum(value, 0), axis=1)
    row, name = linear_sum_assignment(matrix, maximize=True)
    position = np.full(matrix.shape, -1)
    np.put_along_axis(position, index.reshape(best.shape), np.where(value > 0, best, -1), axis=1)
    choice = np.full(len(metric), -1)
    choice[row] = position[row, name]
    return choice
