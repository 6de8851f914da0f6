"""The records that flow through the library.

Shape legend, the same in every docstring:

``N`` images of a batch, ``L`` pyramid levels, ``A`` points of all levels, ``C`` classes, ``G`` boxes of one image,
``B`` boxes of the whole batch, ``K`` candidate points of a box, ``M`` matched pairs, ``D`` detections of one image.

Boxes are ``x1, y1, x2, y2`` in pixels of the padded batch image unless a docstring says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import NotRequired, Self, TypedDict

from .errors import OptionError, PredictionError
from .geometry import (
    at_least_float32,
    boxes_from_anchors,
    boxes_from_centers,
    boxes_from_sides,
    expected_distance,
)
from .remedies import remedy_of_shape
from .transfer import send

__all__ = [
    "Assignment",
    "Batch",
    "DensePredictions",
    "Detection",
    "ForwardPass",
    "GridLevel",
    "Target",
    "Unit",
    "labelled",
]

Unit = Literal["stride", "pixel"]


class Target(TypedDict):
    """Ground truth of one image, as torchvision's detectors take it. Further keys are carried along unread.

    ``boxes`` is ``(G, 4)`` floating point with ``x1 < x2`` and ``y1 < y2`` in pixels of the image that came in;
    ``labels`` is ``(G,)`` int64, each a channel index of the student's class logits.

    Example:
        >>> target: Target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])}
        >>> len(target["boxes"]) == len(target["labels"])
        True
    """

    boxes: Tensor
    labels: Tensor
    image_id: NotRequired[Tensor]


class Detection(TypedDict):
    """Detections of one image, best first: ``boxes (D, 4)``, ``scores (D,)``, ``labels (D,)``.

    Example:
        >>> scores, labels = torch.tensor([0.9, 0.2]), torch.tensor([1, 0])
        >>> found: Detection = {"boxes": torch.zeros(2, 4), "scores": scores, "labels": labels}
        >>> found["boxes"][found["scores"] > 0.5].shape
        torch.Size([1, 4])
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Batch:
    """Images brought to one shape, not yet normalised, so that detectors with different normalisation can share them.

    Attributes:
        images: ``(N, 3, H, W)`` in 0…1, padded with zeros at the right and the bottom.
        sizes: ``(height, width)`` of every image inside its padding, or a single one that all images share.
        original_sizes: ``(height, width)`` of every image as it came in; detections are returned in these coordinates.

    Example:
        >>> Batch(torch.zeros(1, 3, 64, 96), sizes=((60, 90),), original_sizes=((120, 180),)).image_size
        (64, 96)
    """

    images: Tensor
    sizes: tuple[tuple[int, int], ...]
    original_sizes: tuple[tuple[int, int], ...]

    @property
    def image_size(self) -> tuple[int, int]:
        """``(height, width)`` of the padded images in pixels."""
        return self.images.shape[-2], self.images.shape[-1]


@dataclass(frozen=True)
class GridLevel:
    """One pyramid level: predictions on a regular grid, row by row, ``anchors`` predictions a grid point.

    Attributes:
        height: Rows of the grid.
        width: Columns of the grid.
        stride: Nominal distance of grid points in pixels; the assigner measures its radius in it.
        step: ``(x, y)`` distance of neighbouring grid points in pixels; usually ``(stride, stride)``.
        origin: ``(x, y)`` of the first grid point in pixels; usually half a stride.
        anchors: Predictions made at each grid point.

    Example:
        >>> level = GridLevel.of(torch.zeros(1, 16, 2, 3), stride=8)
        >>> len(level), level.points()[0].tolist()
        (6, [4.0, 4.0])
    """

    height: int
    width: int
    stride: float
    step: tuple[float, float]
    origin: tuple[float, float]
    anchors: int = 1

    @classmethod
    def of(cls, feature: Tensor, stride: float, *, anchors: int = 1) -> Self:
        """Build the usual grid of a feature map ``(N, *, H, W)``: one point in the middle of every cell."""
        height, width = feature.shape[-2:]
        return cls(height, width, stride, (stride, stride), (stride / 2, stride / 2), anchors)

    def __len__(self) -> int:
        """Number of predictions on this level."""
        return self.height * self.width * self.anchors

    def points(self, device: torch.device | str | None = None) -> Tensor:
        """Compute the positions of the predictions, ``(len(self), 2)`` float32 ``x, y`` pixels."""
        x = torch.arange(self.width, dtype=torch.float32, device=device) * self.step[0] + self.origin[0]
        y = torch.arange(self.height, dtype=torch.float32, device=device) * self.step[1] + self.origin[1]
        grid = torch.stack([x.expand(self.height, -1), y[:, None].expand(-1, self.width)], dim=-1)  # (H, W, 2)
        return grid.reshape(-1, 2).repeat_interleave(self.anchors, dim=0)


@dataclass(frozen=True)
class DensePredictions:
    """The predictions of one pass of a dense detector's head, all levels concatenated.

    The constructors `from_sides`, `from_centers`, `from_anchors` and `from_bins` decode what heads usually output; a
    head that multiplies class by objectness gives ``functional.product_logits(classes, objectness[..., None])`` as
    logits.

    Attributes:
        logits: ``(N, A, C)`` class logits, before the sigmoid.
        boxes: ``(N, A, 4)`` decoded boxes in pixels of the padded batch image.
        points: ``(A, 2)`` ``x, y`` of the point each prediction is made from, in pixels.
        strides: ``(A,)`` stride of the level each prediction belongs to, in pixels.
        quality: ``(N, A)`` centerness, objectness or IoU logits; None for heads without such a branch.
        distribution: ``(N, A, 4, R)`` logits over R distance bins for each side of the box; None for heads that predict
            the distances themselves.
        levels: The regular grids that ``points`` were made from; None for point sets that are no grids, or were built
            by hand. With them an accelerator finds candidate points by itself; a CPU recognises grids without.

    Example:
        >>> levels = [GridLevel.of(torch.zeros(1, 16, 2, 3), stride=8)]
        >>> predictions = DensePredictions.from_sides(torch.zeros(1, 6, 80), torch.ones(1, 6, 4), levels)
        >>> predictions.boxes[0, 0].tolist()
        [-4.0, -4.0, 12.0, 12.0]
    """

    logits: Tensor
    boxes: Tensor
    points: Tensor
    strides: Tensor
    quality: Tensor | None = None
    distribution: Tensor | None = None
    levels: tuple[GridLevel, ...] | None = None

    @property
    def num_classes(self) -> int:
        """Class channels C."""
        return self.logits.shape[-1]

    @classmethod
    def on_grid(
        cls,
        logits: Tensor,
        boxes: Tensor,
        levels: Sequence[GridLevel],
        quality: Tensor | None = None,
        distribution: Tensor | None = None,
    ) -> Self:
        """Build predictions on regular grids; points and strides follow from ``levels``."""
        points, strides = _points_and_strides(levels, boxes.device)
        return cls(logits, boxes, points, strides, quality, distribution, tuple(levels))

    @classmethod
    def from_sides(
        cls,
        logits: Tensor,
        sides: Tensor,
        levels: Sequence[GridLevel],
        *,
        unit: Unit = "stride",
        quality: Tensor | None = None,
        distribution: Tensor | None = None,
    ) -> Self:
        """Build predictions of a head that outputs distances to the sides of the box, as FCOS does.

        Args:
            logits: ``(N, A, C)`` class logits.
            sides: ``(N, A, 4)`` distances from the point to the left, top, right and bottom side, not negative.
            levels: The grids of the L levels.
            unit: "stride" for distances in strides of their level, "pixel" for pixels.
            quality: ``(N, A)`` logits of a quality branch.
            distribution: ``(N, A, 4, R)`` logits over distance bins.

        Raises:
            OptionError: ``unit`` is neither.
            PredictionError: The numbers have another shape.
        """
        points, strides = _points_and_strides(levels, sides.device)
        boxes = boxes_from_sides(points, _pixels("sides", sides, strides, unit))
        return cls(logits, boxes, points, strides, quality, distribution, tuple(levels))

    @classmethod
    def from_centers(
        cls,
        logits: Tensor,
        centers: Tensor,
        levels: Sequence[GridLevel],
        *,
        unit: Unit = "stride",
        quality: Tensor | None = None,
    ) -> Self:
        """Build predictions of a head that outputs the centre and the size of the box, as YOLOX does.

        Args:
            logits: ``(N, A, C)`` class logits.
            centers: ``(N, A, 4)`` shift of the centre from the point in x and y, then width and height (not their
                logarithms). A head that counts from the cell's corner gives ``shift − 0.5`` strides.
            levels: The grids of the L levels.
            unit: "stride" for numbers in strides of their level, "pixel" for pixels.
            quality: ``(N, A)`` logits of a quality branch.

        Raises:
            OptionError: ``unit`` is neither.
            PredictionError: The numbers have another shape.
        """
        points, strides = _points_and_strides(levels, centers.device)
        boxes = boxes_from_centers(points, _pixels("centers", centers, strides, unit))
        return cls(logits, boxes, points, strides, quality, None, tuple(levels))

    @classmethod
    def from_anchors(
        cls,
        logits: Tensor,
        offsets: Tensor,
        anchors: Tensor,
        levels: Sequence[GridLevel],
        *,
        weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        quality: Tensor | None = None,
    ) -> Self:
        """Build predictions of a head that outputs offsets from anchor boxes, as RetinaNet and SSD do.

        Args:
            logits: ``(N, A, C)`` class logits.
            offsets: ``(N, A, 4)`` dx, dy in anchor sizes, then the logarithms of the scales of width and height.
            anchors: ``(A, 4)`` x1, y1, x2, y2 in pixels of the batch image.
            levels: The grids of the L levels, with ``anchors`` boxes a cell.
            weights: What the four offsets were multiplied by when they were encoded.
            quality: ``(N, A)`` logits of a quality branch.

        Raises:
            PredictionError: Anchors or offsets have another shape.
        """
        points, strides = _points_and_strides(levels, offsets.device)
        _validate_numbers("anchors", anchors, (len(points), 4))
        _validate_numbers("offsets", offsets, (None, len(points), 4))
        boxes = boxes_from_anchors(anchors, at_least_float32(offsets), weights)
        return cls(logits, boxes, points, strides, quality, None, tuple(levels))

    @classmethod
    def from_bins(
        cls,
        logits: Tensor,
        bins: Tensor,
        levels: Sequence[GridLevel],
        *,
        unit: Unit = "stride",
        quality: Tensor | None = None,
    ) -> Self:
        """Build predictions of a head that outputs a distribution over distances for each side, as GFL does.

        Args:
            logits: ``(N, A, C)`` class logits.
            bins: ``(N, A, 4, R)`` logits over the distances 0, 1, … R − 1 to the left, top, right and bottom side.
            levels: The grids of the L levels.
            unit: "stride" for distances in strides of their level, "pixel" for pixels.
            quality: ``(N, A)`` logits of a quality branch.

        Raises:
            OptionError: ``unit`` is neither.
            PredictionError: The numbers have another shape.
        """
        _validate_numbers("bins", bins, (None, None, 4, None))
        sides = expected_distance(bins)
        return cls.from_sides(logits, sides, levels, unit=unit, quality=quality, distribution=bins)


def labelled(predictions: DensePredictions, targets: Sequence[Target | None]) -> tuple[DensePredictions, list[Target]]:
    """Leave out the images without labels, whose target is None.

    Where none has labels, predictions of no image are left, of which every loss is a 0 with a gradient.

    Returns:
        Predictions and targets of the other images; the predictions themselves, if that is all of them.

    Example:
        >>> p = DensePredictions(torch.zeros(2, 1, 3), torch.zeros(2, 1, 4), torch.zeros(1, 2), torch.ones(1))
        >>> kept, targets = labelled(p, [None, {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}])
        >>> len(kept.logits), len(targets)
        (1, 1)
    """
    known = [target for target in targets if target is not None]
    if len(known) == len(targets):
        return predictions, known
    index = torch.tensor([i for i, target in enumerate(targets) if target is not None], dtype=torch.int64)
    index = send(index, predictions.logits.device)

    def part(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[index]

    kept = replace(
        predictions,
        logits=predictions.logits[index],
        boxes=predictions.boxes[index],
        quality=part(predictions.quality),
        distribution=part(predictions.distribution),
    )
    return kept, known


def _points_and_strides(levels: Sequence[GridLevel], device: torch.device) -> tuple[Tensor, Tensor]:
    """Points ``(A, 2)`` and strides ``(A,)`` of all levels, in pixels."""
    points = torch.cat([level.points(device) for level in levels])
    # Not len(level): that is a Python integer, and would fix a size that a tracer leaves open.
    counts = [level.height * level.width * level.anchors for level in levels]
    strides = torch.cat([points.new_full((n,), level.stride) for n, level in zip(counts, levels, strict=True)])
    return points, strides


def _validate_numbers(name: str, numbers: Tensor, shape: tuple[int | None, ...]) -> None:
    """Raise `PredictionError` unless a head's numbers have this shape, where None stands for any size."""
    # Compared while tracing, a size that is open would be fixed.
    if torch.compiler.is_compiling():
        return
    sizes = numbers.shape
    if len(sizes) != len(shape) or any(want not in (None, size) for size, want in zip(sizes, shape, strict=True)):
        raise PredictionError(
            expected=f"{name} of shape ({', '.join('*' if want is None else str(want) for want in shape)})",
            got=f"{tuple(sizes)}",
            where=f"DensePredictions, {name}",
            fix=remedy_of_shape(name, sizes, shape),
        )


def _pixels(name: str, numbers: Tensor, strides: Tensor, unit: Unit) -> Tensor:
    """Convert ``(N, A, 4)`` numbers to pixels, in float32 at least."""
    _validate_numbers(name, numbers, (None, len(strides), 4))
    if unit not in ("stride", "pixel"):
        raise OptionError(
            expected='unit "stride" or "pixel"', got=repr(unit), where="DensePredictions", fix="choose one of the two"
        )
    numbers = at_least_float32(numbers)
    return numbers * strides[:, None] if unit == "stride" else numbers


@dataclass(frozen=True)
class Assignment:
    """Which point learns which box: each point of an image at most once and, one-to-one, each box at most once.

    Pairs are ordered by image, then by target.

    Attributes:
        image: ``(M,)`` int64, the image of each pair.
        point: ``(M,)`` int64, the point of each pair, an index into A.
        target: ``(M,)`` int64, the box of each pair, an index into that image's G boxes.
        metric: ``(M,)`` float32, the task-aware metric of each pair; 0 for pairs outside the spatial prior.
        fallback: ``(M,)`` bool, whether the box had no free point inside the spatial prior and took the nearest one.
        unmatched: Boxes left without a point because an image has more boxes than points.
        non_finite: Candidate predictions that were NaN or infinite and therefore not considered.

    Example:
        >>> pair = torch.tensor([0])
        >>> assignment = Assignment(pair, pair, pair, torch.tensor([0.5]), torch.tensor([False]), unmatched=1)
        >>> len(assignment), assignment.num_boxes, assignment.unmatched_share, assignment.mean_metric
        (1, 2, 0.5, 0.25)
    """

    image: Tensor
    point: Tensor
    target: Tensor
    metric: Tensor
    fallback: Tensor
    unmatched: int = 0
    non_finite: int = 0

    @classmethod
    def empty(cls, device: torch.device) -> Self:
        """Build the assignment of a batch without boxes."""
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        return cls(nothing, nothing, nothing, nothing.float(), nothing.bool())

    def __len__(self) -> int:
        """Number of matched pairs."""
        return len(self.image)

    @property
    def num_boxes(self) -> int:
        """Boxes of the batch, matched or not, each counted once."""
        return len(torch.unique(torch.stack([self.image, self.target], dim=1), dim=0)) + self.unmatched

    @property
    def fallback_share(self) -> float:
        """Share of the boxes that took a point outside the spatial prior, one-to-one."""
        return float(self.fallback.sum()) / max(1, self.num_boxes)

    @property
    def unmatched_share(self) -> float:
        """Share of the boxes that were left without a point."""
        return self.unmatched / max(1, self.num_boxes)

    @property
    def mean_metric(self) -> float:
        """Mean of the metric over all boxes, one-to-one; 0 for those without a point inside the prior."""
        return float(self.metric.sum()) / max(1, self.num_boxes)


@dataclass(frozen=True)
class ForwardPass:
    """One pass of a student over a batch: everything that a loss may look at.

    Attributes:
        batch: The images.
        targets: N targets in pixels of the batch image, None for an image without labels; none while detecting.
        features: The pyramid, L maps ``(N, *, H, W)``.
        maps: What the student brings to the teacher's head: the pyramid, or the maps behind the first convolutions of
            its own head.
        predictions: What the student's own head predicts on them.

    Example:
        >>> from torchvision.models.detection import fcos_resnet50_fpn
        >>> from crosskd_assign import EndToEndDetector
        >>> model = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=64)
        >>> run = EndToEndDetector(model).eval().run([torch.rand(3, 64, 64)])
        >>> len(run.features), tuple(run.predictions.logits.shape)
        (5, (1, 86, 3))
    """

    batch: Batch
    targets: list[Target | None]
    features: list[Tensor]
    maps: list[Tensor]
    predictions: DensePredictions
