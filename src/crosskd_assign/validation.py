"""Checks of what comes in from outside. All here are free of device synchronisation but `check_target_values`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import ImageError, OptionError, PredictionError, TargetError, problem
from .structures import DensePredictions, Target

__all__ = ["check_images", "check_option", "check_predictions", "check_target_values", "check_targets"]


def check_option(name: str, value: float, *, low: float, high: float = float("inf")) -> None:
    """Raise `OptionError` unless ``low <= value <= high``."""
    if not low <= value <= high:
        bounds = f"{name} of at least {low}" if high == float("inf") else f"{name} between {low} and {high}"
        raise OptionError(problem(bounds, f"{value}", "constructor argument", f"choose {name} in that range"))


def check_images(images: Sequence[Tensor] | Tensor) -> None:
    """Raise `ImageError` unless ``images`` is a non-empty sequence of ``(3, H, W)`` floating-point tensors."""
    if len(images) == 0:
        raise ImageError(problem("at least one image", "none", "images", "skip empty batches in your loader"))
    for i, image in enumerate(images):
        where = f"images[{i}]"
        if not isinstance(image, Tensor):
            fix = "convert it, e.g. with torchvision.transforms.v2.functional.to_image and to_dtype(scale=True)"
            raise ImageError(problem("a tensor of shape (3, H, W)", type(image).__name__, where, fix))
        if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
            fix = "pass a list of RGB images, channels first"
            raise ImageError(problem("a tensor of shape (3, H, W)", f"shape {tuple(image.shape)}", where, fix))
        if not image.is_floating_point():
            raise ImageError(problem("pixels in 0…1", f"dtype {image.dtype}", where, "divide by 255 as floating point"))


def check_targets(targets: Sequence[Target] | None, images: Sequence[Tensor] | Tensor) -> None:
    """Raise `TargetError` unless every image has a target of right keys, shapes, dtypes and device."""
    if targets is None:
        fix = "pass targets, or call .eval() to detect"
        raise TargetError(problem("targets in training mode", "None", "targets", fix))
    if len(targets) != len(images):
        raise TargetError(
            problem(f"{len(images)} targets, one an image", f"{len(targets)}", "targets", "pair every image with one")
        )
    for i, target in enumerate(targets):
        _check_target(target, i, images[i].device)


def _check_target(target: Target, i: int, device: torch.device) -> None:
    if not isinstance(target, Mapping) or not {"boxes", "labels"} <= target.keys():
        got = f"keys {sorted(target)}" if isinstance(target, Mapping) else type(target).__name__
        fix = "give each image both; an image without objects has boxes of shape (0, 4)"
        raise TargetError(problem('a dict with "boxes" and "labels"', got, f"targets[{i}]", fix))
    boxes: Any = target["boxes"]
    labels: Any = target["labels"]
    if not isinstance(boxes, Tensor) or boxes.dim() != 2 or boxes.shape[-1] != 4 or not boxes.is_floating_point():
        fix = "use x1, y1, x2, y2 in pixels; no objects: torch.zeros(0, 4)"
        where = f'targets[{i}]["boxes"]'
        raise TargetError(problem("floating-point boxes of shape (G, 4)", _described(boxes), where, fix))
    if not isinstance(labels, Tensor) or labels.shape != boxes.shape[:1] or labels.dtype != torch.int64:
        expected = f"int64 labels of shape ({len(boxes)},), one a box"
        where = f'targets[{i}]["labels"]'
        raise TargetError(problem(expected, _described(labels), where, "use labels.long(), one a box"))
    if boxes.device != device or labels.device != device:
        got = f"boxes on {boxes.device} and labels on {labels.device}"
        raise TargetError(problem(f"the device of the image, {device}", got, f"targets[{i}]", "move the targets there"))


def _described(value: object) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def check_target_values(
    boxes: NDArray[np.float32],
    labels: NDArray[np.int64],
    image: NDArray[np.int64],
    target: NDArray[np.int64],
    num_classes: int,
) -> None:
    """Raise `TargetError` naming the first box that is inverted, empty or not finite, or whose label has no channel.

    Takes host arrays: the assigner calls it on what it has brought to the host anyway, so it costs no synchronisation.

    Args:
        boxes: ``(B, 4)`` boxes of the whole batch.
        labels: ``(B,)`` their labels.
        image: ``(B,)`` their image.
        target: ``(B,)`` their index within the image.
        num_classes: C of the student.
    """
    bad = ~(np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] > boxes[:, :2]).all(axis=1))
    if bad.any():
        b = int(bad.argmax())
        where = f'targets[{image[b]}]["boxes"][{target[b]}]'
        fix = "drop such boxes; torchvision.transforms.v2.SanitizeBoundingBoxes does"
        raise TargetError(problem("a finite box with x1 < x2 and y1 < y2", f"{boxes[b].tolist()}", where, fix))
    bad = (labels < 0) | (labels >= num_classes)
    if bad.any():
        b = int(bad.argmax())
        where = f'targets[{image[b]}]["labels"][{target[b]}]'
        fix = f"map labels to the student's {num_classes} class channels, or build it with more classes"
        raise TargetError(problem(f"a label in 0…{num_classes - 1}", f"{labels[b]}", where, fix))


def check_predictions(predictions: DensePredictions, *, where: str, images: int) -> None:
    """Raise `PredictionError` unless all shapes of ``predictions`` agree with each other and with the batch."""
    logits, boxes, points, strides = predictions.logits, predictions.boxes, predictions.points, predictions.strides
    fix = "concatenate all levels in one order for every field"
    if logits.dim() != 3 or logits.shape[0] != images:
        raise PredictionError(
            problem(f"logits of shape ({images}, A, C)", f"{tuple(logits.shape)}", f"{where}.logits", fix)
        )
    a = logits.shape[1]
    fields: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("boxes", boxes, (images, a, 4)),
        ("points", points, (a, 2)),
        ("strides", strides, (a,)),
        ("quality", predictions.quality, (images, a)),
    ]
    for name, value, shape in fields:
        if value is not None and tuple(value.shape) != shape:
            raise PredictionError(
                problem(f"{name} of shape {shape} for {a} points", f"{tuple(value.shape)}", f"{where}.{name}", fix)
            )
    bins = predictions.distribution
    if bins is not None and (bins.dim() != 4 or bins.shape[:3] != (images, a, 4)):
        expected = f"distribution of shape ({images}, {a}, 4, R)"
        raise PredictionError(problem(expected, f"{tuple(bins.shape)}", f"{where}.distribution", fix))
    if predictions.levels is not None and sum(map(len, predictions.levels)) != a:
        got = f"{[len(level) for level in predictions.levels]}"
        raise PredictionError(problem(f"levels that hold {a} points in all", got, f"{where}.levels", fix))
