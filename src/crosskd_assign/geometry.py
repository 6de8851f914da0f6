"""Boxes: overlap measures that stay finite for every input, and coordinate changes."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["area", "at_least_float32", "clip", "generalized_iou", "iou", "scale"]


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay. Pixel arithmetic in bfloat16 is off by pixels."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


_LARGEST = 1e18  # pixels; the product of two larger sides would overflow float32
_SMALLEST = 1e-12  # square pixels


def area(boxes: Tensor) -> Tensor:
    """Areas ``(…,)`` of boxes ``(…, 4)`` in square pixels; 0 for inverted boxes."""
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(0, _LARGEST)
    return size[..., 0] * size[..., 1]


def _intersection_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(0, _LARGEST)
    intersection = overlap[..., 0] * overlap[..., 1]
    return intersection, area(a) + area(b) - intersection


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of broadcastable boxes ``(…, 4)``; 0 where both boxes are empty (torchvision: NaN)."""
    intersection, union = _intersection_union(a, b)
    return intersection / union.clamp(min=_SMALLEST)


def generalized_iou(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    """Generalised IoU in −1…1 of broadcastable boxes ``(…, 4)``, finite with finite gradient for empty boxes too.

    Source: Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019, Algorithm 1.
    """
    intersection, union = _intersection_union(a, b)
    hull = area(torch.cat([torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], dim=-1))
    return intersection / (union + eps) - (hull - union) / (hull + eps)


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes ``(…, 4)`` cut at the borders of an image of ``size = (height, width)``."""
    height, width = size
    x = boxes[..., 0::2].clamp(0, width)
    y = boxes[..., 1::2].clamp(0, height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)


def scale(boxes: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Boxes ``(…, 4)`` carried from an image of ``source = (height, width)`` to the same image at ``target``."""
    x = boxes[..., 0::2] * (target[1] / source[1])
    y = boxes[..., 1::2] * (target[0] / source[0])
    return torch.stack([x, y], dim=-1).flatten(-2)
