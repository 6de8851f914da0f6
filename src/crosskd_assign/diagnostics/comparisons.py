"""What a detector loses without NMS, and what its features lack: two APs, and the teacher's head on the features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distillation import CrossHeadDistiller
from ..postprocessing import one_to_many_detections, suppress
from ..structures import Detection, Target
from .duplicates import DuplicateReport, duplicate_report

__all__ = ["EndToEndReport", "cross_head_detections", "end_to_end_report"]


@torch.no_grad()
def cross_head_detections(
    distiller: CrossHeadDistiller,
    images: Sequence[Tensor] | Tensor,
    *,
    nms_threshold: float | None = 0.6,
    top_k: int = 100,
    one_class_per_point: bool = False,
) -> list[Detection]:
    """Detect with the teacher's head on the student's features.

    Their AP shows what a student lacks: near the teacher's AP, the features are good and the student's head falls
    short; far from it, the features do. Call it in evaluation mode.

    Args:
        distiller: Student and teacher.
        images: N tensors ``(3, H, W)`` in 0…1.
        nms_threshold: IoU above which the weaker box of a class is suppressed; None leaves NMS out.
        top_k: Detections returned for an image.
        one_class_per_point: Let each point report its best class only.

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
        distiller.detector.adapter,
        cross,
        run.batch,
        nms_threshold=nms_threshold,
        top_k=top_k,
        one_class_per_point=one_class_per_point,
    )


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
