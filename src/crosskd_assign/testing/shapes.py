"""Checks of what an adapter returns: types, shapes, numbers, and boxes that move with their images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..geometry import scale
from ..structures import Batch, DensePredictions, Detection, Target
from ..validation import describe, validate_predictions
from .examination import Examination, check, fields
from .report import Finding, wrong

__all__ = ["boxes_and_images", "features", "finite", "head", "labels", "normalisation", "preprocess", "strides"]


@check("preprocess")
def preprocess(exam: Examination) -> Finding:
    """Check that `preprocess` returns a batch and a list of targets."""
    # 1. A tuple of both.
    where, n = f"{exam.name}.preprocess()", len(exam.images)
    result: Any = exam.preprocessed
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Batch):
        return wrong("a tuple of Batch and targets", describe(result), where=where, fix="return Batch(...), targets")
    batch, moved = result

    # 2. Images of one shape, and their sizes.
    if not isinstance(batch.images, Tensor) or batch.images.dim() != 4 or batch.images.shape[:2] != (n, 3):
        expected, fix = f"Batch.images of shape ({n}, 3, H, W)", "stack the images, padded"
        return wrong(expected, describe(batch.images), where=where, fix=fix)
    height, width = batch.image_size
    if len(batch.sizes) != n or not all(0 < h <= height and 0 < w <= width for h, w in batch.sizes):
        expected, fix = f"{n} Batch.sizes within ({height}, {width})", "give (height, width) of images inside padding"
        return wrong(expected, f"{batch.sizes}", where=where, fix=fix)
    came = tuple(tuple(image.shape[-2:]) for image in exam.images)
    if tuple(map(tuple, batch.original_sizes)) != came:
        fix = "give (height, width) of every image as it came in; detections are carried back to it"
        return wrong(f"Batch.original_sizes {came}", f"{batch.original_sizes}", where=where, fix=fix)

    # 3. As many targets as were given, none if none were.
    for given, returned in ((n, moved), (0, exam.adapter.preprocess(exam.images)[1])):
        if not isinstance(returned, list) or len(returned) != given:
            got = f"{len(returned)}" if isinstance(returned, list) else describe(returned)
            fix = "carry the targets along: return Batch(...), [...]"
            return wrong(f"a list of {given} targets for {given}", got, where=where, fix=fix)
    return Finding("ok", f"images become {tuple(batch.images.shape)}")


@check("features", after=("preprocess",))
def features(exam: Examination) -> Finding:
    """Check that `features` returns a list of maps."""
    where, n = f"{exam.name}.features()", len(exam.images)
    maps: Any = exam.maps
    if not isinstance(maps, (list, tuple)) or not maps:
        return wrong("a list of maps", describe(maps), where=where, fix="return the pyramid as a list")
    for i, x in enumerate(maps):
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[0] != n or 0 in x.shape or not x.is_floating_point():
            fix = "return one floating-point map a level, of all images"
            return wrong(f"a floating-point map of shape ({n}, *, H, W)", describe(x), where=f"{where}[{i}]", fix=fix)
    shapes = ", ".join(f"{x.shape[1]} × {x.shape[2]} × {x.shape[3]}" for x in maps)
    return Finding("ok", f"{len(maps)} maps of {shapes}")


@check("head", after=("features",))
def head(exam: Examination) -> Finding:
    """Check that `head` returns predictions whose shapes agree."""
    # 1. Predictions made of tensors.
    where, fix = f"{exam.name}.head()", "build them with DensePredictions.from_sides(...) or its kin"
    predictions: Any = exam.predictions
    if not isinstance(predictions, DensePredictions):
        return wrong("DensePredictions", describe(predictions), where=where, fix=fix)
    for name in ("logits", "boxes", "points", "strides"):
        value = getattr(predictions, name)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return wrong(f"floating-point {name}", describe(value), where=f"{where}.{name}", fix=fix)

    # 2. Their shapes.
    validate_predictions(predictions, where=where, images=len(exam.images))
    if 0 in predictions.logits.shape:
        got = f"logits of shape {tuple(predictions.logits.shape)}"
        return wrong("points and classes", got, where=where, fix="predict something")

    # 3. What the head has besides, and does besides.
    _, a, c = predictions.logits.shape
    extra = "".join(f", {name}" for name in list(fields(predictions))[2:])
    if exam.probe.edits_features:
        extra += "; it edits its maps in place, so the library gives it copies where others need them"
    return Finding("ok", f"{a} points, {c} class channels{extra}")


@check("strides", after=("features", "head"))
def strides(exam: Examination) -> Finding:
    """Check that each level has one plausible stride, the same along both axes and on every image."""
    # 1. A stride for each level, different from the others.
    where, found = f"{exam.name}.features()", exam.probe.strides
    if len(found) != len(exam.maps):
        expected, got = f"{len(exam.maps)} levels as on the images", f"{len(found)} on a blank one of 256 pixels"
        return wrong(expected, got, where=where, fix="return the same levels for every image")
    if any(stride < 1 for stride in found) or len(set(found)) != len(found):
        fix = "return maps of different sizes, none larger than the image; levels are told apart by their stride"
        return wrong("a stride of its own, of 1 or more, for every level", f"{found}", where=where, fix=fix)

    # 2. Maps as large as their strides tell.
    height, width = exam.image_size
    for i, (x, stride) in enumerate(zip(exam.maps, found, strict=True)):
        rows, columns = height / stride, width / stride
        if abs(x.shape[-2] - rows) > 1.01 or abs(x.shape[-1] - columns) > 1.01:
            expected, got = f"a map of {rows:g} × {columns:g} at stride {stride:g}", f"{x.shape[-2]} × {x.shape[-1]}"
            fix = "keep maps as (N, *, H, W), not transposed, with one stride for both axes"
            return wrong(expected, got, where=f"{where}[{i}]", fix=fix)
    if found != sorted(found):
        return Finding("note", f"{found}: coarse levels come first; that works as long as head() expects it")
    return Finding("ok", f"{found}")


@check("finite", after=("head",))
def finite(exam: Examination) -> Finding:
    """Check that all maps and predictions are numbers."""
    named = {f"features()[{i}]": x for i, x in enumerate(exam.maps)}
    named |= {f"head().{name}": value for name, value in fields(exam.predictions).items()}
    for name, value in named.items():
        if not value.isfinite().all():
            got = f"{1 - float(value.isfinite().float().mean()):.1%} NaN or infinite"
            fix = "look for a division by 0, the log of 0, or exp of a large number (clamp before it)"
            return wrong("finite values", got, where=f"{exam.name}.{name}", fix=fix)
    return Finding("ok", "all values are finite")


@check("labels", after=("head",))
def labels(exam: Examination) -> Finding:
    """Check that there is a class channel for every label."""
    channels = exam.predictions.num_classes
    if not exam.targets_given:
        return Finding("skipped", "no targets were given")
    used = torch.cat([target["labels"] for target in exam.targets])
    if len(used) == 0:
        return Finding("skipped", "the targets hold no boxes")
    low, high = int(used.min()), int(used.max())
    if low < 0 or high >= channels:
        fix = "map labels to channels 0…C − 1, or build the head with more classes"
        return wrong(f"labels in 0…{channels - 1}, one for each channel", f"{low}…{high}", where="targets", fix=fix)
    return Finding("ok", f"labels {low}…{high} have channels among {channels}")


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


@check("normalisation", after=("features",))
@torch.no_grad()
def normalisation(exam: Examination) -> Finding:
    """Check that pixels in 0…1 reach `features`, which normalises them itself, and not in place."""
    # 1. The batch, before features() and after.
    batch = exam.batch
    before = [x.clone() for x in exam.adapter.features(batch)]
    if finding := _unlike_pixels(exam, batch):
        return finding

    # 2. Mean and standard deviation are for such pixels.
    mean, std = exam.adapter.image_mean, exam.adapter.image_std
    numbers = [[round(x, 4) for x in values.flatten().tolist()] for values in (mean, std)]
    named = f"mean {numbers[0]} and std {numbers[1]}"
    if float(mean.abs().max()) > 3 or float(std.max()) > 3 or float(std.min()) <= 0:
        return wrong("image_mean and image_std for pixels in 0…1", named, where=exam.name, fix="divide them by 255")
    if not mean.any() and bool((std == 1).all()):
        sees = "the network sees pixels in 0…1, unless features() normalises them"
        return Finding("note", f"no image_mean and image_std: {sees}")

    # 3. They matter.
    mean.add_(0.25)  # in place: whoever holds the buffer sees it
    after = exam.adapter.features(exam.batch)
    mean.sub_(0.25)
    if all(map(torch.equal, before, after)):
        expected, got = f"features that depend on {named}", "features that ignore them"
        fix = "begin features() with self.normalize(batch), or leave image_mean and image_std out"
        return wrong(expected, got, where=f"{exam.name}.features()", fix=fix)
    return Finding("ok", f"features() normalises with {named}")


def _unlike_pixels(exam: Examination, used: Batch) -> Finding | None:
    """Find out whether a batch was edited by `features`, or holds something else than pixels in 0…1."""
    if not torch.equal(used.images, exam.batch.images):
        expected, fix = "batch.images unchanged", "work on a copy: student and teacher share one batch"
        return wrong(expected, "other values", where=f"{exam.name}.features()", fix=fix)
    if min(float(x.min()) for x in exam.images) < -0.01 or max(float(x.max()) for x in exam.images) > 1.01:
        return Finding("skipped", "the images given are not in 0…1")
    low, high = float(used.images.min()), float(used.images.max())
    if low < -0.1 or high > 1.1:
        got, where = f"{low:.3g}…{high:.3g}", f"{exam.name}.preprocess()"
        fix = "leave pixels in 0…1 there, because detectors share a batch, and normalise in features()"
        return wrong("Batch.images in 0…1", got, where=where, fix=fix)
    return None
