"""The check of what boxes mean: pixels of the batch, strides, fractions, other corners."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..structures import DensePredictions
from .examination import Examination, check
from .positions import levels_of
from .report import Finding, wrong

__all__ = ["boxes"]


@dataclass(frozen=True)
class Outputs:
    """What a head predicts as boxes on one image, and where: B predictions that are finite."""

    boxes: Tensor  # (B, 4)
    points: Tensor  # (B, 2)
    strides: Tensor  # (B, 1)
    size: Tensor  # (4,): width, height, width, height of the image

    @property
    def centers(self) -> Tensor:
        """Middles of the boxes ``(B, 2)``."""
        return (self.boxes[:, :2] + self.boxes[:, 2:]) / 2

    @property
    def ordered(self) -> float:
        """Share of the boxes with their corners in order."""
        return float((self.boxes[:, 2:] >= self.boxes[:, :2]).all(dim=1).double().mean())


def _from_center(b: Tensor) -> Tensor:
    """Convert cx, cy, w, h to x1, y1, x2, y2."""
    return torch.cat([b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2], dim=1)


def _from_corner(b: Tensor) -> Tensor:
    """Convert x, y, w, h to x1, y1, x2, y2."""
    return torch.cat([b[:, :2], b[:, :2] + b[:, 2:]], dim=1)


# What numbers may mean instead of boxes in pixels: the boxes if they mean it, and how to mend it.
READINGS: dict[str, tuple[Callable[[Outputs], Tensor], str]] = {
    "strides": (lambda o: o.boxes * o.strides, "multiply them by the stride of their level"),
    "fractions of the image": (lambda o: o.boxes * o.size, "multiply x by the width and y by the height"),
    "y1, x1, y2, x2": (lambda o: o.boxes[:, [1, 0, 3, 2]], "swap the columns: boxes[..., [1, 0, 3, 2]]"),
    "cx, cy, w, h": (lambda o: _from_center(o.boxes), "convert with torchvision.ops.box_convert(b, 'cxcywh', 'xyxy')"),
    "x, y, w, h": (lambda o: _from_corner(o.boxes), "convert with torchvision.ops.box_convert(b, 'xywh', 'xyxy')"),
    "cx, cy, w, h in strides": (
        lambda o: _from_center(o.boxes * o.strides),
        "convert to xyxy and multiply by the stride",
    ),
    "cx, cy, w, h in fractions": (lambda o: _from_center(o.boxes * o.size), "convert to xyxy, multiply by the size"),
    "offsets from their points": (lambda o: o.boxes + o.points.repeat(1, 2), "add the points: cat([p - lt, p + rb])"),
    "offsets in strides": (
        lambda o: o.boxes * o.strides + o.points.repeat(1, 2),
        "multiply by the stride and add the points",
    ),
}

Pairs = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]  # for x and for y


@check("boxes", after=("finite", "points", "batches"))
@torch.no_grad()
def boxes(exam: Examination) -> Finding:
    """Check that boxes move with their points, pixel by pixel, and have their corners in order."""
    # 1. Predict on maps that show nothing that boxes would go to.
    outputs = _outputs(exam, exam.head([x.mean(dim=(2, 3), keepdim=True).expand_as(x) for x in exam.small_maps]))
    pairs = _far_pairs(outputs)
    if any(len(i) < 8 for i, _ in pairs):
        return Finding("skipped", "needs more points to tell; give larger images")

    # 2. Boxes in pixels move as far as their points do.
    slopes, where = _slopes(outputs, pairs), f"{exam.name}.head().boxes"
    expected = "x1, y1, x2, y2 in pixels of the batch"
    if all(0.6 < slope < 1.6 for slope in slopes):
        ordered = _outputs(exam, exam.predictions).ordered
        if ordered > 0.8:
            return _equal_on_all_levels(exam) or Finding("ok", f"boxes look like {expected}")
        got = f"{1 - ordered:.0%} of boxes with corners the wrong way round"
        fix = "keep sides positive, e.g. with exp or relu, and corners in order"
        return wrong(f"{expected}, x1 < x2", got, where=where, fix=fix)

    # 3. What else may they be?
    if name := _best_reading(outputs, pairs):
        return wrong(expected, f"what looks like {name}", where=where, fix=READINGS[name][1])
    got = f"boxes that move {slopes[0]:.2f} pixels in x and {slopes[1]:.2f} in y when their point moves one"
    return wrong(expected, got, where=where, fix="decode boxes around their points")


def _outputs(exam: Examination, predictions: DensePredictions) -> Outputs:
    """Collect what is finite of the first image."""
    height, width = exam.image_size
    b = predictions.boxes[0].double()
    finite = b.isfinite().all(dim=1)
    xy, strides = predictions.points.double()[finite], predictions.strides.double()[finite, None]
    return Outputs(b[finite], xy, strides, b.new_tensor([width, height, width, height]))


def _far_pairs(outputs: Outputs) -> Pairs:
    """Draw, for each axis, pairs of points of one level that lie far apart along it."""
    xy, strides = outputs.points, outputs.strides[:, 0]
    result = []
    for axis in (0, 1):
        i, j = torch.randint(len(xy), (2, 8192), device=xy.device)
        extent = xy[:, axis].max() - xy[:, axis].min()
        far = (strides[i] == strides[j]) & ((xy[i, axis] - xy[j, axis]).abs() > 0.3 * extent)
        result.append((i[far], j[far]))
    return result[0], result[1]


def _slopes(outputs: Outputs, pairs: Pairs) -> list[float]:
    """Measure how far box centres move for one pixel that their points move, in x and y: medians."""
    centers, xy = outputs.centers, outputs.points
    moved = [(centers[i, axis] - centers[j, axis]) / (xy[i, axis] - xy[j, axis]) for axis, (i, j) in enumerate(pairs)]
    return [float(ratio.median()) for ratio in moved]


def _best_reading(outputs: Outputs, pairs: Pairs) -> str | None:
    """Choose the reading that moves with the points and whose centres are nearest to them."""
    distances: dict[str, float] = {}
    for name, (reading, _) in READINGS.items():
        read = replace(outputs, boxes=reading(outputs))
        if read.ordered > 0.9 and all(0.75 < slope < 1.3 for slope in _slopes(read, pairs)):
            distances[name] = float(((read.centers - read.points).norm(dim=1) / read.strides[:, 0]).median())
    # Offsets pass for anything small, as adding the points makes any box move with them.
    likely = [name for name in distances if "offsets" not in name] or list(distances)
    return min(likely, key=lambda name: distances[name], default=None)


def _equal_on_all_levels(exam: Examination) -> Finding | None:
    """Note if the same map gives boxes of the same size on all levels."""
    # 1. One constant map for all levels.
    maps, levels = exam.small_maps, levels_of(exam, exam.predictions)
    if len(levels) < 2 or len({x.shape[1] for x in maps}) > 1:
        return None
    constant = maps[0].mean(dim=(2, 3), keepdim=True)
    b = exam.head([constant.expand_as(x) for x in maps]).boxes[0]

    # 2. How wide are the boxes of the finest level and of the coarsest?
    width = [float((b[level.members, 2] - b[level.members, 0]).median()) for level in levels]
    first, last = levels[0].declared, levels[-1].declared
    if width[0] > 0 and last >= 2 * first and 0.67 < width[-1] / width[0] < 1.5:
        return Finding(
            "note",
            f"boxes are as large at stride {last:g} as at {first:g}: if the head predicts sides in strides, multiply "
            "them by the stride",
        )
    return None
