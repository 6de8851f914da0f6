"""What a detector found: its detections, Soft-NMS, and objects: one detection finds one, however many it overlaps.

D is the number of detections of an image, G that of its objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from coco_example.data.dataset import CocoDataset
from coco_example.data.reader import CocoIndex
from coco_example.evaluation.evaluation import Detector
from torch import Tensor

from crosskd_assign.geometry import iou
from crosskd_assign.postprocessing import one_to_many_detections
from crosskd_assign.structures import Detection, Target

__all__ = ["Decay", "Matches", "detected", "match", "soft_nms", "targets_of"]

Decay = Literal["gaussian", "linear"]

_CANDIDATES = 1000  # of an image, which NMS chooses from
_SIGMA = 0.5  # of the gaussian decay, and
_FREE = 0.3  # IoU up to which the linear one takes nothing: as the paper has them


def soft_nms(detection: Detection, decay: Decay = "gaussian", *, top_k: int = 100) -> Detection:
    """Lower the scores of detections that overlap better ones of their class (Soft-NMS); return the best, best first.

    The gaussian decay multiplies by exp(−IoU² / 0.5), the linear one by 1 − IoU above an IoU of 0.3.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [50, 0, 60, 10]])
        >>> found = Detection(boxes=boxes, scores=torch.tensor([0.9, 0.8, 0.7]), labels=torch.tensor([1, 1, 1]))
        >>> soft_nms(found, "linear")["scores"]
        tensor([0.9000, 0.7000, 0.5333])
    """
    boxes, labels, scores = detection["boxes"].float(), detection["labels"], detection["scores"].clone()
    chosen, lowered = list[int](), list[float]()
    for _ in range(min(top_k, len(scores))):
        # 1. Choose the best one that is left.
        best = int(scores.argmax())
        chosen.append(best)
        lowered.append(float(scores[best]))
        # 2. Lower the scores of those of its class that it overlaps, (D,).
        overlap = iou(boxes[best], boxes) * (labels == labels[best])
        if decay == "gaussian":
            scores *= (-overlap.square() / _SIGMA).exp()
        else:
            scores *= torch.where(overlap > _FREE, 1 - overlap, 1)
        scores[best] = -1  # and stays below all others
    index = torch.tensor(chosen, dtype=torch.int64)
    kept = torch.tensor(lowered, dtype=detection["scores"].dtype)
    return {"boxes": detection["boxes"][index], "scores": kept, "labels": labels[index]}


@torch.inference_mode()
def detected(detector: Detector, index: CocoIndex) -> list[Detection]:
    """Detect in all images of an index, without a selection but that of the best candidates."""
    dataset, found = CocoDataset(index), list[Detection]()
    for first in range(0, len(dataset), 25):
        pictures = [dataset[k][0] for k in range(first, min(first + 25, len(dataset)))]
        predictions, batch = detector.predict(pictures)
        found += one_to_many_detections(detector.adapter, predictions, batch, nms_threshold=None, top_k=_CANDIDATES)
    return found


def targets_of(index: CocoIndex) -> list[Target]:
    """List the objects of the images of an index."""
    return [{"boxes": record.boxes, "labels": record.labels} for record in index.records]


@dataclass(frozen=True)
class Matches:
    """What became of the detections and objects of many images.

    Attributes:
        scores: Scores of all detections, descending, (D,).
        correct: Whether each found an object, (D,).
        objects: Objects that there were to find.
    """

    scores: Tensor
    correct: Tensor
    objects: int

    def threshold(self) -> float:
        """Return the score from which on detections have the best F1."""
        if not len(self.scores):
            return 0.0
        found = self.correct.cumsum(0)
        f1 = 2 * found / (torch.arange(1, len(found) + 1) + self.objects)
        # Detections of one score are kept or dropped together.
        last = torch.cat([self.scores[1:] < self.scores[:-1], torch.ones(1, dtype=torch.bool)])
        return float(self.scores[f1.where(last, -1.0).argmax()])

    def found(self, threshold: float = 0.0) -> int:
        """Count the objects that a detection of at least this score found; all others are lost."""
        return int((self.correct & (self.scores >= threshold)).sum())

    def reported(self, threshold: float = 0.0) -> int:
        """Count the detections of at least this score."""
        return int((self.scores >= threshold).sum())


def match(detections: Sequence[Detection], targets: Sequence[Target], *, iou_threshold: float = 0.5) -> Matches:
    """Match detections to objects as COCO does: best first, each to the free object of its class that it overlaps most.

    Leaving out detections below a score changes nothing for those above it.
    """
    scores, correct = [torch.zeros(0)], [torch.zeros(0, dtype=torch.bool)]
    for detection, target in zip(detections, targets, strict=True):
        order = detection["scores"].argsort(descending=True, stable=True)
        overlap = iou(detection["boxes"][order, None].float(), target["boxes"][None].float())  # (D, G)
        able = (overlap >= iou_threshold) & (detection["labels"][order, None] == target["labels"][None])
        free, right = set(range(len(target["boxes"]))), torch.zeros(len(order), dtype=torch.bool)
        rows: dict[int, list[tuple[float, int]]] = {}  # what each detection may find, best first
        for d, g in able.nonzero().tolist():
            rows.setdefault(d, []).append((-float(overlap[d, g]), g))
        for d, row in rows.items():
            for _, g in sorted(row):
                if g in free:
                    free.remove(g)
                    right[d] = True
                    break
        scores.append(detection["scores"][order].float())
        correct.append(right)
    order = torch.cat(scores).argsort(descending=True, stable=True)
    return Matches(torch.cat(scores)[order], torch.cat(correct)[order], sum(len(t["boxes"]) for t in targets))
