"""One-to-one matching of boxes and their candidate points. Arrays in, indices out.

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

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .candidates import Floats, Ints, nearest_free_point
from .lookup import Candidates

__all__ = ["fill_left_over", "match_exact", "match_greedy"]


def match_exact(metric: Floats, column: Ints, rank: Ints | None = None) -> Ints:
    """Find the matching with the greatest sum of metrics.

    Args:
        metric: ``(B, K)``; only pairs with a metric above 0 can be matched.
        column: ``(B, K)``; the columns of a row that can be matched are distinct.
        rank: ``(B,)`` place of each box in an order that does not depend on how boxes came in; None for 0, 1, ….

    Returns:
        ``(B,)`` index into K, −1 for boxes that the optimum leaves unmatched. Of equal metrics of a box the first wins.
    """
    # 1. Every box takes its best column.
    rows = np.arange(len(metric))
    choice: Ints = metric.argmax(axis=1)
    wants = metric[rows, choice] > 0
    choice[~wants] = -1

    # 2. Those who want the same are solved among themselves, with any box whose column their solution takes.
    favourite = column[rows, choice]
    contested = wants & _repeated(favourite, wants)
    while contested.any():
        group = np.flatnonzero(contested)
        if rank is not None:
            group = group[np.argsort(rank[group])]
        choice[group] = _match_group(metric[group], column[group])
        solved = group[choice[group] >= 0]
        displaced = wants & ~contested & np.isin(favourite, column[solved, choice[solved]])
        if not displaced.any():
            break
        contested |= displaced
    return choice


def match_greedy(metric: Floats, column: Ints, rank: Ints | None = None) -> Ints:
    """Match the best metric first, as if all pairs were sorted and each taken whose box and column are both free.

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


def fill_left_over(
    left_over: Ints,
    used: set[tuple[int, int]],
    candidates: Candidates,
    point: Ints,
    metric: Floats,
    positions: Floats,
) -> tuple[Ints, Floats, NDArray[np.bool_]]:
    """Find the nearest free point for every box that is left without any.

    Free points inside the prior go first, by their metric, those that predict no overlap yet included: they are still
    better than points outside it.

    Args:
        left_over: ``(R,)`` boxes without a point.
        used: Image and point of all that other boxes have.
        candidates: The boxes.
        point: ``(B, K)`` candidate points of each box.
        metric: ``(B, K)`` their metric.
        positions: ``(A, 2)`` of all points.

    Returns:
        ``(R,)`` the point of each, −1 where an image has no free point; its metric; whether it lies outside the prior.
    """
    # 1. What is taken, image by image.
    found = np.full(len(left_over), -1)
    value = np.zeros(len(left_over), dtype=metric.dtype)
    outside = np.zeros(len(left_over), dtype=bool)
    image, rank = candidates.image[left_over], candidates.rank[left_over]
    taken = {int(n): {p for m, p in used if m == n} for n in np.unique(image)}

    # 2. One box after another, in an order that does not depend on how they came in.
    for r in np.lexsort((rank, image)):
        b, mine = left_over[r], taken[int(image[r])]
        free = [k for k in np.flatnonzero(metric[b] >= 0).tolist() if int(point[b, k]) not in mine]
        if free:
            best = max(free, key=metric[b].__getitem__)  # the first of equals
            found[r], value[r] = point[b, best], metric[b, best]
        else:
            center = (candidates.boxes[b, :2] + candidates.boxes[b, 2:]) / 2
            found[r] = nearest_free_point(positions, center, np.fromiter(mine, dtype=np.int64))
            outside[r] = found[r] >= 0
        mine.add(int(found[r]))
    return found, value, outside


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
    rows = np.arange(len(metric))[:, None]
    best = np.argsort(-metric, axis=1, kind="stable")[:, : len(metric)]  # (R, ≤ R)
    value = metric[rows, best]
    names, index = np.unique(column[rows, best], return_inverse=True)
    index = index.reshape(best.shape)
    matrix = np.zeros((len(metric), len(names)))
    # A column that is infeasible for a box counts 0, so that leaving the box unmatched costs nothing but its metric.
    matrix[rows, index] = np.maximum(value, 0)
    row, name = linear_sum_assignment(matrix, maximize=True)
    position = np.full(matrix.shape, -1)
    position[rows, index] = np.where(value > 0, best, -1)
    choice = np.full(len(metric), -1)
    choice[row] = position[row, name]
    return choice
