"""Validation of what comes in from outside, without device synchronisation.

`validate_target_values` and `validate_pixels` look at values, and take what is on the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .errors import ImageError, OptionError, PredictionError, TargetError
from .remedies import remedy_of_shape
from .structures import DensePredictions, Target

__all__ = [
    "describe",
    "validate_choice",
    "validate_classes",
    "validate_images",
    "validate_labels",
    "validate_option",
    "validate_pixels",
    "validate_precision",
    "validate_predictions",
    "validate_target_values",
    "validate_targets",
]


def describe(value: object) -> str:
    """Describe a value for an error message: shape and dtype of a tensor, the type of anything else."""
    if isinstance(value, tuple):
        return f"tuple of ({', '.join(map(describe, value))})"
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def validate_option(name: str, value: float, *, low: float, high: float = float("inf")) -> None:
    """Raise `OptionError` unless ``low <= value <= high``."""
    if not low <= value <= high:
        bounds = f"{name} of at least {low}" if high == float("inf") else f"{name} between {low} and {high}"
        raise OptionError(
            expected=bounds, got=f"{value}", where="constructor argument", fix=f"choose {name} in that range"
        )


def validate_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise `OptionError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        listed = " or ".join([", ".join(f'"{choice}"' for choice in choices[:-1]), f'"{choices[-1]}"'])
        raise OptionError(
            expected=f"{name} {listed}", got=repr(value), where="constructor argument", fix="choose one of these"
        )


def validate_classes(classes: Iterable[int], num_classes: int | None = None) -> tuple[int, ...]:
    """Sort the labels of a filter, each once; raise `OptionError` unless they are labels, and one at least."""
    given: list[Any] = list(classes)  # numbers of NumPy among them
    high = float("inf") if num_classes is None else num_classes - 1
    wrong = [
        label
        for label in given
        if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or not 0 <= label <= high
    ]
    if wrong or not given:
        last = "" if num_classes is None else f"{num_classes - 1}"
        raise OptionError(
            expected=f"classes among the labels 0…{last}",
            got=", ".join(map(repr, wrong)) or "none at all",
            where="classes",
            fix="list class channels of the detector, or leave classes out to keep all",
        )
    return tuple(sorted({int(label) for label in given}))


def validate_images(images: Sequence[Tensor] | Tensor) -> None:
    """Raise `ImageError` unless ``images`` are one or more ``(3, H, W)`` floating-point tensors of one kind."""
    if len(images) == 0:
        raise ImageError(expected="at least one image", got="none", where="images", fix="skip empty batches")
    for i, image in enumerate(images):
        where = f"images[{i}]"
        if not isinstance(image, Tensor):
            fix = "convert it, e.g. with torchvision.transforms.v2.functional.to_image and to_dtype(scale=True)"
            raise ImageError(expected="a tensor of shape (3, H, W)", got=type(image).__name__, where=where, fix=fix)
        if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ImageError(
                expected="a tensor of shape (3, H, W)",
                got=f"shape {tuple(image.shape)}",
                where=where,
                fix="pass a list of RGB images, channels first",
            )
        if not image.is_floating_point():
            raise ImageError(
                expected="pixels in 0…1", got=f"dtype {image.dtype}", where=where, fix="divide by 255 as floating point"
            )
        if _kind(image) != _kind(images[0]):
            raise ImageError(
                expected=f"images of one kind, {_kind(images[0])}",
                got=_kind(image),
                where=where,
                fix="give all images one dtype, device and layout",
            )


def _kind(x: Tensor) -> str:
    return f"{x.dtype}, {x.layout}, on {x.device}"


def validate_precision(images: Tensor, weights: Iterable[Tensor]) -> None:
    """Raise `ImageError` if a batch is float64, as numpy makes it, and the first weight is not.

    Other mixtures may be meant, under autocast for one.
    """
    first = next(iter(weights), images)
    if images.dtype == torch.float64 != first.dtype:
        raise ImageError(
            expected=f"pixels of {first.dtype}, like the network's weights",
            got=f"{images.dtype}",
            where="images, after preprocessing",
            fix="convert them with image.float()",
        )


def validate_pixels(sums: Tensor) -> None:
    """Raise `ImageError` naming the first image whose pixels are not finite.

    Args:
        sums: ``(N,)`` the sum of each image's pixels, float32 on the host; it is finite where all of them are.
    """
    bad = ~sums.isfinite()
    if bad.any():
        i = int(bad.int().argmax())
        raise ImageError(
            expected="finite pixels",
            got="NaN or infinity",
            where=f"images[{i}], after preprocessing",
            fix="look for a division by 0 in augmentation or normalisation, or a broken file",
        )


def validate_targets(targets: Sequence[Target | None] | None, images: Sequence[Tensor] | Tensor) -> None:
    """Raise `TargetError` unless every image has a target of right keys, shapes, dtypes and device.

    None stands for an image without labels.
    """
    if targets is None:
        raise TargetError(
            expected="targets in training mode",
            got="None",
            where="targets",
            fix="pass targets, or call .eval() to detect",
        )
    if len(targets) != len(images):
        raise TargetError(
            expected=f"{len(images)} targets, one an image",
            got=f"{len(targets)}",
            where="targets",
            fix="pair every image with one",
        )
    for i, target in enumerate(targets):
        if target is not None:
            _validate_target(target, i, images[i].device)


def validate_labels(targets: Sequence[Target | None] | None) -> None:
    """Raise `TargetError` if an image has no labels, where nothing could be learnt from it."""
    for i, target in enumerate(targets or ()):
        if target is None:
            raise TargetError(
                expected="a target",
                got="None, an image without labels",
                where=f"targets[{i}]",
                fix="leave the image out; only distillation learns from it; no objects: boxes of shape (0, 4)",
            )


def _validate_target(target: Target, i: int, device: torch.device) -> None:
    if not isinstance(target, Mapping) or not {"boxes", "labels"} <= target.keys():
        raise TargetError(
            expected='a dict with "boxes" and "labels"',
            got=f"keys {sorted(target)}" if isinstance(target, Mapping) else type(target).__name__,
            where=f"targets[{i}]",
            fix="give each image both; an image without objects has boxes of shape (0, 4)",
        )
    boxes: Any = target["boxes"]
    labels: Any = target["labels"]
    if not isinstance(boxes, Tensor) or boxes.dim() != 2 or boxes.shape[-1] != 4 or not boxes.is_floating_point():
        raise TargetError(
            expected="floating-point boxes of shape (G, 4)",
            got=describe(boxes),
            where=f'targets[{i}]["boxes"]',
            fix="use x1, y1, x2, y2 in pixels; no objects: torch.zeros(0, 4)",
        )
    whole = isinstance(labels, Tensor) and labels.dtype == torch.int64
    if not whole or labels.shape != boxes.shape[:1]:
        raise TargetError(
            expected=f"int64 labels of shape ({len(boxes)},), one a box",
            got=describe(labels),
            where=f'targets[{i}]["labels"]',
            fix="give one label a box" if whole else "convert them with labels.long()",
        )
    if boxes.layout != torch.strided or labels.layout != torch.strided:
        raise TargetError(
            expected="dense boxes and labels",
            got=f"{boxes.layout} and {labels.layout}",
            where=f"targets[{i}]",
            fix="call .to_dense()",
        )
    if boxes.device != device or labels.device != device:
        raise TargetError(
            expected=f"the device of the image, {device}",
            got=f"boxes on {boxes.device} and labels on {labels.device}",
            where=f"targets[{i}]",
            fix="move the targets there",
        )


def validate_target_values(
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
        raise TargetError(
            expected="a finite box with x1 < x2 and y1 < y2",
            got=f"{boxes[b].tolist()}",
            where=f'targets[{image[b]}]["boxes"][{target[b]}]',
            fix=(
                'if they are x, y, width, height, convert them: torchvision.ops.box_convert(boxes, "xywh", "xyxy"); '
                "if they are corners, drop such boxes: keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1), then "
                "boxes[keep], labels[keep]"
            ),
        )
    bad = (labels < 0) | (labels >= num_classes)
    if bad.any():
        b = int(bad.argmax())
        raise TargetError(
            expected=f"a label in 0…{num_classes - 1}",
            got=f"{labels[b]}",
            where=f'targets[{image[b]}]["labels"][{target[b]}]',
            fix=f"labels are class channels: {_channels(num_classes)}; build it with more classes, or map the labels",
        )


def _channels(count: int) -> str:
    """Name the labels that a detector of so many class channels learns."""
    if count == 1:
        return "0 alone; of a torchvision detector that is the background, so that K classes need num_classes=K + 1"
    last = count - 1
    objects = "1" if last == 1 else f"1…{last}"
    return f"{objects} for a torchvision detector of num_classes={count} (0 is its background), 0…{last} for an adapter"


def validate_predictions(predictions: DensePredictions, *, where: str, images: int) -> None:
    """Raise `PredictionError` unless they are predictions whose shapes agree with each other and with the batch."""
    if not isinstance(predictions, DensePredictions):
        raise PredictionError(
            expected="DensePredictions",
            got=describe(predictions),
            where=where,
            fix="return what DensePredictions.from_sides or one of its kin builds",
        )
    logits = predictions.logits

    def fault(name: str, expected: str, got: Sequence[int], shape: Sequence[int | None]) -> PredictionError:
        fix = remedy_of_shape(name, got, shape)
        return PredictionError(expected=expected, got=f"{got}", where=f"{where}.{name}", fix=fix)

    if logits.dim() != 3 or logits.shape[0] != images:
        raise fault("logits", f"logits of shape ({images}, A, C)", tuple(logits.shape), (images, None, None))
    a = logits.shape[1]
    fields: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("boxes", predictions.boxes, (images, a, 4)),
        ("points", predictions.points, (a, 2)),
        ("strides", predictions.strides, (a,)),
        ("quality", predictions.quality, (images, a)),
    ]
    for name, value, shape in fields:
        if value is not None and tuple(value.shape) != shape:
            raise fault(name, f"{name} of shape {shape} for {a} points", tuple(value.shape), shape)
    bins = predictions.distribution
    if bins is not None and (bins.dim() != 4 or bins.shape[:3] != (images, a, 4)):
        expected = f"distribution of shape ({images}, {a}, 4, R)"
        raise fault("distribution", expected, tuple(bins.shape), (images, a, 4, None))
    if predictions.levels is not None and sum(map(len, predictions.levels)) != a:
        raise fault("levels", f"levels that hold {a} points in all", [len(level) for level in predictions.levels], (a,))
