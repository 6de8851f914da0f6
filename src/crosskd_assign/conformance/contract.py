"""Checks of what an adapter returns: types, shapes, numbers, and boxes that go with their images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import PredictionError
from ..geometry import scale
from ..structures import Batch, DensePredictions, Detection, Target
from ..validation import check_predictions
from .examination import Examination, Finding, Note, Skip, wrong

__all__ = ["boxes_and_images", "features", "finite", "head", "labels", "normalisation", "preprocess", "strides"]


def preprocess(e: Examination) -> Finding:
    """A batch and targets of the right form."""
    where = f"{e.name}.preprocess()"
    result: Any = e.adapter.preprocess(e.images, e.targets)
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Batch):
        raise wrong("a tuple of Batch and targets", _described(result), where, "return Batch(...), targets")
    batch, moved = result
    n = len(e.images)
    if not isinstance(batch.images, Tensor) or batch.images.dim() != 4 or batch.images.shape[:2] != (n, 3):
        raise wrong(
            f"Batch.images of shape ({n}, 3, H, W)", _described(batch.images), where, "stack the images, padded"
        )
    height, width = batch.images.shape[-2:]
    inside = len(batch.sizes) == n and all(0 < h <= height and 0 < w <= width for h, w in batch.sizes)
    if not inside:
        fix = "give (height, width) of every image inside its padding"
        raise wrong(f"{n} Batch.sizes within ({height}, {width})", f"{batch.sizes}", where, fix)
    came = tuple(tuple(image.shape[-2:]) for image in e.images)
    if tuple(map(tuple, batch.original_sizes)) != came:
        fix = "give (height, width) of every image as it came in; detections are carried back to it"
        raise wrong(f"Batch.original_sizes {came}", f"{batch.original_sizes}", where, fix)
    if moved is None or len(moved) != n:
        raise wrong(f"{n} targets in pixels of the batch", _described(moved), where, "carry the targets along")
    e._batch = batch
    return f"images become {tuple(batch.images.shape)}"


def features(e: Examination) -> Finding:
    """A list of maps."""
    where = f"{e.name}.features()"
    with torch.no_grad():
        maps: Any = e.adapter.features(e.batch)
    if not isinstance(maps, (list, tuple)) or not maps:
        raise wrong("a list of maps", _described(maps), where, "return the pyramid as a list")
    for i, x in enumerate(maps):
        n = len(e.images)
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[0] != n or 0 in x.shape or not x.is_floating_point():
            fix = "return one floating-point map a level, of all images"
            raise wrong(f"a floating-point map of shape ({n}, *, H, W)", _described(x), f"{where}[{i}]", fix)
    e._maps = list(maps)
    return f"{len(maps)} maps of {', '.join(f'{x.shape[1]} × {x.shape[2]} × {x.shape[3]}' for x in maps)}"


def strides(e: Examination) -> Finding:
    """One plausible stride a level, the same along both axes and on every image."""
    where = f"{e.name}.features()"
    levels = e.adapter.pyramid()
    found = [level.stride for level in levels]
    if len(found) != len(e.maps):
        fix = "return the same levels for every image"
        raise wrong(f"{len(e.maps)} levels as on the images", f"{len(found)} on a blank one of 256 pixels", where, fix)
    if any(stride < 1 for stride in found) or len(set(found)) != len(found):
        fix = "return maps of different sizes, none larger than the image; levels are told apart by their stride"
        raise wrong("a stride of its own, of 1 or more, for every level", f"{found}", where, fix)
    e._strides = found
    height, width = e.batch.images.shape[-2:]
    for i, (x, stride) in enumerate(zip(e.maps, found, strict=True)):
        expected = height / stride, width / stride
        if abs(x.shape[-2] - expected[0]) > 1.01 or abs(x.shape[-1] - expected[1]) > 1.01:
            fix = "keep maps as (N, *, H, W), not transposed, with one stride for both axes"
            got = f"{x.shape[-2]} × {x.shape[-1]}"
            raise wrong(f"a map of {expected[0]:g} × {expected[1]:g} at stride {stride:g}", got, f"{where}[{i}]", fix)
    if found != sorted(found):
        return Note(f"{found}: coarse levels come first; that works as long as head() expects it")
    return f"{found}"


def head(e: Examination) -> Finding:
    """Predictions whose shapes agree."""
    where = f"{e.name}.head()"
    predictions: Any = e.head(e.maps, e.batch)
    if not isinstance(predictions, DensePredictions):
        raise wrong("DensePredictions", _described(predictions), where, "build it with DensePredictions.on_grid(...)")
    for name in ("logits", "boxes", "points", "strides"):
        value = getattr(predictions, name)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise wrong(f"floating-point {name}", _described(value), where, "give all fields as float tensors")
    try:
        check_predictions(predictions, where=where, images=len(e.images))
    except PredictionError as error:
        text, _, fix = str(error).partition(" Fix: ")
        raise wrong("fields that agree in shape", f"a contradiction: {text}", where, fix.rstrip(".")) from None
    if 0 in predictions.logits.shape:
        raise wrong(
            "points and classes", f"logits of shape {tuple(predictions.logits.shape)}", where, "predict something"
        )
    e._predictions = predictions
    _, a, c = predictions.logits.shape
    branches = [name for name in ("quality", "distribution") if getattr(predictions, name) is not None]
    return f"{a} points, {c} class channels{''.join(f', {name}' for name in branches)}"


def finite(e: Examination) -> Finding:
    """Numbers."""
    named = {f"features()[{i}]": x for i, x in enumerate(e.maps)}
    named |= {f"head().{name}": getattr(e.predictions, name) for name in ("logits", "boxes", "quality", "distribution")}
    for name, value in named.items():
        if value is not None and not value.isfinite().all():
            share = 1 - float(value.isfinite().float().mean())
            fix = "look for a division by 0, the log of 0, or exp of a large number (clamp before it)"
            raise wrong("finite values", f"{share:.1%} NaN or infinite", f"{e.name}.{name}", fix)
    return "all values are finite"


def labels(e: Examination) -> Finding:
    """A channel for every label."""
    channels = e.predictions.logits.shape[-1]
    if not e.given:
        raise Skip("no targets were given")
    used = torch.cat([target["labels"] for target in e.targets])
    if len(used) == 0:
        raise Skip("the targets hold no boxes")
    low, high = int(used.min()), int(used.max())
    if low < 0 or high >= channels:
        fix = "map labels to channels 0…C − 1, or build the head with more classes"
        raise wrong(f"labels in 0…{channels - 1}, one for each channel", f"{low}…{high}", "targets", fix)
    return f"labels {low}…{high} have channels among {channels}"


def boxes_and_images(e: Examination) -> Finding:
    """A painted rectangle is where its box says, and detections return to where they came from."""
    where = f"{e.name}.preprocess()"
    images, targets = zip(*(_painted(image) for image in e.images), strict=True)
    for training in (False, True):  # some detectors resize in another way while training
        e.adapter.train(training)
        batch, moved = e.adapter.preprocess(list(images), list(targets))
        for i, (picture, target) in enumerate(zip(batch.images, moved or [], strict=True)):
            seen, box = _bright(picture), target["boxes"][0].float()
            tolerance = 1.5 + max(picture.shape[-2] / images[i].shape[-2], picture.shape[-1] / images[i].shape[-1])
            if seen is None or float((seen - box).abs().max()) > tolerance:
                got = "nothing of the rectangle" if seen is None else f"the rectangle at {_pixels(seen)}"
                fix = "resize and pad boxes as you do images; boxes are x1, y1, x2, y2 in pixels of the batch"
                raise wrong(f"a painted rectangle at its box {_pixels(box)}", got, where, fix)
            if target["labels"].tolist() != targets[i]["labels"].tolist():
                raise wrong("labels carried along", f"{target['labels'].tolist()}", where, "copy the labels")
        if not training:
            _check_restored(e, batch, moved or [], list(targets))
    return "a painted rectangle stays in its box, and detections return to the image that came in"


def _check_restored(e: Examination, batch: Batch, moved: list[Target], targets: list[Target]) -> None:
    found: list[Detection] = [
        {"boxes": t["boxes"], "scores": torch.ones_like(t["boxes"][:, 0]), "labels": t["labels"]} for t in moved
    ]
    for detection, target, size in zip(e.adapter.restore(found, batch), targets, batch.original_sizes, strict=True):
        box, truth = detection["boxes"], target["boxes"].to(detection["boxes"])
        if box.shape != truth.shape or float((box - truth).abs().max()) > 1 + 0.01 * max(size):
            got = "none" if len(box) == 0 else _pixels(box[0])
            fix = "undo in restore() what preprocess() did to the boxes"
            raise wrong(f"the box {_pixels(truth[0])} back", got, f"{e.name}.restore()", fix)


def _painted(image: Tensor) -> tuple[Tensor, Target]:
    """A black image with a white rectangle off its centre, and the rectangle as a target."""
    height, width = image.shape[-2:]
    unit = image.new_tensor([0.2, 0.3, 0.7, 0.6], dtype=torch.float32)[None]
    box = scale(unit, (1, 1), (height, width)).round()
    x1, y1, x2, y2 = box[0].int().tolist()
    picture = torch.zeros_like(image)
    picture[:, y1:y2, x1:x2] = 1
    return picture, Target(boxes=box, labels=torch.zeros(1, dtype=torch.int64, device=image.device))


def _bright(picture: Tensor) -> Tensor | None:
    """The box around the bright part of an image ``(3, H, W)``."""
    grey = picture.mean(0).float()
    bright = grey > (grey.min() + grey.max()) / 2
    if not bright.any():
        return None
    rows, columns = bright.any(1).nonzero(), bright.any(0).nonzero()
    return torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]).float()


def normalisation(e: Examination) -> Finding:
    """Pixels in 0…1 reach `features`, which normalises them itself."""
    if min(float(x.min()) for x in e.images) < -0.01 or max(float(x.max()) for x in e.images) > 1.01:
        raise Skip("the images given are not in 0…1")
    low, high = float(e.batch.images.min()), float(e.batch.images.max())
    if low < -0.1 or high > 1.1:
        fix = "leave pixels in 0…1 there, because detectors share a batch, and normalise in features()"
        raise wrong("Batch.images in 0…1", f"{low:.3g}…{high:.3g}", f"{e.name}.preprocess()", fix)
    mean, std = e.adapter.image_mean, e.adapter.image_std
    got = (
        f"mean {[round(x, 4) for x in mean.flatten().tolist()]} and std {[round(x, 4) for x in std.flatten().tolist()]}"
    )
    if float(mean.abs().max()) > 3 or float(std.max()) > 3 or float(std.min()) <= 0:
        raise wrong("image_mean and image_std for pixels in 0…1", got, e.name, "divide them by 255")
    if not mean.any() and bool((std == 1).all()):
        return Note("no image_mean and image_std: the network sees pixels in 0…1, unless features() normalises them")
    with torch.no_grad():
        before = [x.clone() for x in e.adapter.features(e.batch)]
        mean.add_(0.25)  # in place: whoever holds the buffer sees it
        after = e.adapter.features(e.batch)
        mean.sub_(0.25)
    if all(torch.equal(x, y) for x, y in zip(before, after, strict=True)):
        fix = "begin features() with self.normalize(batch), or leave image_mean and image_std out"
        raise wrong(f"features that depend on {got}", "features that ignore them", f"{e.name}.features()", fix)
    return f"features() normalises with {got}"


def _described(value: object) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else f"{type(value).__name__}"


def _pixels(box: Tensor) -> str:
    return f"{[round(x, 1) for x in box.tolist()]}"
