"""Lattices: points at the crossings of columns and rows, whose candidates are found by arithmetic, on the host.

A point is a candidate of a box if it lies in an open rectangle, and those of a lattice that do are whole rows' parts.
Arithmetic finds their first and last up to one; the coordinates themselves, from a table, decide. So no rounding in the
points matters, and the cost depends on the boxes and not on the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
from typing_extensions import Self

from ..structures import GridLevel
from .candidates import Floats, Ints, spread

__all__ = ["Lattices", "grid_pairs", "recognized"]

# Of a point set with more strides, or of points of one stride with smaller pieces, it is not worth while to list them
# all: the one is no pyramid, the other a grid with holes.
_MOST_STRIDES = 64
_LEAST_SHARE = 1 / 64


def grid_pairs(boxes: Floats, levels: Sequence[GridLevel], radius: float) -> tuple[Ints, Ints]:
    """List all pairs of a box and a candidate point on regular grids; see `Lattices.pairs`."""
    return _of_levels(tuple(levels)).pairs(boxes, radius)


@dataclass(frozen=True)
class _Lattice:
    """One of them, numbered along its inner axis first."""

    inner: Floats  # coordinates along the inner axis, ascending
    outer: Floats
    step: tuple[float, float]  # about the distance of neighbours along the inner and the outer axis
    origin: tuple[float, float]  # about the first of each
    stride: float
    anchors: int  # predictions at each point
    axis: int  # which axis is the inner one: 0 for x, 1 for y

    def __len__(self) -> int:
        return len(self.inner) * len(self.outer) * self.anchors


@dataclass(frozen=True)
class Lattices:
    """L lattices, one after the other, and their constants. In all of them the inner axis stands before the outer."""

    axes: Ints  # (L, 2), which coordinate runs along them
    step: Floats  # (L, 2)
    origin: Floats  # (L, 2)
    size: Ints  # (L, 2), points along the axes
    stride: Floats  # (L, 1)
    anchors: Ints  # (L,)
    start: Ints  # (L,), index of the first point of each lattice
    table: Floats  # coordinates along all axes, each between −∞ and ∞
    entry: Ints  # (L, 2), where those of an axis begin in it

    @classmethod
    def of(cls, lattices: Sequence[_Lattice]) -> Self:
        """Collect the constants of several lattices."""
        axes = [axis for lattice in lattices for axis in (lattice.inner, lattice.outer)]
        lengths = [0, *accumulate(len(axis) + 2 for axis in axes)][:-1]
        return cls(
            axes=np.array([(lattice.axis, 1 - lattice.axis) for lattice in lattices]),
            step=np.array([lattice.step for lattice in lattices]),
            origin=np.array([lattice.origin for lattice in lattices]),
            size=np.array([(len(lattice.inner), len(lattice.outer)) for lattice in lattices]),
            stride=np.array([[lattice.stride] for lattice in lattices]),
            anchors=np.array([lattice.anchors for lattice in lattices]),
            start=np.array([0, *accumulate(map(len, lattices))][:-1]),
            table=np.concatenate([part for axis in axes for part in ([-np.inf], axis, [np.inf])]),
            entry=np.array(lengths).reshape(-1, 2) + 1,
        )

    def pairs(self, boxes: Floats, radius: float) -> tuple[Ints, Ints]:
        """List all pairs of a box and a candidate point.

        Args:
            boxes: ``(B, 4)`` float32, finite.
            radius: Reach of the prior around the box centre, in strides.

        Returns:
            ``box (P,)`` and ``point (P,)``, ascending by box, then by point.
        """
        # 1. The open rectangle of every box and lattice.
        corners = boxes.astype(np.float64)
        low, high = corners[:, self.axes], corners[:, self.axes + 2]  # (B, L, 2)
        middle, reach = (low + high) / 2, radius * self.stride
        low, high = np.maximum(low, middle - reach), np.minimum(high, middle + reach)

        # 2. The columns and rows whose points lie in it.
        first = np.clip(np.floor((low - self.origin) / self.step), 0, self.size).astype(np.int64)
        last = np.clip(np.ceil((high - self.origin) / self.step), -1, self.size - 1).astype(np.int64)
        for _ in range(2):  # one step for the open border, one for points that are not quite where they should be
            first += self.table.take(self.entry + first) <= low
            last -= self.table.take(self.entry + last) >= high
        count = np.maximum(last - first + 1, 0)  # (B, L, 2)

        # 3. Their indices. A row of the rectangle is a run of consecutive points; with several anchors a cell, a longer
        # one.
        row = self.size[:, 0] * self.anchors
        run = (count[..., 0] * self.anchors).ravel()  # (B · L,)
        begin = (self.start + first[..., 1] * row + first[..., 0] * self.anchors).ravel()
        rectangle, offset = spread(run * count[..., 1].ravel())  # (P,)
        to_next_row = np.tile(row, len(boxes)) - run
        point = begin[rectangle] + offset + offset // run[rectangle] * to_next_row[rectangle]
        return rectangle // len(self.start), point


@lru_cache(maxsize=256)
def _of_levels(levels: tuple[GridLevel, ...]) -> Lattices:
    def axis(level: GridLevel, axis: int, length: int) -> Floats:
        """Coordinates, rounded as `GridLevel.points` rounds them."""
        at = np.arange(length, dtype=np.float32)
        return (at * np.float32(level.step[axis]) + np.float32(level.origin[axis])).astype(np.float64)

    return Lattices.of(
        [
            _Lattice(
                axis(level, 0, level.width),
                axis(level, 1, level.height),
                level.step,
                level.origin,
                level.stride,
                level.anchors,
                0,
            )
            for level in levels
        ]
    )


def recognized(points: Floats, strides: Floats) -> Lattices | None:
    """Recognise the lattices that a point set consists of, if it does.

    Args:
        points: ``(A, 2)`` float64.
        strides: ``(A,)`` float64.

    Returns:
        Lattices that hold these points in this order, or None: where points are not finite or lie elsewhere.
    """
    borders = [*(np.flatnonzero(strides[1:] != strides[:-1]) + 1).tolist(), len(points)]
    if len(points) == 0 or len(borders) > _MOST_STRIDES:
        return None
    if not (np.isfinite(points).all() and np.isfinite(strides).all()):
        return None
    found: list[_Lattice] = []
    start = 0
    for end in borders:
        while start < end:
            lattice = _first_lattice(points[start:end], float(strides[start]))
            if lattice is None or len(lattice) < _LEAST_SHARE * (end - start):
                return None
            found.append(lattice)
            start += len(lattice)
    return Lattices.of(found)


def _first_lattice(points: Floats, stride: float) -> _Lattice | None:
    """The longest lattice that points ``(n, 2)`` of one stride begin with; None where its spaces are too uneven."""
    # 1. Predictions at one point stand together.
    anchors = 1 + _leading((points[1:] == points[:-1]).all(axis=1))
    cells = points[: len(points) // anchors * anchors : anchors]

    # 2. A row goes on as long as one coordinate rises and the other stays.
    inner = int(len(cells) > 1 and cells[1, 0] == cells[0, 0])
    x, y = cells[:, inner], cells[:, 1 - inner]
    width = 1 + _leading((x[1:] > x[:-1]) & (y[1:] == y[:-1]))

    # 3. Further rows are like the first, each beyond the one before.
    rows = len(cells) // width
    x, y = (coordinate[: rows * width].reshape(rows, width) for coordinate in (x, y))
    height = 1 + _leading((x[1:] == x[0]).all(axis=1) & (y[1:] == y[1:, :1]).all(axis=1) & (y[1:, 0] > y[:-1, 0]))

    # 4. Is it one?
    size = height * width * anchors
    uneven = (points[:size].reshape(-1, anchors, 2) != cells[: height * width, None]).any()
    axes = [x[0].copy(), y[:height, 0].copy()]
    spaces = [_space(axis) for axis in axes]
    if uneven or None in spaces:
        return None
    step = (spaces[0] or 1.0, spaces[1] or 1.0)
    return _Lattice(axes[0], axes[1], step, (float(axes[0][0]), float(axes[1][0])), stride, anchors, inner)


def _leading(mask: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> int:
    """Number of entries before the first that is False."""
    return len(mask) if mask.all() else int(mask.argmin())


def _space(axis: Floats) -> float | None:
    """The distance of evenly spaced coordinates; None if one is off by more than a quarter of it."""
    if len(axis) == 1:
        return 1.0
    step = float(axis[-1] - axis[0]) / (len(axis) - 1)
    ideal = axis[0] + np.arange(len(axis)) * step
    return step if float(np.abs(axis - ideal).max()) <= step / 4 else None
