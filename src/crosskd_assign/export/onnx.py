"""Export a detector to an NMS-free ONNX file, verified with onnxruntime before it is written."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..detectors import probe_detector
from ..errors import ExportError
from ..validation import validate_option
from .checking import check_batches
from .compare import compare_file, predict, validate_tracing_mode
from .requirements import required_packages, validate_place
from .tensor_detector import Outputs, Preprocessing, TensorDetector
from .tracing import describe_model, trace_model

__all__ = ["ExportReport", "export_onnx"]

_PACKAGES = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")  # the third comes with the second
_OLDEST_TORCH = (2, 9)
_LARGEST = 2_000_000_000  # bytes of weights; protobuf ends at 2 GiB


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how closely onnxruntime repeats the detector with it.

    Attributes:
        path: The file.
        opset: Its ONNX operator set.
        input_shape: Of ``images``, with a name where a size is open.
        detections: K, detections of an image; fewer only for images so small that there are fewer predictions. With
            dense outputs A, the predictions for an image of the first batch.
        batches: Shapes that were run in both.
        score_difference: Largest difference of a score.
        box_difference: Largest difference of a box's side, in pixels.
        outputs: Kind of its outputs.

    Example:
        >>> report = ExportReport(Path("model.onnx"), 18, ("N", 3, 640, 640), 100, ((1, 3, 640, 640),), 1e-7, 1e-5)
        >>> report.input_shape, report.detections
        (('N', 3, 640, 640), 100)
    """

    path: Path
    opset: int
    input_shape: tuple[int | str, ...]
    detections: int
    batches: tuple[tuple[int, ...], ...]
    score_difference: float
    box_difference: float
    outputs: Outputs = "detections"


def export_onnx(
    detector: nn.Module,
    path: str | os.PathLike[str],
    *,
    image_size: tuple[int, int] | None = None,
    batch_size: int | None = None,
    preprocessing: Preprocessing = "inside",
    outputs: Outputs = "detections",
    one_to_many: bool = False,
    images: Sequence[Tensor] | Tensor | None = None,
    class_names: Mapping[int, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    opset: int = 18,
    score_tolerance: float | None = None,
    box_tolerance: float = 1e-3,
) -> ExportReport:
    """Write a detector to one ONNX file: pixels in, boxes out, no NMS and no shape that depends on the picture.

    The file has the input ``images (N, 3, H, W)`` float32 RGB in 0…1 and the outputs ``boxes (N, K, 4)``,
    ``scores (N, K)`` descending and ``labels (N, K)`` int64. K is ``detector.top_k``, or all A · C where there are
    fewer. ``detector.one_class_per_point`` and ``detector.classes`` are in the graph, ``detector.score_threshold`` is
    not: compare ``scores`` with it afterwards.

    With dense outputs they are ``boxes (N, A, 4)`` and ``scores (N, A, C)`` instead, everything that is predicted, and
    no TopK or Gather is in the graph: for runtimes that lack these. docs/how-to/export.md has the lines that finish it.

    Before the file is there, onnxruntime has run it on several batches and found what the detector finds; scores that
    tie may change places. The detector is copied for this and stays as it is.

    Args:
        detector: What to export, in float32: an `EndToEndDetector`, or a model or adapter that is to be one. Of a
            `Distiller` the student; no teacher gets into the file.
        path: File to write. It is replaced once the check has passed, and left alone otherwise.
        image_size: ``(height, width)`` in pixels. None leaves it open, which takes several times as long to trace; the
            check then tries 240 × 320, 333 × 250, 480 × 640 and, unless the detector enlarges or refuses them, 64 × 64
            and 96 × 64 pixels; with preprocessing "outside" multiples of ``size_divisible``, those next to the two
            small sizes among them.
        batch_size: N. None leaves it open.
        preprocessing: "inside": images as they come, boxes in their pixels. "outside": images resized and padded
            already. See `TensorDetector`.
        outputs: "detections" or "dense".
        one_to_many: With dense outputs: score as a detector that needs NMS does. See `TensorDetector`.
        images: ``(3, H, W)`` images in 0…1 to check with, of your own sizes; made up by default.
        class_names: Name of each label; in the file as JSON, under "class_names".
        metadata: Further entries for the file.
        opset: ONNX operator set, at least 18, which torch writes; for later ones the graph is converted.
        score_tolerance: Largest difference of a score that is put down to rounding. None: 1e-5; with a selection
            branch 1e-3, because its filter multiplies the rounding of logits by its sharpness.
        box_tolerance: Largest difference of a box's side that is, in pixels.

    Raises:
        ExportError: A package is missing or too old, there is no such folder, the detector cannot be traced, its graph
            has data-dependent shapes or, with dense outputs, operators that select, or onnxruntime finds something else
            than the detector.
        OptionError: An option is out of range.
        ImageError: ``images`` do not fit ``image_size``.
        UnknownDetectorError: No built-in adapter fits the model.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from torchvision.models.detection import fcos_resnet50_fpn
        >>> model = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=64)
        >>> with TemporaryDirectory() as folder:  # doctest: +SKIP
        ...     report = export_onnx(EndToEndDetector(model), f"{folder}/model.onnx", image_size=(64, 64), batch_size=1)
        >>> report.input_shape  # doctest: +SKIP
        (1, 3, 64, 64)
    """
    # 1. What is exported: a copy, in float32, to where a file can be.
    packages = _required_packages()
    path = Path(path)
    validate_place(path)
    validate_option("opset", opset, low=18)
    validate_option("batch_size", 1 if batch_size is None else batch_size, low=1)
    validate_option("score_tolerance", score_tolerance or 0, low=0)
    validate_option("box_tolerance", box_tolerance, low=0)
    view = TensorDetector(detector, preprocessing=preprocessing, outputs=outputs, one_to_many=one_to_many)
    view = copy.deepcopy(view)
    view.cpu().float().eval().requires_grad_(False)
    _validate_size(view)
    probe = probe_detector(view.adapter)

    # 2. What it predicts on images to check with.
    batches = check_batches(view, probe, image_size, batch_size, images)
    known = [predict(view, batch) for batch in batches]
    validate_tracing_mode(view, batches[0], known[0])
    predicted = known[0][0].scores  # (A, C)

    # 3. The graph, described.
    model = trace_model(view, probe, image_size, batch_size, opset)
    names = {} if class_names is None else {"class_names": json.dumps(dict(class_names), ensure_ascii=False)}
    describe_model(model, view, probe, {"classes": str(predicted.shape[1]), **names, **(metadata or {})})

    # 4. A file, that replaces the old one once onnxruntime has found with it what the detector finds.
    if score_tolerance is None:
        score_tolerance = 1e-5 if view.selection is None else 1e-3
    unchecked = path.with_name(f".{path.name}.{os.getpid()}.unchecked")
    try:
        packages["onnx_ir"].save(model, unchecked)
        gaps = compare_file(packages["onnxruntime"], unchecked, view, batches, known, score_tolerance, box_tolerance)
        unchecked.replace(path)
    finally:
        unchecked.unlink(missing_ok=True)
    shape = tuple(size if isinstance(size, int) else str(size) for size in model.graph.inputs[0].shape)
    shapes = tuple(tuple(batch.shape) for batch in batches)
    count = predicted.shape[0] if outputs == "dense" else view.count(*predicted.shape)
    return ExportReport(path, opset, shape, count, shapes, *gaps, outputs=outputs)


def _required_packages() -> dict[str, Any]:
    """The optional packages, by name."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        raise ExportError(
            expected=f"torch {oldest} or newer", got=torch.__version__, where="export_onnx", fix="upgrade torch"
        )
    return required_packages(_PACKAGES, where="export_onnx")


def _validate_size(view: TensorDetector) -> None:
    size = sum(x.numel() * x.element_size() for x in (*view.parameters(), *view.buffers()))
    if size > _LARGEST:
        raise ExportError(
            expected="weights that fit into one ONNX file, 2 GB",
            got=f"{size / 1e9:.1f} GB",
            where=type(view.adapter).__name__,
            fix="export a smaller detector; weights in a second file are not supported",
        )
