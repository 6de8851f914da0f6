"""Strips: any points, sorted so that those in a rectangle are found by bisection, on the host.

Points of about equal strides are cut into horizontal strips, as many as each then holds points, and sorted by x within
a strip. The candidates of a box lie in a few strips, in one run of each. Coordinates are compared as ranks, so that no
distribution of the points is a bad one and no rounding matters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from typing_extensions import Self

from .candidates import Floats, Ints, spread

__all__ = ["Strips"]

_MOST_STRIDES = 16  # searched one by one; of more, those of an octave are searched together
_LONGEST = 1e300  # an infinite stride, times a radius of 0, would be no number


@dataclass(frozen=True)
class Strips:
    """Points in S groups of similar strides, each in horizontal strips of points that ascend by x."""

    points: Floats  # (A, 2), sorted by group, strip and x
    strides: Floats  # (A,)
    number: Ints  # (A,), their places in the point set
    largest: Floats  # (S, 1), the largest stride of each group
    x: Floats  # distinct coordinates, ascending; a rank is an index into these
    y: Floats
    place: Ints  # (A,), strip and x as one number, ascending
    top: Ints  # group and y of each strip's first point as one number, ascending
    bottom: Ints  # and of its last

    @classmethod
    def of(cls, points: Floats, strides: Floats) -> Self:
        """Sort points ``(A, 2)`` with strides ``(A,)``, float64."""
        # 1. Points without a place, and those that no radius reaches, are nobody's candidates.
        number = np.flatnonzero(np.isfinite(points).all(axis=1) & (strides > 0))
        points, strides = points[number], strides[number].clip(max=_LONGEST)
        distinct, group = np.unique(strides, return_inverse=True)
        if len(distinct) > _MOST_STRIDES:
            _, group = np.unique(np.frexp(strides)[1], return_inverse=True)
        x, x_rank = np.unique(points[:, 0], return_inverse=True)
        y, y_rank = np.unique(points[:, 1], return_inverse=True)

        # 2. Strips of each group, from top to bottom: √n of them, of √n points.
        level = group * (len(y) + 1) + y_rank
        order = np.argsort(level)
        counts = np.bincount(group)
        strips = np.ceil(np.sqrt(counts)).astype(np.int64)
        owner, offset = spread(counts)
        strip = np.empty_like(order)
        strip[order] = (np.cumsum(strips) - strips)[owner] + offset * strips[owner] // counts[owner]
        begins = np.flatnonzero(np.diff(strip[order], prepend=-1))
        top, bottom = level[order[begins]], level[order[np.append(begins[1:], len(order))[: len(begins)] - 1]]

        # 3. Each ascending by x.
        place = strip * (len(x) + 1) + x_rank
        order = np.argsort(place)
        largest = np.zeros((len(counts), 1))
        np.maximum.at(largest[:, 0], group, strides)
        return cls(points[order], strides[order], number[order], largest, x, y, place[order], top, bottom)

    def pairs(self, boxes: Floats, radius: float) -> tuple[Ints, Ints]:
        """List all pairs of a box and a candidate point; as `Lattices.pairs`."""
        # 1. The open rectangle of every box and group, in ranks.
        corners = boxes.astype(np.float64)
        box_low, box_high = corners[:, None, :2], corners[:, None, 2:]  # (B, 1, 2)
        middle = (box_low + box_high) / 2
        low = np.maximum(box_low, middle - radius * self.largest)  # (B, S, 2)
        high = np.minimum(box_high, middle + radius * self.largest)
        left, right = self.x.searchsorted(low[..., 0], "right"), self.x.searchsorted(high[..., 0], "left")
        above, below = self.y.searchsorted(low[..., 1], "right"), self.y.searchsorted(high[..., 1], "left")

        # 2. The strips that it touches, and in each a run of points.
        group = np.arange(len(self.largest)) * (len(self.y) + 1)
        first = self.bottom.searchsorted(group + above).ravel()  # (B · S,)
        end = self.top.searchsorted(group + below).ravel()
        owner, offset = spread(np.maximum(end - first, 0))
        strip = (first[owner] + offset) * (len(self.x) + 1)
        begin = self.place.searchsorted(strip + left.ravel()[owner])
        stop = self.place.searchsorted(strip + right.ravel()[owner])
        run, offset = spread(np.maximum(stop - begin, 0))

        # 3. Those of them that are candidates: a strip reaches beyond the rectangle, a group's largest stride as well.
        at, box = begin[run] + offset, owner[run] // len(self.largest)
        point, reach = self.points[at], radius * self.strides[at, None]
        low = np.maximum(box_low[box, 0], middle[box, 0] - reach)
        high = np.minimum(box_high[box, 0], middle[box, 0] + reach)
        inside = ((point > low) & (point < high)).all(axis=1)

        # 4. In order.
        most = int(self.number.max(initial=0)) + 1
        return np.divmod(np.sort(box[inside] * most + self.number[at[inside]]), most)
