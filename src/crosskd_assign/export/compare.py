"""Compare exported detections with the detector's own, up to rounding and the order of ties, and find reasons."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from torch import Tensor

from ..errors import ExportError
from ..geometry import at_least_float32
from ..structures import Batch, Detection, GridLevel
from ..validation import validate_predictions
from .tensor_detector import OUTPUT_NAMES, TensorDetector

__all__ = [
    "Difference",
    "Prediction",
    "compare_file",
    "dense_difference",
    "difference",
    "predict",
    "validate_tracing_mode",
]

# What exporters set while they trace, and adapters may ask.
_TRACING = ((torch.onnx, "is_in_onnx_export"), (torch.compiler, "is_exporting"))


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
    detection: Detection,
    prediction: Prediction,
    *,
    score_tolerance: float,
    box_tolerance: float,
    one_class_per_point: bool = False,
    classes: Sequence[int] | None = None,
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
        one_class_per_point: Whether each point should give its best class only.
        classes: Labels that should have been found; None for all.
    """
    # 1. Scores, rank by rank, of what competes.
    scores, labels = detection["scores"], detection["labels"]
    competes, ranked = _competing(prediction.scores, score_tolerance, one_class_per_point, classes)
    k = len(scores)
    if not 0 < k <= len(ranked):
        return Difference(0.0, 0.0, f"{k} detections of {len(ranked)} predictions")
    ranked = ranked.topk(k).values
    gaps = (scores - ranked).abs().nan_to_num(nan=float("inf"))
    score_gap, box_gap = float(gaps.max()), 0.0
    if score_gap > score_tolerance:
        i = int(gaps.argmax())
        fault = f"score {float(scores[i]):.6f} instead of {float(ranked[i]):.6f} at rank {i}"
        return Difference(score_gap, box_gap, fault)

    # 2. For every detection the predictions that it may be: same label, same score, same box.
    contends = competes & (prediction.scores >= ranked[-1] - 2 * score_tolerance)
    point, label = contends.nonzero(as_tuple=True)  # (P,) contenders
    score = prediction.scores[point, label]
    own = point if one_class_per_point else torch.arange(len(point))  # what is used up by a detection
    same = torch.zeros(k, int(own.max()) + 1, dtype=torch.bool)
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
        same[i, own[rivals[distance <= box_tolerance]]] = True

    # 3. A prediction of its own for each.
    certain = torch.zeros(same.shape[1], dtype=torch.bool)
    certain[own[score > ranked[-1] + 2 * score_tolerance]] = True
    fault = "" if _one_each(same.numpy(), certain.numpy()) else "one prediction twice and another not at all"
    return Difference(score_gap, box_gap, fault)


def _competing(
    scores: Tensor, tolerance: float, one_class_per_point: bool, classes: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """Mark the pairs ``(A, C)`` that may be detected, and list the scores that compete for a place.

    Of the classes that tie on a point, up to rounding, any may be its best.
    """
    allowed = torch.zeros_like(scores, dtype=torch.bool)
    allowed[:, slice(None) if classes is None else list(classes)] = True
    if not one_class_per_point:
        return allowed, scores[allowed]
    best = scores.masked_fill(~allowed, -1).amax(dim=1)  # (A,)
    return allowed & (scores >= best[:, None] - 2 * tolerance), best


def dense_difference(
    found: Prediction, prediction: Prediction, *, score_tolerance: float, box_tolerance: float
) -> Difference:
    """Compare everything that was found for one image with everything that its detector predicts, place by place."""
    gaps: dict[str, float] = {}
    for name, tolerance in (("scores", score_tolerance), ("boxes", box_tolerance)):
        a, b = getattr(found, name), getattr(prediction, name)
        if a.shape != b.shape:
            fault = f"{name} of shape {tuple(a.shape)} instead of {tuple(b.shape)}"
            return Difference(gaps.get("scores", 0.0), 0.0, fault)
        gaps[name] = float((a - b).abs().nan_to_num(nan=float("inf")).max())
        if gaps[name] > tolerance:
            fault = f"{name} that differ by {gaps[name]:.4g}"
            return Difference(gaps["scores"], gaps.get("boxes", 0.0), fault)
    return Difference(gaps["scores"], gaps["boxes"])


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


# --- a whole file -----------------------------------------------------------------------------------------------------


def compare_file(
    onnxruntime: Any,
    path: Path,
    view: TensorDetector,
    batches: Sequence[Tensor],
    known: Sequence[Sequence[Prediction]],
    score_tolerance: float,
    box_tolerance: float,
) -> tuple[float, float]:
    """Compute the largest difference of a score and of a box between file and detector.

    Raises:
        ExportError: It is no rounding, or the file does not run.
    """
    # 1. What onnxruntime finds.
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised, too
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        found = [session.run(OUTPUT_NAMES[view.outputs], {"images": batch.numpy()}) for batch in batches]
    except Exception as error:  # onnxruntime has a dozen types
        where = f"images of {[tuple(batch.shape) for batch in batches]}"
        raise _disagreement(view, batches, "a file that onnxruntime runs", str(error), where) from error

    # 2. Is it what the detector finds?
    gaps = []
    tolerances = {"score_tolerance": score_tolerance, "box_tolerance": box_tolerance}
    for batch, outputs, images in zip(batches, found, known, strict=True):
        rows = zip(*map(torch.from_numpy, outputs), images, strict=True)
        for i, (boxes, scores, *labels, prediction) in enumerate(rows):
            if labels:
                gap = difference(
                    Detection(boxes=boxes, scores=scores, labels=labels[0]),
                    prediction,
                    **tolerances,
                    one_class_per_point=view.one_class_per_point,
                    classes=view.classes,
                )
            else:
                gap = dense_difference(Prediction(boxes, scores), prediction, **tolerances)
            if gap.fault:
                where = f"image {i} of {tuple(batch.shape)}"
                raise _disagreement(view, batches, "the detections of the detector", gap.fault, where)
            gaps.append(gap)
    return max(gap.scores for gap in gaps), max(gap.boxes for gap in gaps)


def _disagreement(view: TensorDetector, batches: Sequence[Tensor], expected: str, got: str, where: str) -> ExportError:
    """Build the error of a file that finds something else, with its reason as far as it can be seen."""
    fix = "look for Python numbers, caches or branches that depend on the image in the adapter; differences just above "
    fix += "the tolerance are rounding: raise score_tolerance or box_tolerance"
    if len({batch.shape[2:] for batch in batches}) > 1 and (line := _line_that_counts(view, batches[0])):
        where += f"; {line}"
        fix = "len(level) is a Python number, which tracing bakes into the file: write "
        fix += "level.height * level.width * level.anchors there, or export with a fixed image_size"
    return ExportError(expected=expected, got=got, where=f"export_onnx, {where}", fix=fix)


def _line_that_counts(view: TensorDetector, batch: Tensor) -> str:
    """Find the line of an adapter's own code that asks a level for its length; empty if none does."""
    lines: list[str] = []
    length = GridLevel.__len__

    def noted(level: GridLevel) -> int:
        caller = inspect.stack(context=0)[1]
        if Path(__file__).parents[1] not in Path(caller.filename).parents:
            lines.append(f"{Path(caller.filename).name}, line {caller.lineno}, in {caller.function}")
        return length(level)

    with mock.patch.object(GridLevel, "__len__", noted):
        predict(view, batch)
    return next(iter(lines), "")


def validate_tracing_mode(view: TensorDetector, batch: Tensor, known: Sequence[Prediction]) -> None:
    """Raise `ExportError` if a detector predicts something else as soon as it is told that it is being exported."""
    for module, name in _TRACING:
        with mock.patch.object(module, name, return_value=True):
            found = predict(view, batch)
        for a, b in zip(found, known, strict=True):
            if any(
                x.shape != y.shape or not torch.allclose(x, y, rtol=1e-4, atol=1e-4, equal_nan=True)
                for x, y in ((a.boxes, b.boxes), (a.scores, b.scores))
            ):
                raise ExportError(
                    expected="the same predictions while exporting",
                    got=f"others as soon as {module.__name__}.{name}() is true",
                    where=type(view.adapter).__name__,
                    fix=f"remove the branch on {name} in the detector, or override it in the adapter",
                )
