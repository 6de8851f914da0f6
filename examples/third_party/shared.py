"""What the adapters of this folder share: resizing, and the arithmetic from a head's numbers to boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosskd_assign import Batch, DetectorAdapter, GridLevel, Target

__all__ = ["ResizingAdapter", "boxes_from_sides", "mean_of_bins", "points_and_strides"]


class ResizingAdapter(DetectorAdapter):
    """A `DetectorAdapter` that resizes images first, as most detectors' own loaders do.

    Args:
        model: The network.
        size: Longer side of the images in pixels; 0 takes them as they come.
        options: Of `DetectorAdapter`: normalisation and padding.
    """

    model: Any  # what a foreign network holds is known at run time alone

    def __init__(self, model: nn.Module, *, size: int = 0, **options: Any) -> None:
        super().__init__(model, **options)
        self.size = size

    def preprocess(
        self, images: Sequence[Tensor] | Tensor, targets: Sequence[Target] | None = None
    ) -> tuple[Batch, list[Target] | None]:
        """Resize images and boxes, keeping the ratio of sides, then pad."""
        originals = tuple((image.shape[-2], image.shape[-1]) for image in images)
        sizes = tuple(self._target_size(height, width) for height, width in originals)
        resized = [_resized(image, size) for image, size in zip(images, sizes, strict=True)]
        batch = Batch(self.pad(resized), sizes, originals)
        if targets is None:
            return batch, None
        ratios = [(w / w0, h / h0) for (h, w), (h0, w0) in zip(sizes, originals, strict=True)]
        return batch, [
            {**target, "boxes": target["boxes"] * target["boxes"].new_tensor([x, y, x, y])}
            for target, (x, y) in zip(targets, ratios, strict=True)
        ]

    def _target_size(self, height: int, width: int) -> tuple[int, int]:
        scale = self.size / max(height, width) if self.size else 1.0
        return max(1, round(height * scale)), max(1, round(width * scale))


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    if (image.shape[-2], image.shape[-1]) == size:
        return image
    return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]


def points_and_strides(levels: Sequence[GridLevel], device: torch.device) -> tuple[Tensor, Tensor]:
    """Points ``(A, 2)`` in pixels and strides ``(A, 1)`` of all predictions, to decode boxes with."""
    points = [level.points(device) for level in levels]
    strides = [x.new_full((len(x), 1), level.stride) for x, level in zip(points, levels, strict=True)]
    return torch.cat(points), torch.cat(strides)


def mean_of_bins(bins: Tensor) -> Tensor:
    """Expected distance ``(…,)`` of logits ``(…, R)`` over the distances 0, 1, … R − 1, in float32."""
    distances = torch.arange(bins.shape[-1], dtype=torch.float32, device=bins.device)
    return (bins.float().softmax(dim=-1) * distances).sum(dim=-1)


def boxes_from_sides(points: Tensor, sides: Tensor) -> Tensor:
    """Boxes ``(N, A, 4)`` of points ``(A, 2)`` and distances to left, top, right and bottom, all in pixels."""
    return torch.cat([points - sides[..., :2], points + sides[..., 2:]], dim=-1)
