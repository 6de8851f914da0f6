"""Checks of what goes in: pixels, targets, boxes that move with their images, and normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from ..geometry import scale
from ..structures import Batch, Detection, Target
from ..symptoms import symptom_of_images, symptom_of_targets
from ..validation import validate_target_values
from .examination import Examination, check
from .report import Finding, wrong

__all__ = ["boxes_and_images", "normalisation", "pixels", "targets"]


@check("pixels")
def pixels(exam: Examination) -> Finding:
    """Check that the given images are in 0…1."""
    if symptom := symptom_of_images(exam.images):
        return Finding.of(symptom)
    low, high = min(float(x.min()) for x in exam.images), max(float(x.max()) for x in exam.images)
    return Finding("ok", f"images are in {low:.2f}…{high:.2f}")


@check("targets", after=("head",))
def targets(exam: Examination) -> Finding:
    """Check that boxes are corners in pixels of their images, and that there is a class channel for every label."""
    # 1. Boxes.
    if not exam.targets_given:
        return Finding("skipped", "no targets were given")
    sizes = [(image.shape[-2], image.shape[-1]) for image in exam.images]
    if symptom := symptom_of_targets(exam.targets, sizes):
        return Finding.of(symptom)

    # 2. Each box and each label, as training looks at them.
    channels = exam.predictions.num_classes
    counts = [len(target["labels"]) for target in exam.targets]
    boxes, used = (torch.cat([target[key] for target in exam.targets]).cpu() for key in ("boxes", "labels"))
    if len(used) == 0:
        return Finding("skipped", "the targets hold no boxes")
    image = np.repeat(np.arange(len(counts)), counts)
    place = np.concatenate([np.arange(count) for count in counts])
    validate_target_values(boxes.float().numpy(), used.numpy(), image, place, channels)
    reach = boxes / torch.tensor([(w, h, w, h) for h, w in sizes])[image]
    if len(used) >= 16 and float(reach.max()) < 0.55:
        return Finding("note", "all boxes lie in the upper left quarter of their images: are they of smaller ones?")
    low, high = int(used.min()), int(used.max())
    return Finding("ok", f"{len(used)} boxes in their images; labels {low}…{high} have channels among {channels}")


# --- boxes and images -------------------------------------------------------------------------------------------------


@check("boxes and images", after=("preprocess",))
def boxes_and_images(exam: Examination) -> Finding:
    """Check that a painted rectangle is where its box tells, and that detections return to where they came from."""
    for training in (False, True):  # some detectors resize in another way while training
        # 1. Preprocess painted images, which must only be read.
        images, targets = map(list, zip(*(_painted(image) for image in exam.images), strict=True))
        given = [*images, *(target["boxes"] for target in targets)]
        before = [x.clone() for x in given]
        exam.adapter.train(training)
        batch, moved = exam.adapter.preprocess(images, targets)
        if not all(map(torch.equal, before, given)):
            where, fix = f"{exam.name}.preprocess()", "work on copies: student and teacher share images and targets"
            return wrong("images and targets unchanged", "other values", where=where, fix=fix)

        # 2. Where are the rectangles now?
        for i, target in enumerate(moved):
            if fault := _misplaced(exam, images[i], targets[i], batch.images[i], target):
                return fault

        # 3. Carry their boxes back, as detections.
        if fault := None if training else _not_restored(exam, batch, moved, targets):
            return fault
    return Finding("ok", "a painted rectangle stays in its box, and detections return to the image that came in")


def _misplaced(
    exam: Examination, image: Tensor, target: Target, picture: Tensor, moved: Target | None
) -> Finding | None:
    """Find out whether a painted rectangle and its label have come through."""
    where = f"{exam.name}.preprocess()"
    if moved is None:
        return wrong("a target", "None", where=where, fix="carry the targets along")
    seen, box = _bright(picture), moved["boxes"][0].float()
    tolerance = 1.5 + max(picture.shape[-2] / image.shape[-2], picture.shape[-1] / image.shape[-1])
    if seen is None or float((seen - box).abs().max()) > tolerance:
        got = "nothing of the rectangle" if seen is None else f"the rectangle at {_pixels(seen)}"
        fix = "resize and pad boxes as you do images; boxes are x1, y1, x2, y2 in pixels of the batch"
        return wrong(f"a painted rectangle at its box {_pixels(box)}", got, where=where, fix=fix)
    if moved["labels"].tolist() != target["labels"].tolist():
        return wrong("labels carried along", f"{moved['labels'].tolist()}", where=where, fix="copy the labels")
    return None


def _not_restored(exam: Examination, batch: Batch, moved: Sequence[Any], targets: list[Target]) -> Finding | None:
    """Find out whether boxes, as detections, are carried back to the images that came in."""
    found: list[Detection] = [
        {"boxes": t["boxes"], "scores": torch.ones_like(t["boxes"][:, 0]), "labels": t["labels"]} for t in moved
    ]
    for detection, target, size in zip(exam.adapter.restore(found, batch), targets, batch.original_sizes, strict=True):
        box, truth = detection["boxes"], target["boxes"].to(detection["boxes"])
        if box.shape != truth.shape or float((box - truth).abs().max()) > 1 + 0.01 * max(size):
            expected, got = f"the box {_pixels(truth[0])} back", "none" if len(box) == 0 else _pixels(box[0])
            fix = "undo in restore() what preprocess() did to the boxes"
            return wrong(expected, got, where=f"{exam.name}.restore()", fix=fix)
    return None


def _painted(image: Tensor) -> tuple[Tensor, Target]:
    """Paint a white rectangle off the centre of a black image; return the image, and the rectangle as its target."""
    height, width = image.shape[-2:]
    unit = image.new_tensor([0.2, 0.3, 0.7, 0.6], dtype=torch.float32)[None]
    box = scale(unit, (1, 1), (height, width)).round()
    x1, y1, x2, y2 = box[0].int().tolist()
    picture = torch.zeros_like(image)
    picture[:, y1:y2, x1:x2] = 1
    return picture, Target(boxes=box, labels=torch.zeros(1, dtype=torch.int64, device=image.device))


def _bright(picture: Tensor) -> Tensor | None:
    """Find the box around the bright part of an image ``(3, H, W)``."""
    grey = picture.mean(0).float()
    bright = grey > (grey.min() + grey.max()) / 2
    if not bright.any():
        return None
    rows, columns = bright.any(1).nonzero(), bright.any(0).nonzero()
    return torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


def _pixels(box: Tensor) -> str:
    return f"{[round(x, 1) for x in box.tolist()]}"


# --- normalisation ----------------------------------------------------------------------------------------------------


@check("normalisation", after=("pixels", "features"))
@torch.no_grad()
def normalisation(exam: Examination) -> Finding:
    """Check that pixels in 0…1 reach `features`, which normalises them itself, and not in place."""
    # 1. The batch, before features() and after.
    batch, seen = exam.small_batch, list[Tensor]()
    with register_module_forward_pre_hook(
        lambda _, given: seen.extend(x for x in given if isinstance(x, Tensor) and x.dim() == 4)
    ):
        before = [x.clone() for x in exam.adapter.features(batch)]
    if finding := _unlike_pixels(exam, batch):
        return finding

    # 2. Mean and standard deviation are for such pixels, or the network sees pixels in 0…255 as they are.
    mean, std = exam.adapter.image_mean, exam.adapter.image_std
    numbers = [[round(x, 4) for x in values.flatten().tolist()] for values in (mean, std)]
    named = f"mean {numbers[0]} and std {numbers[1]}"
    large = float(mean.abs().max()) > 3 or float(std.max()) > 3
    if float(std.min()) <= 0 or (large and not (seen and float(seen[0].std(dim=(2, 3)).max()) > 0.1)):
        return wrong("image_mean and image_std for pixels in 0…1", named, where=exam.name, fix="divide them by 255")
    if not mean.any() and bool((std == 1).all()):
        sees = "the network sees pixels in 0…1, unless features() normalises them"
        return Finding("note", f"no image_mean and image_std: {sees}")

    # 3. They matter.
    shift = 0.25 if mean.is_floating_point() else 1
    mean.add_(shift)  # in place: whoever holds the buffer sees it
    after = exam.adapter.features(exam.small_batch)
    mean.sub_(shift)
    if all(map(torch.equal, before, after)):
        expected, got = f"features that depend on {named}", "features that ignore them"
        fix = "begin features() with self.normalize(batch), or leave image_mean and image_std out"
        return wrong(expected, got, where=f"{exam.name}.features()", fix=fix)
    return Finding("ok", f"features() normalises with {named}")


def _unlike_pixels(exam: Examination, used: Batch) -> Finding | None:
    """Find out whether a batch was edited by `features`, or holds something else than pixels in 0…1."""
    if not torch.equal(used.images, exam.small_batch.images):
        expected, fix = "batch.images unchanged", "work on a copy: student and teacher share one batch"
        return wrong(expected, "other values", where=f"{exam.name}.features()", fix=fix)
    low, high = float(used.images.min()), float(used.images.max())
    if low < -0.1 or high > 1.1:
        got, where = f"{low:.3g}…{high:.3g}", f"{exam.name}.preprocess()"
        fix = "leave pixels in 0…1 there, because detectors share a batch, and normalise in features()"
        return wrong("Batch.images in 0…1", got, where=where, fix=fix)
    return None
