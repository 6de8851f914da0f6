"""How end-to-end a detector is, and why: duplicates, the AP lost without NMS, the teacher's head on other features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .distillation import CrossHeadDistiller
from .geometry import iou
from .postprocessing import one_to_many_detections, suppress
from .structures import Detection, Target

__all__ = [
    "DuplicateReport",
    "EndToEndReport",
    "cross_head_detections",
    "duplicate_report",
    "end_to_end_report",
]


@torch.no_grad()
def cross_head_detections(
    distiller: CrossHeadDistiller,
    images: Sequence[Tensor] | Tensor,
    *,
    nms_threshold: float | None = 0.6,
    top_k: int = 100,
) -> list[Detection]:
    """Detect with the teacher's head on the student's features.

    Their AP shows what a student lacks: near the teacher's AP, the features are good and the student's head falls
    short; far from it, the features do. Call it in evaluation mode.

    Args:
        distiller: Student and teacher.
        images: N tensors ``(3, H, W)`` in 0…1.
        nms_threshold: IoU above which the weaker box of a class is suppressed; None leaves NMS out.
        top_k: Detections returned for an image.

    Returns:
        N detections in the coordinates of the images that came in; labels are the teacher's.

    Example:
        >>> from torchvision.models.detection import fcos_resnet50_fpn
        >>> options = dict(weights=None, weights_backbone=None, num_classes=3, min_size=64)
        >>> distiller = CrossHeadDistiller(fcos_resnet50_fpn(**options), fcos_resnet50_fpn(**options)).eval()
        >>> len(cross_head_detections(distiller, [torch.rand(3, 64, 64)]))
        1
    """
    run = distiller.detector.run(images, entry=distiller.student_entry)
    aligned = distiller.aligner(run.maps, distiller.teacher_maps(run.batch))
    cross = distiller.run_teacher_head(aligned, run.batch.image_size)
    return one_to_many_detections(
        distiller.detector.adapter, cross, run.batch, nms_threshold=nms_threshold, top_k=top_k
    )


@dataclass(frozen=True)
class DuplicateReport:
    """How often an object is reported more than once.

    Attributes:
        objects: Ground-truth boxes.
        found: Of these, reported at least once: right class, IoU and score above the thresholds.
        duplicates: Reports beyond the first of each found object.
        margin: Mean over found objects of best score minus second best (0 where there is no second).
        per_class: Duplicates per found object for every label that was found.

    Example:
        >>> DuplicateReport(objects=10, found=8, duplicates=2, margin=0.4, per_class={0: 0.25}).rate
        0.25
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

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 10, 10]])
        >>> found = Detection(boxes=boxes, scores=torch.tensor([0.9, 0.8]), labels=torch.tensor([1, 1]))
        >>> duplicate_report([found], [Target(boxes=boxes[:1], labels=torch.tensor([1]))]).rate
        1.0
    """
    # 1. For every object that was found: how many visible claims, and by how much the best one leads.
    objects, margins, label_found, label_duplicates = 0, [0.0], dict[int, int](), dict[int, int]()
    for detection, target in zip(detections, targets, strict=True):
        objects += len(target["boxes"])
        for g, claims in _claims(detection, target, iou_threshold, score_threshold).items():
            label = int(target["labels"][g])
            visible = [score for score in claims if score >= relative_score * claims[0]]
            label_found[label] = label_found.get(label, 0) + 1
            label_duplicates[label] = label_duplicates.get(label, 0) + len(visible) - 1
            margins.append(claims[0] - claims[1] if len(claims) > 1 else claims[0])

    # 2. The sums.
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
    """AP without and with NMS, and the duplicates that make the difference.

    Example:
        >>> duplicates = DuplicateReport(objects=10, found=8, duplicates=2, margin=0.4, per_class={0: 0.25})
        >>> EndToEndReport(ap=0.25, ap_nms=0.5, duplicates=duplicates).gap
        0.25
    """

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
    """Score detections without and with NMS, and count their duplicates.

    Args:
        detections: N NMS-free detections.
        targets: N targets in the same coordinates.
        average_precision: Scores N detections, e.g. by COCO's protocol.
        nms_threshold: IoU of the NMS that the detector is compared against.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 10, 10]])
        >>> found = Detection(boxes=boxes, scores=torch.tensor([0.9, 0.8]), labels=torch.tensor([1, 1]))
        >>> target = Target(boxes=boxes[:1], labels=torch.tensor([1]))
        >>> precision = lambda detections: 1 / len(detections[0]["scores"])  # in place of COCO's AP
        >>> end_to_end_report([found], [target], precision).gap
        0.5
    """
    suppressed = [suppress(detection, nms_threshold) for detection in detections]
    return EndToEndReport(
        average_precision(detections), average_precision(suppressed), duplicate_report(detections, targets)
    )
