"""Place the boxes of crowds: groups in which neighbours overlap by a chosen IoU.

Boxes are x1, y1, x2, y2 in pixels, around all of an object, hidden or not; they lie in the picture as a whole, because
cutting them off at its border would change how much they overlap.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from coco_example.errors import DataError

__all__ = ["MAX_OVERLAP", "iou", "sample_groups", "validate_overlap"]

Array = npt.NDArray[np.float64]

MAX_OVERLAP = 0.95  # neighbours of 50 pixels are one pixel apart there
_ALONE = 0.2  # share of the groups that are one object
_TRIES = 30


def validate_overlap(overlap: tuple[float, float], where: str) -> None:
    """Check a range of IoUs.

    Raises:
        DataError: If it is no range within 0 … `MAX_OVERLAP`.
    """
    if not 0 <= overlap[0] <= overlap[1] <= MAX_OVERLAP:
        raise DataError(
            expected=f"an overlap from 0 to {MAX_OVERLAP}, the lower bound first",
            got=str(overlap),
            where=where,
            fix="pass (0.5, 0.5) for an IoU of 0.5, (0, 0.9) for a mix",
        )


def iou(box: Array, boxes: Array) -> Array:
    """Compute the IoU of one box (4,) with others (M, 4), as (M,)."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])
    shared = sides.clip(0).prod(axis=1)
    return np.asarray(shared / ((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - shared))


def sample_groups(rng: np.random.Generator, size: int, overlap: tuple[float, float]) -> list[Array]:
    """Sample one to three groups of boxes that do not touch each other.

    A group is one box (in a fifth of the cases) or a chain of two to four. Each box of a chain overlaps the one before
    it by an IoU drawn uniformly from a range, and those before that by no more.

    Args:
        rng: Source of randomness.
        size: Side of the picture in pixels.
        overlap: The range, from low to high.

    Returns:
        The groups, (M, 4) each; at least one.
    """
    groups: list[Array] = []
    for n in range(int(rng.integers(1, 4))):
        members = 1 if rng.random() < _ALONE else int(rng.integers(2, 5))
        length = size * math.exp(rng.uniform(math.log(0.26), math.log(0.46)))
        for attempt in range(_TRIES):
            # Each failure makes it smaller; the first group has the picture for itself, and is never left out.
            group = _chain(rng, size, members, max(0.2 * size, length * 0.96**attempt), overlap)
            if group is not None and not any(_touch(group, other) for other in groups):
                groups.append(group)
                break
            if n == 0 and attempt == _TRIES // 2:
                members = 1
    return groups


def _touch(group: Array, other: Array) -> bool:
    """Check whether the rectangles around two groups share a point."""
    low = np.maximum(group[:, :2].min(axis=0), other[:, :2].min(axis=0))
    high = np.minimum(group[:, 2:].max(axis=0), other[:, 2:].max(axis=0))
    return bool((low <= high).all())


def _chain(
    rng: np.random.Generator, size: int, members: int, length: float, overlap: tuple[float, float]
) -> Array | None:
    """Sample the boxes (M, 4) of one group; None if they do not fit into the picture or overlap too much."""
    # 1. Chain them, from the origin on.
    stretch = math.exp(rng.uniform(-0.2, 0.2))
    boxes = [length / max(stretch, 1 / stretch) * np.array([0, 0, stretch, 1 / stretch])]
    course = rng.uniform(0, 2 * math.pi)
    for _ in range(members - 1):
        target = rng.uniform(*overlap)
        neighbour = _neighbour(rng, boxes[-1], target, course)
        if (iou(neighbour, np.array(boxes)) > target + 1e-6).any():
            return None
        boxes.append(neighbour)
        course += rng.normal(0, 0.6)
    # 2. Put the chain somewhere into the picture.
    group = np.array(boxes)
    low, room = group[:, :2].min(axis=0), size - np.ptp(group.reshape(-1, 2), axis=0)
    if (room < 0).any():
        return None
    return np.asarray(group + np.tile(rng.uniform(0, 1, 2) * room - low, 2))


def _neighbour(rng: np.random.Generator, box: Array, target: float, course: float) -> Array:
    """Sample a box that has an IoU of ``target`` with another one, and lies beside it in the direction ``course``."""
    # 1. Its sides differ from the other's by up to a fifth, less where boxes of one centre would overlap too little.
    spread = min(0.2, 0.45 * (1 - target))
    ratio = np.exp(spread * rng.uniform(-1, 1, 2))
    centre, side = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
    direction = np.array([math.cos(course), math.sin(course)])
    # 2. The IoU falls on the way out, to 0 where the two no longer touch: bisect.
    sides, others, steps = side.tolist(), (side * ratio).tolist(), np.abs(direction).tolist()
    areas = math.prod(sides) + math.prod(others)
    near, far = 0.0, 2 * max(sides + others)
    for _ in range(40):
        middle = (near + far) / 2
        common = [
            max(0.0, min(a, b, (a + b) / 2 - middle * step)) for a, b, step in zip(sides, others, steps, strict=True)
        ]
        shared = math.prod(common)
        near, far = (middle, far) if shared > target * (areas - shared) else (near, middle)
    place, half = centre + far * direction, side * ratio / 2
    return np.concatenate([place - half, place + half])
