"""Transforms of (image, target) pairs for training."""

from __future__ import annotations

import math
from typing import Any, Literal

from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

Level = Literal["none", "flip", "crop", "full"]

GREY = 114  # fills what an image leaves empty: near ImageNet's mean, so about 0 when normalised
THIN = 2  # pixels; boxes with a shorter side cannot be found again
TIDY = (v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=THIN))  # the last step of every transform


def augmentation(size: int, level: Level, short_side: int = 0) -> v2.Transform:
    """Build a transform of (image, target) whose images have no side longer than ``size`` pixels.

    - ``"none"`` scales the longer side to ``size``.
    - ``"flip"`` also mirrors half of the images.
    - ``"crop"`` mirrors, scales by a further factor of 0.5 to 1.5 and takes a random square, grey where the image
      ends.
    - ``"full"`` does the same with a factor of 0.3 to 2 and changes colours; combine it with
      ``CocoDataset(mosaic=0.5)``.

    Boxes are clipped to the image; those thinner than 2 pixels are removed, together with their labels.

    Args:
        size: Largest side in pixels.
        level: How much the images vary.
        short_side: With ``"none"`` and ``"flip"``, also bound the shorter side, in pixels; 0: no such bound.
    """
    # 1. Mirror.
    steps: list[v2.Transform] = [] if level == "none" else [v2.RandomHorizontalFlip()]
    # 2. Scale, and crop.
    if level in ("none", "flip"):
        steps.append(_Stretch(size))
        # Leaves an image of that size alone.
        steps.append(v2.Resize(size=[short_side] if short_side else None, max_size=size))
    else:
        scales = (0.5, 1.5) if level == "crop" else (0.3, 2.0)
        steps.append(_Stretch(0.999 * size * scales[0]))  # a factor is drawn in float32
        steps.append(v2.ScaleJitter((size, size), scales))
        steps.append(v2.RandomCrop((size, size), pad_if_needed=True, fill=GREY))
    # 3. Change colours.
    if level == "full":
        steps.append(v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.6))  # a hue would triple the time
    return v2.Compose([*steps, *TIDY])


def short_sides(size: int, short_side: int = 0) -> tuple[int, ...]:
    """List the sizes of training on several scales: COCO's 480, 512, …, 800, or as much smaller as images are.

    Args:
        size: Longer side of the images, which bounds all where there is no bound of the shorter side.
        short_side: Bound of the shorter side; 0: none.

    Returns:
        Bounds of the side that bounds images: the shorter one, or the longer one without such a bound.
    """
    largest = short_side or size
    return tuple(round(largest * side / 800) for side in range(480, 801, 32))


def scaled_augmentations(size: int, level: Level, short_side: int = 0) -> dict[int, v2.Transform]:
    """Build the transforms for the sizes of `short_sides`, by size; the largest is `augmentation` itself."""
    return {
        side: augmentation(size, level, side) if short_side else augmentation(side, level)
        for side in short_sides(size, short_side)
    }


class _Stretch:
    """Stretch images that are so thin that one side would vanish when the other is scaled to ``size`` pixels."""

    def __init__(self, size: float) -> None:
        self.size = size

    def __call__(self, image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        least = math.ceil(max(image.shape[-2:]) / self.size) + 1  # one more, because the scaling rounds
        if min(image.shape[-2:]) * self.size >= max(image.shape[-2:]):
            return image, target
        sides = [max(side, least) for side in image.shape[-2:]]
        return functional.resize(image, sides), {**target, "boxes": functional.resize(target["boxes"], sides)}
