"""The score threshold at which detections are of most use: the one of the best F1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..geometry import area, iou
from ..structures import Detection, Target
from ..validation import validate_option

__all__ = ["Threshold", "Thresholds", "best_thresholds"]


@dataclass(frozen=True)
class Threshold:
    """A score threshold, and what the detections from it on are worth.

    Attributes:
        score: Detections with ``score >= threshold`` are kept. NaN, which keeps none, where none at all is right.
        f1: Harmonic mean of precision and recall, the best that a threshold can give.
        precision: Share of the kept detections that are right.
        recall: Share of the objects that they find.
        objects: Objects that there were to find.

    Example:
        >>> Threshold(score=0.5, f1=0.8, precision=1.0, recall=2 / 3, objects=3).score
        0.5
    """

    score: float
    f1: float
    precision: float
    recall: float
    objects: int


@dataclass(frozen=True)
class Thresholds:
    """The thresholds of the best F1, for all classes together and for each.

    Attributes:
        overall: One threshold for all classes, with all their detections counted together.
        per_class: That of every label with objects; of a class that was never found rightly the overall one.

    Example:
        >>> limit = Threshold(score=0.5, f1=0.8, precision=1.0, recall=2 / 3, objects=3)
        >>> thresholds = Thresholds(limit, {})
        >>> found = Detection(boxes=torch.zeros(2, 4), scores=torch.tensor([0.7, 0.4]), labels=torch.tensor([1, 1]))
        >>> thresholds.of(1), len(thresholds.apply(found)["scores"])
        (0.5, 1)
    """

    overall: Threshold
    per_class: dict[int, Threshold]

    def of(self, label: int) -> float:
        """Return the threshold of a label: its own, or the overall one where it had no objects."""
        return self.per_class.get(label, self.overall).score

    def apply(self, detection: Detection) -> Detection:
        """Keep the detections that score as much as the threshold of their label or more."""
        limits = [self.of(label) for label in detection["labels"].tolist()]
        scores = detection["scores"]
        return _kept(detection, scores.double() >= torch.tensor(limits, dtype=torch.float64, device=scores.device))


def best_thresholds(
    detections: Sequence[Detection],
    targets: Sequence[Target],
    *,
    iou_threshold: float = 0.5,
    ignored: Sequence[Target] | None = None,
) -> Thresholds:
    """Find the score thresholds with the best F1, overall and for each class.

    Detections are judged as COCO does at one IoU. Best first, each takes the object of its class that it overlaps most
    among those that are left, if by ``iou_threshold`` or more: it is right, and all others are wrong. A further report
    of an object is wrong, too. What lies in a region to ignore is neither.

    A threshold stands halfway between the last score that is kept and the next one below, if there is one, so that
    rounding changes nothing; of thresholds with the same F1 it is the highest.

    Choose thresholds on images that were not trained on, and report F1 on yet others.

    Args:
        detections: N detections without a threshold of their own, or a low one.
        targets: N targets in the same coordinates.
        iou_threshold: Overlap that makes a detection right, or of its own area with a region to ignore.
        ignored: N targets with the regions of each class to ignore: crowds, areas that nobody labelled.

    Raises:
        OptionError: ``iou_threshold`` is out of range.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
        >>> found = Detection(boxes=boxes, scores=torch.tensor([0.75, 0.25]), labels=torch.tensor([1, 1]))
        >>> best_thresholds([found], [Target(boxes=boxes[:1], labels=torch.tensor([1]))]).overall.score
        0.5
    """
    validate_option("iou_threshold", iou_threshold, low=0, high=1)
    # 1. Which detections are right, and which count at all.
    nothing = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    regions = [nothing] * len(targets) if ignored is None else ignored
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    for detection, target, region in zip(detections, targets, regions, strict=True):
        known = _kept(detection, ~detection["scores"].isnan())  # no threshold keeps the others
        right = _right(known, target, iou_threshold)
        counts = right | ~_inside(known, region, iou_threshold)
        columns.append((known["scores"][counts].double(), known["labels"][counts], right[counts]))
    scores, labels, rights = (
        np.concatenate([x.cpu().numpy() for x in column]) for column in zip(*columns, strict=True)
    )
    objects = np.concatenate([target["labels"].cpu().numpy() for target in targets])

    # 2. The best threshold of all, and of each class.
    overall = _best(scores, rights, len(objects), float("nan"))
    per_class = {
        label: _best(scores[labels == label], rights[labels == label], int((objects == label).sum()), overall.score)
        for label in np.unique(objects).tolist()
    }
    return Thresholds(overall, per_class)


def _kept(detection: Detection, keep: Tensor) -> Detection:
    return {"boxes": detection["boxes"][keep], "scores": detection["scores"][keep], "labels": detection["labels"][keep]}


def _right(detection: Detection, target: Target, iou_threshold: float) -> Tensor:
    """Which detections find an object ``(D,)``, each one that no better detection has found."""
    # 1. What may find what.
    overlap = iou(detection["boxes"][:, None].double(), target["boxes"][None].double())  # (D, G)
    overlap = overlap.masked_fill(detection["labels"][:, None] != target["labels"][None], -1)
    right = torch.zeros_like(detection["scores"], dtype=torch.bool)
    candidates = detection["scores"].argsort(descending=True, stable=True)
    candidates = candidates[(overlap >= iou_threshold).any(dim=1)[candidates]]

    # 2. Best first, each takes one.
    left = overlap.cpu().numpy()
    for d in candidates.tolist():
        g = int(left[d].argmax())
        if left[d, g] >= iou_threshold:
            right[d] = True
            left[:, g] = -1
    return right


def _inside(detection: Detection, region: Target, share: float) -> Tensor:
    """Which detections lie in a region of their class by this share of their own area or more ``(D,)``."""
    a, b = detection["boxes"][:, None].double(), region["boxes"][None].to(detection["boxes"].device).double()
    common = torch.cat([torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])], dim=-1)
    inside = area(common) >= share * area(a).clamp(min=1e-12)  # (D, R)
    return (inside & (detection["labels"][:, None] == region["labels"][None].to(a.device))).any(dim=1)


def _best(scores: NDArray[np.float64], right: NDArray[np.bool_], objects: int, otherwise: float) -> Threshold:
    """Find the threshold with the best F1 of some detections; ``otherwise`` if none is right."""
    if not right.any():
        return Threshold(otherwise, 0.0, 0.0, 0.0, objects)
    # 1. How many are kept, and right, down to each of them.
    order = np.argsort(-scores, kind="stable")
    ranked, hits, kept = scores[order], np.cumsum(right[order]), np.arange(1, len(order) + 1)
    ends = np.append(ranked[1:] < ranked[:-1], True)  # of equal scores all are kept, or none
    f1 = np.where(ends, 2 * hits / (kept + objects), -1.0)

    # 2. The first of the best, which is the highest.
    i = int(f1.argmax())
    score = float(ranked[i]) if i + 1 == len(ranked) else _between(float(ranked[i + 1]), float(ranked[i]))
    return Threshold(score, float(f1[i]), float(hits[i] / kept[i]), float(hits[i] / objects), objects)


def _between(low: float, high: float) -> float:
    """Halve the way, to a number that float32 has, because scores are compared in it."""
    middle = float(np.float32((low + high) / 2))
    return middle if low < middle <= high else high
