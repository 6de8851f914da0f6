"""Boxes: overlap measures that stay finite for every input, changes of coordinates, and decoding of heads' outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "area",
    "at_least_float32",
    "boxes_from_anchors",
    "boxes_from_centers",
    "boxes_from_sides",
    "clip",
    "expected_distance",
    "generalized_iou",
    "iou",
    "scale",
]


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32; leave float32 and float64. Pixel arithmetic in bfloat16 is off by pixels.

    Example:
        >>> at_least_float32(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


_LARGEST = 1e18  # pixels; the product of two larger sides would overflow float32
_SMALLEST = 1e-12  # square pixels


def area(boxes: Tensor) -> Tensor:
    """Compute areas ``(…,)`` of boxes ``(…, 4)`` in square pixels; 0 for inverted boxes.

    Example:
        >>> area(torch.tensor([0.0, 0, 4, 5]))
        tensor(20.)
    """
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(0, _LARGEST)
    return size[..., 0] * size[..., 1]


def _intersection_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(0, _LARGEST)
    intersection = overlap[..., 0] * overlap[..., 1]
    return intersection, area(a) + area(b) - intersection


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Compute the intersection over union of broadcastable boxes ``(…, 4)``; 0 where both are empty (torchvision: NaN).

    Example:
        >>> iou(torch.tensor([0.0, 0, 4, 4]), torch.tensor([0.0, 0, 4, 2]))
        tensor(0.5000)
    """
    intersection, union = _intersection_union(a, b)
    return intersection / union.clamp(min=_SMALLEST)


def generalized_iou(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    """Compute the generalised IoU in −1…1 of broadcastable boxes ``(…, 4)``; finite with finite gradient if empty.

    Source: Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019, Algorithm 1.

    Example:
        >>> generalized_iou(torch.tensor([0.0, 0, 4, 4]), torch.tensor([4.0, 0, 8, 4]))
        tensor(0.)
    """
    intersection, union = _intersection_union(a, b)
    hull = area(torch.cat([torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], dim=-1))
    return intersection / (union + eps) - (hull - union) / (hull + eps)


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut boxes ``(…, 4)`` at the borders of an image of ``size = (height, width)``.

    Example:
        >>> clip(torch.tensor([-3.0, 2, 20, 8]), (10, 16))
        tensor([ 0.,  2., 16.,  8.])
    """
    height, width = size
    x1, y1, x2, y2 = boxes.unbind(dim=-1)  # not [0::2]: small runtimes slice without steps
    sides = [x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)]
    return torch.stack(sides, dim=-1)


def scale(boxes: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Carry boxes ``(…, 4)`` from an image of ``source = (height, width)`` to the same image at ``target``.

    Example:
        >>> scale(torch.tensor([0.0, 2, 4, 8]), (10, 10), (20, 40))
        tensor([ 0.,  4., 16., 16.])
    """
    x1, y1, x2, y2 = boxes.unbind(dim=-1)
    x, y = target[1] / source[1], target[0] / source[0]
    return torch.stack([x1 * x, y1 * y, x2 * x, y2 * y], dim=-1)


_LARGEST_LOG_SCALE = math.log(1000 / 16)  # torchvision's bound: exp of an untrained output must not overflow


def boxes_from_sides(points: Tensor, sides: Tensor) -> Tensor:
    """Decode distances to the sides of a box.

    Args:
        points: ``(A, 2)`` x, y in pixels.
        sides: ``(…, A, 4)`` distances to the left, top, right and bottom side in pixels.

    Returns:
        ``(…, A, 4)`` boxes x1, y1, x2, y2 in pixels.

    Example:
        >>> boxes_from_sides(torch.tensor([[8.0, 8.0]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        tensor([[ 7.,  6., 11., 12.]])
    """
    return torch.cat([points - sides[..., :2], points + sides[..., 2:]], dim=-1)


def boxes_from_centers(points: Tensor, centers: Tensor) -> Tensor:
    """Decode shifts of the centre and sizes of a box.

    Args:
        points: ``(A, 2)`` x, y in pixels.
        centers: ``(…, A, 4)`` shift of the centre from the point in x and y, then width and height, in pixels.

    Returns:
        ``(…, A, 4)`` boxes x1, y1, x2, y2 in pixels.

    Example:
        >>> boxes_from_centers(torch.tensor([[8.0, 8.0]]), torch.tensor([[1.0, 0.0, 4.0, 6.0]]))
        tensor([[ 7.,  5., 11., 11.]])
    """
    center, half = points + centers[..., :2], centers[..., 2:] / 2
    return torch.cat([center - half, center + half], dim=-1)


def boxes_from_anchors(anchors: Tensor, offsets: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Decode offsets from anchor boxes.

    Source: Ren et al., "Faster R-CNN", NeurIPS 2015, eq. 2; weights and the bound on the logarithmic scales are
    torchvision's (``BoxCoder``).

    Args:
        anchors: ``(A, 4)`` x1, y1, x2, y2 in pixels.
        offsets: ``(…, A, 4)`` dx, dy in anchor sizes, then the logarithms of the scales of width and height.
        weights: What the four offsets were multiplied by when they were encoded.

    Returns:
        ``(…, A, 4)`` boxes x1, y1, x2, y2 in pixels.

    Example:
        >>> boxes_from_anchors(torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([[0.5, 0.0, 0.0, 0.0]]))
        tensor([[ 4.,  0., 12.,  8.]])
    """
    size = anchors[:, 2:] - anchors[:, :2]  # (A, 2)
    center = anchors[:, :2] + size / 2
    # Filled where they are: to send them to an accelerator would make the host wait for it.
    scaled = offsets / torch.stack([offsets.new_full((), weight) for weight in weights])
    center = scaled[..., :2] * size + center
    half = scaled[..., 2:].clamp(max=_LARGEST_LOG_SCALE).exp() * size / 2
    return torch.cat([center - half, center + half], dim=-1)


def expected_distance(bins: Tensor) -> Tensor:
    """Compute the expected distance ``(…,)`` of logits ``(…, R)`` over the distances 0, 1, … R − 1.

    In float32 at least.

    Source: Li et al., "Generalized Focal Loss", NeurIPS 2020, eq. 5.

    Example:
        >>> expected_distance(torch.zeros(5))
        tensor(2.)
    """
    bins = at_least_float32(bins)
    distances = torch.arange(bins.shape[-1], dtype=bins.dtype, device=bins.device)
    return (bins.softmax(dim=-1) * distances).sum(dim=-1)
