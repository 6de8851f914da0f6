"""How often an object is reported more than once, in its own class and across classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..geometry import iou
from ..structures import Detection, Target

__all__ = ["DuplicateReport", "duplicate_report"]


@dataclass(frozen=True)
class DuplicateReport:
    """How often an object is reported more than once.

    Attributes:
        objects: Ground-truth boxes.
        found: Of these, reported at least once: right class, IoU and score above the thresholds.
        duplicates: Reports beyond the first of each found object.
        margin: Mean over found objects of best score minus second best (0 where there is no second).
        per_class: Duplicates per found object for every label that was found.
        across_classes: Reports of a found object under another class, by detections that have no object of their own.

    Example:
        >>> DuplicateReport(objects=10, found=8, duplicates=2, margin=0.4, per_class={0: 0.25}).rate
        0.25
    """

    objects: int
    found: int
    duplicates: int
    margin: float
    per_class: dict[int, float]
    across_classes: int = 0

    @property
    def rate(self) -> float:
        """Duplicates per found object; NaN if none was found."""
        return self.duplicates / self.found if self.found else float("nan")

    @property
    def rate_across_classes(self) -> float:
        """Reports under another class per found object; NaN if none was found."""
        return self.across_classes / self.found if self.found else float("nan")


def duplicate_report(
    detections: Sequence[Detection],
    targets: Sequence[Target],
    *,
    iou_threshold: float = 0.5,
    score_threshold: float = 0.05,
    relative_score: float = 0.3,
) -> DuplicateReport:
    """Count duplicate detections, of an object's own class and across classes.

    A detection claims the object of its class that it overlaps most, if by ``iou_threshold`` or more. Claims below
    ``score_threshold``, or below ``relative_score`` times the best claim on the same object, are too faint to be seen
    by a user and do not count; the relative bound makes detectors of different calibration comparable.

    A detection that claims no object of its class, whatever its score, but overlaps a found object of another by
    ``iou_threshold`` or more, reports it across classes, if it can be seen beside the best claim on it. It counts once,
    for the found object that it overlaps most.

    Args:
        detections: N detections.
        targets: N targets in the same coordinates.
        iou_threshold: Overlap that makes a claim.
        score_threshold: Least score of a claim.
        relative_score: Least score of a claim relative to the best one on its object, 0…1.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 10, 10]])
        >>> found = Detection(boxes=boxes, scores=torch.tensor([0.9, 0.8]), labels=torch.tensor([1, 1]))
        >>> duplicate_report([found], [Target(boxes=boxes[:1], labels=torch.tensor([1]))]).rate
        1.0
    """
    objects, across, margins, label_found, label_duplicates = 0, 0, [0.0], dict[int, int](), dict[int, int]()
    for detection, target in zip(detections, targets, strict=True):
        # 1. For every object that was found: how many visible claims, and by how much the best one leads.
        objects += len(target["boxes"])
        overlap, same = _overlap(detection, target)
        claims = _claims(overlap.masked_fill(~same, -1), detection["scores"], iou_threshold, score_threshold)
        for g, scores in claims.items():
            label = int(target["labels"][g])
            visible = [score for score in scores if score >= relative_score * scores[0]]
            label_found[label] = label_found.get(label, 0) + 1
            label_duplicates[label] = label_duplicates.get(label, 0) + len(visible) - 1
            margins.append(scores[0] - scores[1] if len(scores) > 1 else scores[0])

        # 2. Visible claims of other classes on them, by detections without an object of their own.
        if claims:
            stray = overlap.masked_fill(~same, -1).amax(dim=1) < iou_threshold  # (D,)
            found_here = torch.zeros_like(same[0])  # (G,)
            found_here[list(claims)] = True
            other = overlap.masked_fill(same | ~found_here, -1)[stray]
            strays = _claims(other, detection["scores"][stray], iou_threshold, score_threshold)
            across += sum(score >= relative_score * claims[g][0] for g, scores in strays.items() for score in scores)

    # 3. The sums.
    found = sum(label_found.values())
    return DuplicateReport(
        objects,
        found,
        sum(label_duplicates.values()),
        sum(margins) / max(1, found),
        {label: label_duplicates[label] / count for label, count in sorted(label_found.items())},
        across,
    )


def _overlap(detection: Detection, target: Target) -> tuple[Tensor, Tensor]:
    """IoU of detections and objects of one image ``(D, G)``, and whether they are of one class."""
    overlap = iou(detection["boxes"][:, None].float(), target["boxes"][None].float())
    return overlap, detection["labels"][:, None] == target["labels"][None]


def _claims(overlap: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float) -> dict[int, list[float]]:
    """Scores that claim each object of one image, best first; each detection claims what it overlaps most."""
    if 0 in overlap.shape:
        return {}
    best, owner = overlap.max(dim=1)
    keep = (best >= iou_threshold) & (scores >= score_threshold)
    claims: dict[int, list[float]] = {}
    for g, score in zip(owner[keep].tolist(), scores[keep].tolist(), strict=True):
        claims.setdefault(g, []).append(score)
    return {g: sorted(values, reverse=True) for g, values in claims.items()}
