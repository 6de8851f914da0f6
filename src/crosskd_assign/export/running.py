"""Run exported files, and measure how far the detections of one are from those of another."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ExportError, ImageError
from ..geometry import area, iou
from ..structures import Detection
from ..validation import validate_images
from .requirements import required_packages

__all__ = ["Agreement", "Runner", "agreement", "detections_of", "onnx_runner", "validate_inputs"]

Runner = Callable[[Any], Sequence[Any]]  # from (N, 3, H, W) to boxes, scores and perhaps labels
_TOP_K = 100  # of dense outputs
_TIE = 1e-4  # scores that rounding may put in either order


@dataclass(frozen=True)
class Agreement:
    """How far the detections of a file are from those of the file that it was made of.

    A detection is found if the other file has one of the same label that overlaps it by an IoU of 0.5; the best overlap
    counts, and each counts once. Not compared are those that tie with the last place, where another may stand, and
    boxes of less than a pixel, such as those clipped to nothing.

    Attributes:
        images: Images that both ran on.
        compared: Detections of the original that scored at least the threshold.
        matched: Share of these that the other one finds, 0…1; 1 if there were none.
        iou: Mean overlap with those found.
        score_difference: Largest difference of the scores of those found.
        mean_score_difference: Mean difference likewise.

    Example:
        >>> agreement([], []) == Agreement(0, 0, 1.0, 1.0, 0.0, 0.0)
        True
    """

    images: int
    compared: int
    matched: float
    iou: float
    score_difference: float
    mean_score_difference: float


def agreement(expected: Sequence[Detection], found: Sequence[Detection], *, threshold: float = 0.3) -> Agreement:
    """Match the detections of two files, image by image, best first.

    Example:
        >>> boxes, labels = torch.tensor([[0.0, 0, 8, 8], [9, 9, 20, 20]]), torch.tensor([1, 2])
        >>> a = Detection(boxes=boxes, scores=torch.tensor([0.9, 0.5]), labels=labels)
        >>> b = Detection(boxes=boxes[:1], scores=torch.tensor([0.8]), labels=labels[:1])
        >>> agreement([a], [b]).matched
        0.5
    """
    overlaps: list[float] = []
    gaps: list[float] = []
    compared = 0
    for a, b in zip(expected, found, strict=True):
        free = torch.ones(len(b["scores"]), dtype=torch.bool)
        last = float(b["scores"].min()) if 0 < len(b["scores"]) == len(a["scores"]) else 0.0
        strong = (a["scores"] >= threshold) & (a["scores"] > last + _TIE) & (area(a["boxes"]) >= 1)
        compared += int(strong.sum())
        for i in strong.nonzero()[:, 0].tolist() if len(free) else []:
            overlap = iou(a["boxes"][i], b["boxes"]) * (free & (b["labels"] == a["labels"][i]))
            j = int(overlap.argmax())
            if overlap[j] >= 0.5:
                free[j] = False
                overlaps.append(float(overlap[j]))
                gaps.append(abs(float(a["scores"][i] - b["scores"][j])))
    return Agreement(
        len(expected),
        compared,
        len(gaps) / compared if compared else 1.0,
        float(np.mean(overlaps)) if gaps else 1.0,
        max(gaps, default=0.0),
        float(np.mean(gaps)) if gaps else 0.0,
    )


def detections_of(run: Runner, images: Sequence[Tensor], *, where: str) -> list[Detection]:
    """Run a file on images, one by one; of dense outputs take the best 100 pairs of point and class.

    Raises:
        ExportError: It does not run, or what it returns is not finite.
    """
    found = []
    for image in images:
        try:
            boxes, scores, *labels = (torch.from_numpy(np.array(x[0])) for x in run(image[None].numpy()))
        except Exception as error:  # runtimes have a dozen types
            raise _unusable(str(error), where) from error
        if not (boxes.isfinite().all() and scores.isfinite().all()):
            raise _unusable("outputs that are not finite", where)
        if not labels:
            best, order = scores.flatten().topk(min(_TOP_K, scores.numel()))
            point = torch.div(order, scores.shape[1], rounding_mode="floor")
            boxes, scores, labels = boxes[point], best, [order % scores.shape[1]]
        found.append(Detection(boxes=boxes.float(), scores=scores.float(), labels=labels[0]))
    return found


def _unusable(got: str, where: str) -> ExportError:
    return ExportError(
        expected="a file that runs", got=got, where=where, fix="export the float32 file of outputs='dense', or use that"
    )


def onnx_runner(path: Path) -> Runner:
    """Open an ONNX file with onnxruntime, on one thread.

    Raises:
        ExportError: onnxruntime is not installed, or cannot read it.
    """
    onnxruntime = required_packages(["onnxruntime"], where=f"{path}")["onnxruntime"]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised, too
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a dozen types
        raise _unusable(str(error), f"{path}") from error
    return lambda images: session.run(None, {"images": images})


def validate_inputs(model: Any, images: Sequence[Tensor]) -> list[Tensor]:
    """Bring images to what an ``onnx.ModelProto`` takes.

    Raises:
        ImageError: They are no images in 0…1, or of another size than the file takes.
    """
    validate_images(images)
    _, _, *sides = (x.dim_value or None for x in model.graph.input[0].type.tensor_type.shape.dim)
    for i, image in enumerate(images):
        if any(want is not None and want != side for want, side in zip(sides, image.shape[1:], strict=True)):
            raise ImageError(
                expected=f"images of {sides[0]} × {sides[1]} px, as the file takes",
                got=f"{image.shape[1]} × {image.shape[2]}",
                where=f"images[{i}]",
                fix="resize and pad them as training did, or export with an open size",
            )
    return [image.detach().cpu().float() for image in images]
