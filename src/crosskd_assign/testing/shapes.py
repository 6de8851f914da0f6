"""Checks of what an adapter returns: types, shapes, numbers, and scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..structures import Batch, DensePredictions
from ..symptoms import CONFIDENT, symptom_of_logits, symptom_of_quality
from ..validation import describe, validate_predictions
from .examination import Examination, check, fields, untouched
from .report import Finding, wrong

__all__ = ["features", "finite", "head", "preprocess", "scores", "strides"]


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
        blank = " × ".join(map(str, dict.fromkeys(exam.probe.image_size)))
        expected, got = f"{len(exam.maps)} levels as on the images", f"{len(found)} on a blank image of {blank} pixels"
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

    # 3. Grids of the same strides, where they are as large as the maps.
    grids = exam.predictions.levels or ()
    if [(grid.height, grid.width) for grid in grids] == [tuple(x.shape[-2:]) for x in exam.maps]:
        for i, (grid, stride) in enumerate(zip(grids, found, strict=True)):
            steps = (stride, height / grid.height, width / grid.width)  # torchvision's anchors take the last two
            if not 0.75 * min(steps) < grid.stride < 1.3 * max(steps):
                expected, got = f"a grid of stride {stride:g}, like the map of its size", f"stride {grid.stride:g}"
                fix = "give each level its own stride: GridLevel.of(x, stride)"
                return wrong(expected, got, where=f"{exam.name}.head().levels[{i}]", fix=fix)
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


@check("scores", after=("head", "finite"))
@torch.no_grad()
def scores(exam: Examination) -> Finding:
    """Check that logits are no probabilities, whatever the weights, that they are the whole score, and sure of some."""
    # 1. What stays within 0…1 in a head of strong random weights has been squashed.
    with untouched(exam.adapter), torch.no_grad():
        for parameter in exam.adapter.parameters():
            if parameter.is_floating_point():
                parameter.add_(parameter[0].numel() ** -0.5 * torch.randn_like(parameter) if parameter.dim() else 0)
        stirred = exam.head([x + (x.std() + 1) * torch.randn_like(x) for x in exam.small_maps])
    if symptom := symptom_of_logits(stirred.logits):
        return Finding.of(symptom)

    # 2. The product of class and objectness, one of which stands in quality.
    predictions = exam.predictions
    if symptom := symptom_of_quality(predictions):
        return Finding.of(symptom)
    if predictions.quality is not None and float((predictions.quality.sigmoid() > CONFIDENT).float().mean()) < 0.1:
        advice = "if it is an objectness, multiply it in with functional.product_logits, and leave quality out"
        return Finding("note", f"quality is below {CONFIDENT} nearly everywhere: {advice}")

    # 3. A teacher has to be sure of something.
    best = float(predictions.logits.amax().sigmoid())
    if best < CONFIDENT:
        return Finding(
            "note",
            f"no score on these images is above {best:.2g}: right for a fresh student; a teacher would have nothing to "
            "teach, so load its weights first",
        )
    return Finding("ok", f"scores are logits, up to {best:.2f} on these images")
