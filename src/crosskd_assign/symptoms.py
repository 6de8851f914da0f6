"""Symptoms: how images, targets and predictions look that have another form than the library takes.

All of these train without an error, and to no good. A symptom is the error that would be raised if it were certain;
`check_adapter` reports it, the first training step warns of it.
"""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from .distributed import is_first_rank
from .errors import CrossKDError, ImageError, PredictionError, TargetError
from .structures import DensePredictions, ForwardPass, Target

__all__ = [
    "CONFIDENT",
    "PAGE",
    "FirstLook",
    "symptom_of_images",
    "symptom_of_labels",
    "symptom_of_levels",
    "symptom_of_logits",
    "symptom_of_quality",
    "symptom_of_targets",
    "symptom_of_teacher",
    "worst_symptom",
]

T = TypeVar("T")

PAGE = "docs/troubleshooting.md#warnings-of-the-first-step"  # has a section for each ``expected`` of this module
CONFIDENT = 0.05  # scores above it count for cross-head distillation
SOME = 0.4  # share of boxes with inverted corners from which on their columns are doubted; fewer are bad boxes
FRACTION = 1.5  # boxes of an image are fractions of it if no coordinate is larger; a little more than 1 for rounding
UNLIKELY = 0.01  # of a channel that learnt nothing but background no score is above it, which heads commonly start at
FAR = 2.0  # how far below the best logit of half of the others its best one is
_INNER = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__))  # folders of code between


class FirstLook:
    """Looks for a symptom once, and warns of it; does nothing ever after, nor on other ranks than the first.

    Example:
        >>> look = FirstLook()
        >>> look(symptom_of_images, [torch.rand(3, 4, 4)])  # nothing wrong
        >>> look(symptom_of_images, [255 * torch.rand(3, 4, 4)])  # not looked at
    """

    def __init__(self) -> None:
        self.done = False

    def __call__(self, find: Callable[[T], CrossKDError | None], subject: T) -> None:
        """Warn of what ``find`` finds in the subject."""
        if self.done or torch.compiler.is_compiling():
            return
        self.done = True
        if is_first_rank() and (symptom := find(subject)):
            _warn_caller(f"{symptom} See {PAGE}; check_adapter tells more.")


def _warn_caller(message: str) -> None:
    """Warn at the line of the user's that led here: torch calls us, and we call ourselves, at depths that vary."""
    if sys.version_info >= (3, 12):
        warnings.warn(message, skip_file_prefixes=_INNER)
        return
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_INNER):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def worst_symptom(run: ForwardPass) -> CrossKDError | None:
    """Find the worst symptom of one pass of a student in training; brings some numbers to the host."""
    batch, predictions = run.batch, run.predictions
    return (
        symptom_of_images([batch.images])
        or symptom_of_targets(run.targets, batch.sizes)
        or symptom_of_logits(predictions.logits)
        or symptom_of_quality(predictions)
        or symptom_of_labels(run.targets, predictions.logits)
        or (None if predictions.points.device.type == "cpu" else symptom_of_levels(predictions))
    )


# --- what comes in ----------------------------------------------------------------------------------------------------


def symptom_of_images(images: Sequence[Tensor]) -> ImageError | None:
    """Find out whether pixels are in 0…255 or 0…65535, or normalised already."""
    low, high = (torch.stack([end(x.detach()) for x in images]) for end in (torch.amin, torch.amax))
    least, most = float(low.min()), float(high.max())
    if least < -0.2:  # interpolation may overshoot by less
        got = f"{least:.3g}…{most:.3g}, which looks normalised already"
        fix = "pass pixels as they are: each adapter normalises with its own image_mean and image_std"
    elif most > 2:
        got, fix = f"{least:.3g}…{most:.3g}", f"divide by {255 if most < 1000 else 65535}"
    else:
        return None
    return ImageError(expected="pixels in 0…1", got=got, where="images", fix=fix)


def symptom_of_targets(targets: Sequence[Target | None], sizes: Sequence[tuple[int, int]]) -> TargetError | None:
    """Find out whether boxes are fractions, have other columns than x1, y1, x2, y2, or belong to larger images.

    Args:
        targets: N targets.
        sizes: ``(height, width)`` of the N images that their boxes are of.
    """
    # 1. All boxes that are numbers, and width and height of the images they are of.
    pairs = [(t["boxes"].detach().cpu().double(), size) for t, size in zip(targets, sizes, strict=True) if t]
    frames = torch.cat([b.new_tensor([w, h, w, h]).expand(len(b), 4) for b, (h, w) in pairs] or [torch.zeros(0, 4)])
    boxes = torch.cat([b for b, _ in pairs] or [torch.zeros(0, 4)])
    finite = boxes.isfinite().all(dim=1)
    boxes, frames = boxes[finite], frames[finite]
    if len(boxes) == 0:
        return None
    fractional = float(boxes.abs().max()) <= FRACTION < float(frames.min()) / 4
    frames = torch.ones_like(frames) if fractional else frames

    # 2. Corners in order, and middles inside: at most fractions.
    scaled = "multiply x by the width and y by the height of the image, in pixels"
    inverted, outside = _shares(boxes / frames)
    if inverted <= SOME and outside <= 0.1:
        return _other_boxes("fractions of the image", scaled) if fractional else None

    # 3. Which readings of the columns put all boxes inside? Small ones are inside by several.
    likely = [(name, fix) for name, (read, fix) in _COLUMNS.items() if _inside(read(boxes) / frames)][:2]
    if likely:
        name, fix = (" or ".join(words) for words in zip(*likely, strict=True))
        suffix = (" in fractions of the image", f", then {scaled}") if fractional else ("", "")
        return _other_boxes(name + suffix[0], fix + suffix[1])
    if inverted > SOME:
        return _other_boxes(f"{inverted:.0%} of them with corners the wrong way round", "bring corners in order")
    return _other_boxes(
        f"{outside:.0%} of them with their middle outside, as boxes of another image size",
        "scale boxes along with images",
    )


def _other_boxes(got: str, fix: str) -> TargetError:
    expected = "boxes x1, y1, x2, y2 in pixels of their images"
    return TargetError(expected=expected, got=f"what looks like {got}", where="targets", fix=fix)


_COLUMNS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "cx, cy, w, h": (
        lambda b: torch.cat([b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2], dim=1),
        "convert with torchvision.ops.box_convert(boxes, 'cxcywh', 'xyxy')",
    ),
    "x, y, w, h": (
        lambda b: torch.cat([b[:, :2], b[:, :2] + b[:, 2:]], dim=1),
        "convert with torchvision.ops.box_convert(boxes, 'xywh', 'xyxy')",
    ),
    "y1, x1, y2, x2": (lambda b: b[:, [1, 0, 3, 2]], "swap the columns: boxes[:, [1, 0, 3, 2]]"),
}


def _shares(boxes: Tensor) -> tuple[float, float]:
    """Compute the share of boxes, in fractions, with inverted corners, and of those with their middle outside."""
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    inverted = (boxes[:, 2:] < boxes[:, :2]).any(dim=1)
    outside = ((middle < 0) | (middle > 1)).any(dim=1)
    return float(inverted.double().mean()), float(outside.double().mean())


def _inside(boxes: Tensor) -> bool:
    """Whether all boxes, in fractions, have their corners in order and lie inside the image."""
    return bool((boxes[:, 2:] > boxes[:, :2]).all()) and bool(((boxes > -0.02) & (boxes < 1.02)).all())


# --- what comes out ---------------------------------------------------------------------------------------------------


def symptom_of_logits(logits: Tensor) -> PredictionError | None:
    """Find out whether logits of the first image are probabilities, of a sigmoid or a softmax, or its logarithms."""
    x = logits[:1].detach().float()
    classes = x.shape[-1]
    softmax = "return functional.sigmoid_logits(scores) without the background's channel"
    if float(x.std(dim=1, correction=0).amax()) == 0:
        return None  # an output convolution of zeros
    if classes > 1 and bool((x.exp().sum(dim=-1) - 1).abs().amax() < 1e-5):
        got, fix = "logarithms of a softmax", softmax
    elif not 0 <= float(x.amin()) <= float(x.amax()) <= 1:
        return None  # also where they are not finite
    elif classes > 1 and float(x.sum(dim=-1).amax()) < 1.001:
        got, fix = "probabilities of a softmax", softmax
    else:
        got = "probabilities, all of them in 0…1"
        fix = "return what comes before the sigmoid: call the last convolution instead of the head's forward"
    return PredictionError(expected="class logits", got=f"what looks like {got}", where="head().logits", fix=fix)


def symptom_of_quality(predictions: DensePredictions) -> PredictionError | None:
    """Find out whether the score of a class waits for a factor that stands in ``quality``: an objectness."""
    if predictions.quality is None:
        return None
    confident = float((predictions.logits.detach().amax(dim=-1).sigmoid() > CONFIDENT).float().mean())
    objects = float((predictions.quality.detach().sigmoid() > CONFIDENT).float().mean())
    if confident < 0.5 or objects > 0.1:
        return None
    return PredictionError(
        expected="class logits that are low where nothing is",
        got=f"{confident:.0%} of the points confident by class, and {objects:.0%} by quality, which looks like an "
        "objectness",
        where="head().quality",
        fix="leave quality out, and give logits=functional.product_logits(logits, objectness[..., None])",
    )


def symptom_of_labels(targets: Sequence[Target | None], logits: Tensor) -> TargetError | None:
    """Find out whether objects have label 0 where channel 0 has learnt that it is background.

    torchvision's COCO weights are so, and all that was trained on labels from 1. Where label 0 is a class, one of its
    objects gets a score; where nothing was learnt yet, all channels are alike.

    Args:
        targets: N targets.
        logits: ``(N, A, C)`` of their images.
    """
    if logits.shape[-1] < 2 or not any(bool((t["labels"] == 0).any()) for t in targets if t is not None):
        return None
    best = logits.detach().amax(dim=(0, 1)).float()  # (C,)
    first, usual = float(best[0]), float(best[1:].median())
    score, other = torch.tensor([first, usual]).sigmoid().tolist()
    if not (score < UNLIKELY and first < usual - FAR):
        return None
    return TargetError(
        expected="labels that count from 1",
        got=f"label 0, whose channel looks like background: no score of it is above {score:.2g}, and half of the other "
        f"classes reach {other:.2g}",
        where="targets",
        fix="number classes as the detector was trained with them: torchvision's COCO weights have COCO's category ids",
    )


def symptom_of_levels(predictions: DensePredictions) -> PredictionError | None:
    """Find out whether there are no ``levels``, without which the points of an accelerator are searched on the host."""
    if predictions.levels is not None:
        return None
    return PredictionError(
        expected="levels, with which an accelerator finds the points of a box itself",
        got="none, which makes it wait in every step while the host searches them",
        where="head().levels",
        fix="where points lie on grids, build predictions with DensePredictions.on_grid or a from_… constructor",
    )


def symptom_of_teacher(predictions: DensePredictions) -> PredictionError | None:
    """Find the worst symptom of a teacher: the form of its scores, or that it is sure of nothing."""
    if symptom := symptom_of_logits(predictions.logits) or symptom_of_quality(predictions):
        return symptom
    best = float(predictions.logits.detach().amax().sigmoid())
    if best > CONFIDENT:
        return None
    return PredictionError(
        expected=f"a teacher with scores above {CONFIDENT}",
        got=f"none above {best:.2g}: it is sure of nothing, and has nothing to teach",
        where="teacher",
        fix="load its trained weights before it is adapted, and give it images like those it was trained on",
    )
