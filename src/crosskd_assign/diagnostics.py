"""How end-to-end a detector is, and why: duplicates, the AP that leaving NMS out costs, and what the teacher sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .detectors import DetectorAdapter
from .distiller import CrossHeadDistiller
from .end_to_end import top_detections
from .geometry import clip, iou
from .structures import Assignment, Batch, DensePredictions, Detection, Target

__all__ = [
    "AssignmentReport",
    "DuplicateReport",
    "EndToEndReport",
    "assignment_report",
    "cross_head_detections",
    "duplicate_report",
    "end_to_end_report",
    "one_to_many_detections",
    "suppress",
]


def suppress(detection: Detection, iou_threshold: float = 0.6, *, top_k: int = 100) -> Detection:
    """Class-wise non-maximum suppression of one image's detections; at most ``top_k`` remain, best first."""
    from torchvision.ops import batched_nms  # noqa: PLC0415  # seconds to import, and only comparisons need it

    keep = batched_nms(detection["boxes"].float(), detection["scores"], detection["labels"], iou_threshold)[:top_k]
    return {"boxes": detection["boxes"][keep], "scores": detection["scores"][keep], "labels": detection["labels"][keep]}


def one_to_many_detections(
    adapter: DetectorAdapter,
    predictions: DensePredictions,
    batch: Batch,
    *,
    nms_threshold: float | None = 0.6,
    top_k: int = 100,
    candidates: int = 1000,
) -> list[Detection]:
    """Detections of a one-to-many detector, scored as FCOS does: sqrt(class · quality), class alone without a quality.

    Args:
        adapter: The detector.
        predictions: What its head said, on whatever features.
        batch: What it said it of.
        nms_threshold: IoU above which the weaker box of a class is suppressed; None leaves NMS out.
        top_k: Detections returned for an image.
        candidates: Detections that enter NMS.

    Returns:
        N detections in the coordinates of the images that came in.
    """
    if predictions.quality is not None:
        score = (predictions.logits.float().sigmoid() * predictions.quality.float().sigmoid()[..., None]).sqrt()
        predictions = DensePredictions(score.logit(), predictions.boxes, predictions.points, predictions.strides)
    scores, boxes, labels = top_detections(predictions, top_k if nms_threshold is None else candidates)
    detections: list[Detection] = [
        # Clipped first: boxes that reach out of the picture overlap less outside it than in.
        {"boxes": clip(b, size), "scores": s, "labels": label}
        for b, s, label, size in zip(boxes, scores, labels, batch.sizes, strict=True)
    ]
    if nms_threshold is not None:
        detections = [suppress(detection, nms_threshold, top_k=top_k) for detection in detections]
    return adapter.restore(detections, batch)


@torch.no_grad()
def cross_head_detections(
    distiller: CrossHeadDistiller,
    images: Sequence[Tensor] | Tensor,
    *,
    nms_threshold: float | None = 0.6,
    top_k: int = 100,
) -> list[Detection]:
    """Detections of the teacher's head on the student's features.

    Their AP tells what a student lacks: near the teacher's AP, the features are there and the student's head is short;
    far from it, the features are. Call it in evaluation mode.
    """
    student = distiller.detector.adapter
    batch, _ = student.preprocess(images)
    _, cross = distiller.cross(distiller.entry_maps(student.features(batch)), batch)
    return one_to_many_detections(student, cross, batch, nms_threshold=nms_threshold, top_k=top_k)


@dataclass(frozen=True)
class DuplicateReport:
    """How often an object is reported more than once.

    Attributes:
        objects: Ground-truth boxes.
        found: Of these, reported at least once: right class, IoU and score above the thresholds.
        duplicates: Reports beyond the first of each found object.
        margin: Mean over found objects of best score minus second best (0 where there is no second).
        per_class: Duplicates per found object for every label that was found.
    """

    objects: int
    found: int
    duplicates: int
    margin: float
    per_class: dict[int, float]

    @property
    def rate(self) -> float:
        """Duplicates per found object; NaN if none was found."""
        return self.duplicates / self.found if self.found else float("nan")


def duplicate_report(
    detections: Sequence[Detection],
    targets: Sequence[Target],
    *,
    iou_threshold: float = 0.5,
    score_threshold: float = 0.05,
    relative_score: float = 0.3,
) -> DuplicateReport:
    """Count duplicate detections.

    A detection claims the object of its class that it overlaps most, if by ``iou_threshold`` or more. Claims below
    ``score_threshold``, or below ``relative_score`` times the best claim on the same object, are too faint to be seen
    by a user and do not count; the relative bound makes detectors of different calibration comparable.

    Args:
        detections: N detections.
        targets: N targets in the same coordinates.
        iou_threshold: Overlap that makes a claim.
        score_threshold: Least score of a claim.
        relative_score: Least score of a claim relative to the best one on its object, 0…1.
    """
    objects, margins, label_found, label_duplicates = 0, [0.0], dict[int, int](), dict[int, int]()
    for detection, target in zip(detections, targets, strict=True):
        objects += len(target["boxes"])
        for g, claims in _claims(detection, target, iou_threshold, score_threshold).items():
            label = int(target["labels"][g])
            visible = [score for score in claims if score >= relative_score * claims[0]]
            label_found[label] = label_found.get(label, 0) + 1
            label_duplicates[label] = label_duplicates.get(label, 0) + len(visible) - 1
            margins.append(claims[0] - claims[1] if len(claims) > 1 else claims[0])
    found = sum(label_found.values())
    return DuplicateReport(
        objects,
        found,
        sum(label_duplicates.values()),
        sum(margins) / max(1, found),
        {label: label_duplicates[label] / count for label, count in sorted(label_found.items())},
    )


def _claims(
    detection: Detection, target: Target, iou_threshold: float, score_threshold: float
) -> dict[int, list[float]]:
    """Scores that claim each object of one image, best first."""
    if len(target["boxes"]) == 0:
        return {}
    overlap = iou(detection["boxes"][:, None].float(), target["boxes"][None].float())  # (D, G)
    overlap = overlap.masked_fill(detection["labels"][:, None] != target["labels"][None], -1)
    best, owner = overlap.max(dim=1)
    keep = (best >= iou_threshold) & (detection["scores"] >= score_threshold)
    claims: dict[int, list[float]] = {}
    for g, score in zip(owner[keep].tolist(), detection["scores"][keep].tolist(), strict=True):
        claims.setdefault(g, []).append(score)
    return {g: sorted(scores, reverse=True) for g, scores in claims.items()}


@dataclass(frozen=True)
class EndToEndReport:
    """AP without and with NMS, and the duplicates that make the difference."""

    ap: float
    ap_nms: float
    duplicates: DuplicateReport

    @property
    def gap(self) -> float:
        """What leaving NMS out costs, in AP; below 0 where NMS does harm."""
        return self.ap_nms - self.ap


def end_to_end_report(
    detections: Sequence[Detection],
    targets: Sequence[Target],
    average_precision: Callable[[Sequence[Detection]], float],
    *,
    nms_threshold: float = 0.6,
) -> EndToEndReport:
    """How end-to-end a detector is.

    Args:
        detections: N NMS-free detections.
        targets: N targets in the same coordinates.
        average_precision: Scores N detections, e.g. by COCO's protocol.
        nms_threshold: IoU of the NMS that the detector is compared against.
    """
    suppressed = [suppress(detection, nms_threshold) for detection in detections]
    return EndToEndReport(
        average_precision(detections), average_precision(suppressed), duplicate_report(detections, targets)
    )


@dataclass(frozen=True)
class AssignmentReport:
    """How an assignment went: boxes, and the shares that took a point outside the prior or none at all."""

    boxes: int
    fallback_share: float
    unmatched_share: float
    mean_metric: float
    non_finite: int


def assignment_report(assignment: Assignment) -> AssignmentReport:
    """Summary of an assignment, e.g. of ``detector.assignment`` after a training step."""
    boxes = len(assignment) + assignment.unmatched
    return AssignmentReport(
        boxes,
        float(assignment.fallback.sum()) / max(1, boxes),
        assignment.unmatched / max(1, boxes),
        float(assignment.metric.sum()) / max(1, boxes),
        assignment.non_finite,
    )
