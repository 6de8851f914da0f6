"""The check of what boxes mean: pixels of the batch, strides, fractions, other corners."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..structures import Batch
from .examination import Examination, Finding, Note, Skip, wrong
from .places import levels_of

__all__ = ["boxes"]

Reading = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # boxes, points, strides (A, 1), image size (4,)


def _corners(b: Tensor) -> Tensor:
    """x1, y1, x2, y2 of cx, cy, w, h."""
    return torch.cat([b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2], dim=1)


def _extended(b: Tensor) -> Tensor:
    """x1, y1, x2, y2 of x, y, w, h."""
    return torch.cat([b[:, :2], b[:, :2] + b[:, 2:]], dim=1)


READINGS: dict[str, tuple[Reading, str]] = {
    "strides": (lambda b, p, s, _: b * s, "multiply them by the stride of their level"),
    "fractions of the image": (lambda b, p, s, size: b * size, "multiply x by the width and y by the height"),
    "y1, x1, y2, x2": (lambda b, p, s, _: b[:, [1, 0, 3, 2]], "swap the columns: boxes[..., [1, 0, 3, 2]]"),
    "cx, cy, w, h": (lambda b, p, s, _: _corners(b), "convert with torchvision.ops.box_convert(b, 'cxcywh', 'xyxy')"),
    "x, y, w, h": (lambda b, p, s, _: _extended(b), "convert with torchvision.ops.box_convert(b, 'xywh', 'xyxy')"),
    "cx, cy, w, h in strides": (lambda b, p, s, _: _corners(b * s), "convert to xyxy and multiply by the stride"),
    "cx, cy, w, h in fractions": (lambda b, p, s, size: _corners(b * size), "convert to xyxy, multiply by the size"),
    "offsets from their points": (lambda b, p, s, _: b + p.repeat(1, 2), "add the points: cat([p - lt, p + rb])"),
    "offsets in strides": (lambda b, p, s, _: b * s + p.repeat(1, 2), "multiply by the stride and add the points"),
}


@torch.no_grad()
def boxes(e: Examination) -> Finding:
    """Boxes move with their points, pixel by pixel, and have their corners in order."""
    picture = (0.5 + 0.05 * torch.randn_like(e.batch.images[:2])).clamp(0, 1)  # shows nothing that boxes would go to
    height, width = picture.shape[-2:]
    batch = Batch(picture, ((height, width),) * 2, ((height, width),) * 2)
    p = e.head(e.adapter.features(batch), batch)
    b, xy, strides = p.boxes[0].double(), p.points.double(), p.strides.double()[:, None]
    usable = b.isfinite().all(dim=1)
    b, xy, strides = b[usable], xy[usable], strides[usable]
    pairs = _pairs(xy, strides[:, 0])
    if any(len(i) < 8 for i, _ in pairs):
        raise Skip("needs more points to tell; give larger images")
    slopes, ordered = _slopes(b, xy, pairs), float((b[:, 2:] >= b[:, :2]).all(dim=1).double().mean())
    if all(0.6 < slope < 1.6 for slope in slopes) and ordered > 0.8:
        return _sizes(e) or "boxes look like x1, y1, x2, y2 in pixels of the batch"
    where, expected = f"{e.name}.head().boxes", "x1, y1, x2, y2 in pixels of the batch"
    if all(0.6 < slope < 1.6 for slope in slopes):
        fix = "keep sides positive, e.g. with exp or relu, and corners in order"
        got = f"{1 - ordered:.0%} of boxes with corners the wrong way round"
        raise wrong(f"{expected}, x1 < x2", got, where, fix)
    name = _best_reading(b, xy, strides, b.new_tensor([width, height, width, height]), pairs)
    if name is not None:
        raise wrong(expected, f"what looks like {name}", where, READINGS[name][1])
    got = f"boxes that move {slopes[0]:.2f} pixels in x and {slopes[1]:.2f} in y when their point moves one"
    raise wrong(expected, got, where, "decode boxes around their points")


def _pairs(xy: Tensor, strides: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each axis: pairs of points of one level that lie far apart along it."""
    result = []
    for axis in (0, 1):
        i, j = torch.randint(len(xy), (2, 8192), device=xy.device)
        extent = xy[:, axis].max() - xy[:, axis].min()
        far = (strides[i] == strides[j]) & ((xy[i, axis] - xy[j, axis]).abs() > 0.3 * extent)
        result.append((i[far], j[far]))
    return result


def _slopes(b: Tensor, xy: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> list[float]:
    """How far box centres move for one pixel that their points move, in x and y: medians."""
    centre = (b[:, :2] + b[:, 2:]) / 2
    moved = [(centre[i, axis] - centre[j, axis]) / (xy[i, axis] - xy[j, axis]) for axis, (i, j) in enumerate(pairs)]
    return [float(ratio.median()) for ratio in moved]


def _best_reading(
    b: Tensor, xy: Tensor, strides: Tensor, size: Tensor, pairs: list[tuple[Tensor, Tensor]]
) -> str | None:
    """What the boxes may mean instead: a reading that moves with the points, whose centres are nearest to them."""
    found: dict[str, float] = {}
    for name, (reading, _) in READINGS.items():
        read = reading(b, xy, strides, size)
        ordered = float((read[:, 2:] >= read[:, :2]).all(dim=1).double().mean())
        if ordered > 0.9 and all(0.75 < slope < 1.3 for slope in _slopes(read, xy, pairs)):
            centre = (read[:, :2] + read[:, 2:]) / 2
            found[name] = float(((centre - xy).norm(dim=1) / strides[:, 0]).median())
    if not found:
        return None
    # Offsets pass for anything small, as adding the points makes any box move with them.
    rest = {name: distance for name, distance in found.items() if "offsets" not in name} or found
    return min(rest, key=lambda name: rest[name])


def _sizes(e: Examination) -> Finding | None:
    """A note if the same map gives boxes of the same size on all levels."""
    maps, batch = e.pair()
    levels = levels_of(e, e.predictions)
    if len(levels) < 2 or len({x.shape[1] for x in maps}) > 1:
        return None
    constant = maps[0].mean(dim=(2, 3), keepdim=True)
    b = e.head([constant.expand_as(x) for x in maps], batch).boxes[0]
    side = [float((b[level.members, 2] - b[level.members, 0]).median()) for level in levels]
    first, last = levels[0], levels[-1]
    if side[0] > 0 and last.declared >= 2 * first.declared and 0.67 < side[-1] / side[0] < 1.5:
        return Note(
            f"boxes are as large at stride {last.declared:g} as at {first.declared:g}: if the head predicts sides in "
            "strides, multiply them by the stride"
        )
    return None
