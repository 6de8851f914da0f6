"""Compare exported detections with the detector's own, up to rounding and the order of ties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from torch import Tensor

from ..geometry import at_least_float32
from ..structures import Batch, Detection
from ..validation import validate_predictions
from .tensor_detector import TensorDetector

__all__ = ["Difference", "Prediction", "difference", "predict"]


@dataclass(frozen=True)
class Prediction:
    """Everything that is predicted for one image: ``boxes (A, 4)`` in its pixels, ``scores (A, C)``."""

    boxes: Tensor
    scores: Tensor


@torch.no_grad()
def predict(detector: TensorDetector, images: Tensor) -> list[Prediction]:
    """Predict on each of the images ``(N, 3, H, W)`` through the adapter, as a detector does."""
    adapter = detector.adapter
    if detector.preprocessing == "inside":
        batch, _ = adapter.preprocess(list(images))
    else:
        sizes = ((images.shape[2], images.shape[3]),) * len(images)
        batch = Batch(images, sizes, sizes)
    predictions = detector.predict(batch)
    validate_predictions(predictions, where=f"{type(adapter).__name__}.head()", images=len(images))
    scores = at_least_float32(predictions.logits).sigmoid()  # (N, A, C)
    best = scores.max(dim=2)
    everything: list[Detection] = [
        {"boxes": b, "scores": s, "labels": label}
        for b, s, label in zip(predictions.boxes, best.values, best.indices, strict=True)
    ]
    restored = adapter.restore(everything, batch)
    return [Prediction(detection["boxes"], s) for detection, s in zip(restored, scores, strict=True)]


@dataclass(frozen=True)
class Difference:
    """How far one image's detections are from the expected ones.

    Attributes:
        scores: Largest difference of the scores, rank by rank.
        boxes: Largest distance, in pixels, of a side from the box that was expected for the label at that score.
        fault: What cannot be put down to rounding, in words; empty if everything can.
    """

    scores: float
    boxes: float
    fault: str = ""


def difference(
    detection: Detection, prediction: Prediction, *, score_tolerance: float, box_tolerance: float
) -> Difference:
    """Compare one image's K detections with everything that its detector predicts.

    Scores must agree rank by rank. Each detection must be a prediction of its own: same label, same score, same box,
    within the tolerances. So two that score the same may stand in either order, and of those that tie for the last
    place any may be there.

    Args:
        detection: Found, best first.
        prediction: Expected; the K best should have been found.
        score_tolerance: Largest difference of scores that is put down to rounding.
        box_tolerance: Likewise of a box's sides, in pixels.
    """
    # 1. Scores, rank by rank.
    scores, labels = detection["scores"], detection["labels"]
    k = len(scores)
    if not 0 < k <= prediction.scores.numel():
        return Difference(0.0, 0.0, f"{k} detections of {prediction.scores.numel()} predictions")
    ranked = prediction.scores.flatten().topk(k).values
    gaps = (scores - ranked).abs().nan_to_num(nan=float("inf"))
    score_gap, box_gap = float(gaps.max()), 0.0
    if score_gap > score_tolerance:
        i = int(gaps.argmax())
        fault = f"score {float(scores[i]):.6f} instead of {float(ranked[i]):.6f} at rank {i}"
        return Difference(score_gap, box_gap, fault)

    # 2. For every detection the predictions that it may be: same label, same score, same box.
    point, label = (prediction.scores >= ranked[-1] - 2 * score_tolerance).nonzero(as_tuple=True)  # (P,) contenders
    score = prediction.scores[point, label]
    same = torch.zeros(k, len(point), dtype=torch.bool)
    for i in range(k):
        rivals = (((score - scores[i]).abs() <= score_tolerance) & (label == labels[i])).nonzero()[:, 0]
        if len(rivals) == 0:
            fault = f"label {int(labels[i])} at score {float(scores[i]):.6f} (rank {i}), which nothing predicts"
            return Difference(score_gap, box_gap, fault)
        distance = (prediction.boxes[point[rivals]] - detection["boxes"][i]).abs().amax(dim=1)
        box_gap = max(box_gap, float(distance.nan_to_num(nan=float("inf")).min()))
        if box_gap > box_tolerance:
            fault = f"a box {box_gap:.4g} px from the one predicted, {detection['boxes'][i].tolist()} at rank {i}"
            return Difference(score_gap, box_gap, fault)
        same[i, rivals[distance <= box_tolerance]] = True

    # 3. A prediction of its own for each.
    certain = (score > ranked[-1] + 2 * score_tolerance).numpy()
    fault = "" if _one_each(same.numpy(), certain) else "one prediction twice and another not at all"
    return Difference(score_gap, box_gap, fault)


def _one_each(same: NDArray[np.bool_], certain: NDArray[np.bool_]) -> bool:
    """Whether detections (rows) and predictions (columns) pair off, with all rows and all certain columns taken.

    A matching that covers the rows and another that covers those columns are enough: then there is one that covers
    both (Mendelsohn and Dulmage, 1958).
    """
    pairs: Any
    for pairs in (same, same.T[certain]):
        if (maximum_bipartite_matching(csr_array(pairs), perm_type="column") < 0).any():
            return False
    return True
