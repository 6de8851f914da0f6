"""The records that flow through the library.

Shape legend, the same in every docstring:

``N`` images of a batch, ``L`` pyramid levels, ``A`` points of all levels, ``C`` classes, ``G`` boxes of one image,
``B`` boxes of the whole batch, ``K`` candidate points of a box, ``M`` matched pairs, ``D`` detections of one image.

Boxes are ``x1, y1, x2, y2`` in pixels of the padded batch image unless a docstring says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import NotRequired, Self, TypedDict

__all__ = ["Assignment", "Batch", "DensePredictions", "Detection", "GridLevel", "Target"]


class Target(TypedDict):
    """Ground truth of one image, as torchvision's detectors take it. Further keys are carried along unread.

    ``boxes`` is ``(G, 4)`` floating point with ``x1 < x2`` and ``y1 < y2`` in pixels of the image that came in;
    ``labels`` is ``(G,)`` int64, each a channel index of the student's class logits.
    """

    boxes: Tensor
    labels: Tensor
    image_id: NotRequired[Tensor]


class Detection(TypedDict):
    """Detections of one image, best first: ``boxes (D, 4)``, ``scores (D,)``, ``labels (D,)``."""

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
    """

    images: Tensor
    sizes: tuple[tuple[int, int], ...]
    original_sizes: tuple[tuple[int, int], ...]


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
    """

    height: int
    width: int
    stride: float
    step: tuple[float, float]
    origin: tuple[float, float]
    anchors: int = 1

    @classmethod
    def of(cls, feature: Tensor, stride: float, *, anchors: int = 1) -> Self:
        """The usual grid of a feature map ``(N, *, H, W)``: one point in the middle of every cell."""
        height, width = feature.shape[-2:]
        return cls(height, width, stride, (stride, stride), (stride / 2, stride / 2), anchors)

    def __len__(self) -> int:
        """Number of predictions on this level."""
        return self.height * self.width * self.anchors

    def points(self, device: torch.device | str | None = None) -> Tensor:
        """Positions of the predictions, ``(len(self), 2)`` float32 ``x, y`` pixels."""
        x = torch.arange(self.width, dtype=torch.float32, device=device) * self.step[0] + self.origin[0]
        y = torch.arange(self.height, dtype=torch.float32, device=device) * self.step[1] + self.origin[1]
        grid = torch.stack([x.expand(self.height, -1), y[:, None].expand(-1, self.width)], dim=-1)  # (H, W, 2)
        return grid.reshape(-1, 2).repeat_interleave(self.anchors, dim=0)


@dataclass(frozen=True)
class DensePredictions:
    """What one pass of a dense detector's head says, all levels concatenated.

    Attributes:
        logits: ``(N, A, C)`` class logits, before the sigmoid.
        boxes: ``(N, A, 4)`` decoded boxes in pixels of the padded batch image.
        points: ``(A, 2)`` ``x, y`` of the point each prediction is made from, in pixels.
        strides: ``(A,)`` stride of the level each prediction belongs to, in pixels.
        quality: ``(N, A)`` centerness, objectness or IoU logits; None for heads without such a branch.
        distribution: ``(N, A, 4, R)`` logits over R distance bins for each side of the box; None for heads that predict
            the distances themselves.
        levels: The regular grids that ``points`` were made from. With them candidate points are found by arithmetic;
            None for point sets that are no grids.
    """

    logits: Tensor
    boxes: Tensor
    points: Tensor
    strides: Tensor
    quality: Tensor | None = None
    distribution: Tensor | None = None
    levels: tuple[GridLevel, ...] | None = None

    @classmethod
    def on_grid(
        cls,
        logits: Tensor,
        boxes: Tensor,
        levels: Sequence[GridLevel],
        quality: Tensor | None = None,
        distribution: Tensor | None = None,
    ) -> Self:
        """Predictions on regular grids; points and strides follow from ``levels``."""
        device = boxes.device
        points = torch.cat([level.points(device) for level in levels])
        # Not len(level): that is a Python integer, and would fix a size that a tracer leaves open.
        counts = [level.height * level.width * level.anchors for level in levels]
        strides = torch.cat([points.new_full((n,), level.stride) for n, level in zip(counts, levels, strict=True)])
        return cls(logits, boxes, points, strides, quality, distribution, tuple(levels))


@dataclass(frozen=True)
class Assignment:
    """Which point learns which box: each box at most once, each point of an image at most once.

    Pairs are ordered by image, then by target.

    Attributes:
        image: ``(M,)`` int64, the image of each pair.
        point: ``(M,)`` int64, the point of each pair, an index into A.
        target: ``(M,)`` int64, the box of each pair, an index into that image's G boxes.
        metric: ``(M,)`` float32, the task-aware metric of each pair; 0 for pairs outside the spatial prior.
        fallback: ``(M,)`` bool, whether the box had no free point inside the spatial prior and took the nearest one.
        unmatched: Boxes left without a point because an image has more boxes than points.
        non_finite: Candidate predictions that were NaN or infinite and therefore not considered.
    """

    image: Tensor
    point: Tensor
    target: Tensor
    metric: Tensor
    fallback: Tensor
    unmatched: int = 0
    non_finite: int = 0

    def __len__(self) -> int:
        """Number of matched pairs."""
        return len(self.image)
