"""A detector as an ONNX file without NMS, which onnxruntime has repeated before the file is there."""

from __future__ import annotations

import copy
import importlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from math import ceil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .distiller import CrossHeadDistiller
from .end_to_end import EndToEndDetector
from .errors import ExportError, ImageError, OptionError, problem
from .parity import Prediction, difference, predict
from .structures import Detection
from .tensors import Preprocessing, TensorDetector
from .validation import check_images, check_option

__all__ = ["ExportReport", "export_onnx"]

_OUTPUTS = ("boxes", "scores", "labels")
_PACKAGES = ("onnx", "onnxscript", "onnx_ir", "onnxruntime")  # the third comes with the second
_OLDEST_TORCH = (2, 9)
_LARGEST = 2_000_000_000  # bytes of weights; protobuf ends at 2 GiB
# Their shapes depend on what is in the picture, which many runtimes cannot take.
_DATA_DEPENDENT = frozenset({"Compress", "If", "Loop", "NonMaxSuppression", "NonZero", "Scan", "Unique"})


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how closely onnxruntime repeats the detector with it.

    Attributes:
        path: The file.
        opset: Its ONNX operator set.
        input_shape: Of ``images``, with a name where a size is open.
        detections: K, detections of an image; fewer only for images so small that there are fewer predictions.
        batches: Shapes that were run in both.
        score_difference: Largest difference of a score.
        box_difference: Largest difference of a box's side, in pixels.
    """

    path: Path
    opset: int
    input_shape: tuple[int | str, ...]
    detections: int
    batches: tuple[tuple[int, ...], ...]
    score_difference: float
    box_difference: float


def export_onnx(
    detector: EndToEndDetector | CrossHeadDistiller,
    path: str | os.PathLike[str],
    *,
    image_size: tuple[int, int] | None = None,
    batch_size: int | None = None,
    preprocessing: Preprocessing = "inside",
    images: Sequence[Tensor] | Tensor | None = None,
    class_names: Mapping[int, str] | None = None,
    metadata: Mapping[str, str] | None = None,
    opset: int = 18,
    score_tolerance: float = 1e-5,
    box_tolerance: float = 1e-3,
) -> ExportReport:
    """Write a detector to one ONNX file: pixels in, boxes out, no NMS and no shape that depends on what is seen.

    The file has the input ``images (N, 3, H, W)`` float32 RGB in 0…1 and the outputs ``boxes (N, K, 4)``,
    ``scores (N, K)`` descending and ``labels (N, K)`` int64. K is ``detector.top_k``, or all A · C where there are
    fewer. ``detector.score_threshold`` is not in the graph: compare ``scores`` with it afterwards.

    Before the file is there, onnxruntime has run it on several batches and found what the detector finds; scores that
    tie may change places. The detector is copied for this and stays as it is.

    Args:
        detector: What to export, in float32. Of a `CrossHeadDistiller` the student; no teacher gets into the file.
        path: File to write. It is replaced once the check has passed, and left alone otherwise.
        image_size: ``(height, width)`` in pixels. None leaves it open, which takes several times as long to trace.
        batch_size: N. None leaves it open.
        preprocessing: "inside": images as they come, boxes in their pixels. "outside": images resized and padded
            already. See `TensorDetector`.
        images: ``(3, H, W)`` images in 0…1 to check with; made up by default.
        class_names: Name of each label; in the file as JSON, under "class_names".
        metadata: Further entries for the file.
        opset: ONNX operator set, at least 18, which torch writes; for later ones the graph is converted.
        score_tolerance: Largest difference of a score that is put down to rounding.
        box_tolerance: Largest difference of a box's side that is, in pixels.

    Raises:
        ExportError: A package is missing or too old, the detector cannot be traced, its graph has data-dependent
            shapes, or onnxruntime finds something else than the detector.
        OptionError: An option is out of range.
        ImageError: ``images`` do not fit ``image_size``.
    """
    packages = _required_packages()
    check_option("opset", opset, low=18)
    check_option("batch_size", 1 if batch_size is None else batch_size, low=1)
    view = copy.deepcopy(TensorDetector(detector, preprocessing=preprocessing))
    view.cpu().float().eval().requires_grad_(False)
    _check_weight(view)
    batches = _batches(view, image_size, batch_size, images)
    known = [predict(view, batch) for batch in batches]
    predicted = known[0][0].scores  # (A, C)
    model = _trace(view, image_size, batch_size, opset)
    names = {} if class_names is None else {"class_names": json.dumps(dict(class_names), ensure_ascii=False)}
    _describe(model, view, {"classes": str(predicted.shape[1]), **names, **(metadata or {})})
    path = Path(path)
    unchecked = path.with_name(f".{path.name}.{os.getpid()}.unchecked")
    try:
        packages["onnx_ir"].save(model, unchecked)
        gaps = _compare(packages["onnxruntime"], unchecked, batches, known, score_tolerance, box_tolerance)
        unchecked.replace(path)
    finally:
        unchecked.unlink(missing_ok=True)
    shape = tuple(size if isinstance(size, int) else str(size) for size in model.graph.inputs[0].shape)
    shapes = tuple(tuple(batch.shape) for batch in batches)
    return ExportReport(path, opset, shape, min(view.top_k, predicted.numel()), shapes, *gaps)


def _required_packages() -> dict[str, Any]:
    """The optional packages, by name."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        raise ExportError(problem(f"torch {oldest} or newer", torch.__version__, "export_onnx", "upgrade torch"))
    try:
        return {name: importlib.import_module(name) for name in _PACKAGES}
    except ImportError as error:
        fix = 'pip install "crosskd_assign[export]"'
        raise ExportError(problem(", ".join(_PACKAGES), str(error), "export_onnx", fix)) from error


def _check_weight(view: TensorDetector) -> None:
    size = sum(x.numel() * x.element_size() for x in (*view.parameters(), *view.buffers()))
    if size > _LARGEST:
        got, fix = f"{size / 1e9:.1f} GB", "export a smaller detector; weights in a second file are not supported"
        raise ExportError(problem("weights that fit into one ONNX file, 2 GB", got, type(view.adapter).__name__, fix))


# --- what the file is checked with ------------------------------------------------------------------------------------


def _batches(
    view: TensorDetector, size: tuple[int, int] | None, batch_size: int | None, images: Sequence[Tensor] | Tensor | None
) -> list[Tensor]:
    """Batches of one and of more images, of one size or, where that is open, of several."""
    counts = (1, 2) if batch_size is None else (batch_size,)
    if images is not None:
        check_images(images)
        for i, image in enumerate(images):
            _check_size(view, (image.shape[1], image.shape[2]), size, f"images[{i}]", ImageError)
        pairs = [torch.stack([image, image.flip(2)]).detach().cpu().float() for image in images]
        return [pair.repeat(n, 1, 1, 1)[:n] for pair in pairs for n in counts]
    if size is not None:
        _check_size(view, size, None, "image_size", OptionError)
        sizes = [size, size]
    elif view.preprocessing == "inside":
        sizes = [(240, 320), (333, 250), (480, 640)]
    else:
        d, (height, width) = view.adapter.size_divisible, _roomy(view)
        sizes = [(height, width), (height + d, width - d), (width, height)]
    generator = torch.Generator().manual_seed(0)
    return [_made_up(n, *size, generator) for size, n in zip(sizes, cycle(counts), strict=False)]


def _check_size(
    view: TensorDetector, size: tuple[int, int], wanted: tuple[int, int] | None, where: str, error: type[ValueError]
) -> None:
    d = view.adapter.size_divisible if view.preprocessing == "outside" else 1
    if wanted is not None and tuple(wanted) != tuple(size):
        raise error(problem(f"images of {wanted}", f"{size}", where, "choose images of image_size, or leave it open"))
    if any(side < d or side % d for side in size):
        fix = 'pad as adapter.preprocess does, or use preprocessing="inside"'
        raise error(problem(f"height and width in multiples of {d}", f"{tuple(size)}", where, fix))


def _roomy(view: TensorDetector) -> tuple[int, int]:
    """A size that makes every map at least three rows high: of one row, the tracer would think it was always one."""
    d = view.adapter.size_divisible
    coarsest = max(d, *(level.stride for level in view.adapter.pyramid()))
    return ceil(3 * coarsest / d) * d, ceil(4 * coarsest / d) * d


def _made_up(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Images with large and small structure, ``(count, 3, height, width)`` in 0…1."""
    layers = [torch.rand(count, 3, height // cell + 2, width // cell + 2, generator=generator) for cell in (64, 16, 4)]
    smooth = [F.interpolate(layer, size=(height, width), mode="bilinear") for layer in layers]
    return torch.stack(smooth).mul(torch.tensor([0.5, 0.3, 0.2]).view(3, 1, 1, 1, 1)).sum(dim=0)


def _compare(
    onnxruntime: Any,
    path: Path,
    batches: Sequence[Tensor],
    known: Sequence[Sequence[Prediction]],
    score_tolerance: float,
    box_tolerance: float,
) -> tuple[float, float]:
    """Largest difference of a score and of a box between file and detector.

    Raises:
        ExportError: It is no rounding, or the file does not run.
    """
    fix = "look for Python numbers, caches or branches that depend on the image in the adapter; what is little above "
    fix += "the tolerances is rounding, and they can be raised"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised, too
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        found = [session.run(_OUTPUTS, {"images": batch.numpy()}) for batch in batches]
    except Exception as error:  # onnxruntime has a dozen types
        where = f"export_onnx, images of {[tuple(batch.shape) for batch in batches]}"
        raise ExportError(problem("a file that onnxruntime runs", str(error), where, fix)) from error
    gaps = []
    for batch, outputs, images in zip(batches, found, known, strict=True):
        rows = zip(*map(torch.from_numpy, outputs), images, strict=True)
        for i, (boxes, scores, labels, prediction) in enumerate(rows):
            gap = difference(
                Detection(boxes=boxes, scores=scores, labels=labels),
                prediction,
                score_tolerance=score_tolerance,
                box_tolerance=box_tolerance,
            )
            if gap.fault:
                where = f"export_onnx, image {i} of {tuple(batch.shape)}"
                raise ExportError(problem("the detections of the detector", gap.fault, where, fix))
            gaps.append(gap)
    return max(gap.scores for gap in gaps), max(gap.boxes for gap in gaps)


# --- the graph --------------------------------------------------------------------------------------------------------


class _Halves(nn.Module):
    """A `TensorDetector` cut between preparation and network, for image sizes that stay open.

    The size of a prepared image is a long formula of the image's own, which torch would carry through every layer, for
    minutes. Instead the network gets an input with sizes of its own; the two are joined in the ONNX graph.
    """

    def __init__(self, view: TensorDetector) -> None:
        super().__init__()
        self.view = view

    def forward(self, images: Tensor, canvas: Tensor) -> tuple[Tensor, ...]:
        batch = self.view.prepare(images)
        return batch.images, *self.view.detect(replace(batch, images=canvas))


def _trace(view: TensorDetector, size: tuple[int, int] | None, batch_size: int | None, opset: int) -> Any:
    """The graph as an ``onnx_ir.Model``."""
    d = view.adapter.size_divisible
    cut = size is None and view.preprocessing == "inside"
    images = torch.zeros(batch_size or 2, 3, *(size or _roomy(view)))
    batch = {} if batch_size is not None else {0: torch.export.Dim("batch", min=1)}
    rows, columns = (d * torch.export.Dim(name, min=1) for name in ("rows", "columns"))
    height, width = (torch.export.Dim(name, min=2) for name in ("height", "width"))
    open_size = {} if size is not None else {2: height, 3: width} if cut else {2: rows, 3: columns}
    shapes = {"images": batch | open_size}
    module: nn.Module = view
    arguments: tuple[Tensor, ...] = (images,)
    outputs: tuple[str, ...] = _OUTPUTS
    if cut:
        module, arguments, outputs = _Halves(view), (images, torch.zeros_like(images)), ("prepared", *_OUTPUTS)
        shapes["canvas"] = batch | {2: rows, 3: columns}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the exporter's own, about itself
            program = torch.onnx.export(
                module.eval(),
                arguments,
                dynamic_shapes=shapes,
                opset_version=opset,
                input_names=list(shapes),
                output_names=list(outputs),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # of torch.export, of the translation, of whatever an adapter does
        fix = "use plain torch operators in the adapter, and never turn a size or a value into a Python number there"
        where = f"{type(view.adapter).__name__}, torch {torch.__version__}"
        raise ExportError(problem("a detector that torch.onnx can trace", f"{error}", where, fix)) from error
    model = program.model  # type: ignore[union-attr]  # None only without dynamo
    _check_open(model, shapes, view)
    if cut:
        graph = model.graph
        graph.inputs[1].replace_all_uses_with(graph.outputs[0])
        del graph.inputs[1], graph.outputs[0]
        graph.sort()
    return model


def _version() -> str:
    version: str = importlib.import_module("crosskd_assign").__version__  # which imports this module, so not before
    return version


def _check_open(model: Any, shapes: Mapping[str, Mapping[int, Any]], view: TensorDetector) -> None:
    """Raise `ExportError` if an adapter's code has fixed a size that should stay open."""
    for value in model.graph.inputs:
        for axis in shapes[value.name]:
            size = value.shape[axis]
            if isinstance(size, int):
                option = "batch_size=1" if axis == 0 else "a fixed image_size"
                expected = f"an open {('number of images', '', 'image height', 'image width')[axis]}"
                fix = f"write x.shape[0] for len(x) in the adapter and loop over no images, or export with {option}"
                got = f"one that tracing has fixed at {size}"
                raise ExportError(problem(expected, got, type(view.adapter).__name__, fix))


def _describe(model: Any, view: TensorDetector, entries: Mapping[str, str]) -> None:
    """Metadata in, traces of the machine out, and plain names for open sizes.

    Raises:
        ExportError: A node's shape depends on what is in the picture.
    """
    nodes = list(model.graph.all_nodes())
    wrong = sorted({node.op_type for node in nodes} & _DATA_DEPENDENT)
    if wrong:
        fix = "leave suppression, masks and loops over values out of the adapter's features and head"
        where = type(view.adapter).__name__
        raise ExportError(problem("a graph without data-dependent shapes", ", ".join(wrong), where, fix))
    for thing in (model.graph, *nodes, *(value for node in nodes for value in node.outputs)):
        thing.metadata_props.clear()  # file names and source lines
    for value in model.graph.outputs:
        if not isinstance(value.shape[1], int):
            value.shape[1] = "detections"
    adapter = view.adapter
    model.producer_name, model.producer_version = "crosskd_assign", _version()
    model.metadata_props.update(
        {
            "adapter": type(adapter).__name__,
            "torch": torch.__version__,
            "strides": json.dumps([level.stride for level in adapter.pyramid()]),
            "preprocessing": view.preprocessing,
            "size_divisible": str(adapter.size_divisible),
            "image_mean": json.dumps(adapter.image_mean.flatten().tolist()),
            "image_std": json.dumps(adapter.image_std.flatten().tolist()),
            **entries,
        }
    )
