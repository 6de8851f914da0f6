"""Export a detector to an NMS-free ONNX file, verified with onnxruntime before it is written."""

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

from ..detectors import Probe, probe_detector
from ..errors import CrossKDError, ExportError, ImageError, OptionError
from ..validation import validate_images, validate_option
from ..version import __version__
from .compare import OUTPUTS, compare_file, predict, validate_tracing_mode
from .tensor_detector import Preprocessing, TensorDetector

__all__ = ["ExportReport", "export_onnx"]

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


def export_onnx(
    detector: nn.Module,
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
    """Write a detector to one ONNX file: pixels in, boxes out, no NMS and no shape that depends on the picture.

    The file has the input ``images (N, 3, H, W)`` float32 RGB in 0…1 and the outputs ``boxes (N, K, 4)``,
    ``scores (N, K)`` descending and ``labels (N, K)`` int64. K is ``detector.top_k``, or all A · C where there are
    fewer. ``detector.one_class_per_point`` and ``detector.classes`` are in the graph, ``detector.score_threshold`` is
    not: compare ``scores`` with it afterwards.

    Before the file is there, onnxruntime has run it on several batches and found what the detector finds; scores that
    tie may change places. The detector is copied for this and stays as it is.

    Args:
        detector: What to export, in float32: an `EndToEndDetector`, or a model or adapter that is to be one. Of a
            `Distiller` the student; no teacher gets into the file.
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
        ExportError: A package is missing or too old, there is no such folder, the detector cannot be traced, its graph
            has data-dependent shapes, or onnxruntime finds something else than the detector.
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
    _validate_place(path)
    validate_option("opset", opset, low=18)
    validate_option("batch_size", 1 if batch_size is None else batch_size, low=1)
    view = copy.deepcopy(TensorDetector(detector, preprocessing=preprocessing))
    view.cpu().float().eval().requires_grad_(False)
    _validate_size(view)
    probe = probe_detector(view.adapter)

    # 2. What it predicts on images to check with.
    batches = _batches(view, probe, image_size, batch_size, images)
    known = [predict(view, batch) for batch in batches]
    validate_tracing_mode(view, batches[0], known[0])
    predicted = known[0][0].scores  # (A, C)

    # 3. The graph, described.
    model = _trace(view, probe, image_size, batch_size, opset)
    names = {} if class_names is None else {"class_names": json.dumps(dict(class_names), ensure_ascii=False)}
    _describe(model, view, probe, {"classes": str(predicted.shape[1]), **names, **(metadata or {})})

    # 4. A file, that replaces the old one once onnxruntime has found with it what the detector finds.
    unchecked = path.with_name(f".{path.name}.{os.getpid()}.unchecked")
    try:
        packages["onnx_ir"].save(model, unchecked)
        gaps = compare_file(packages["onnxruntime"], unchecked, view, batches, known, score_tolerance, box_tolerance)
        unchecked.replace(path)
    finally:
        unchecked.unlink(missing_ok=True)
    shape = tuple(size if isinstance(size, int) else str(size) for size in model.graph.inputs[0].shape)
    shapes = tuple(tuple(batch.shape) for batch in batches)
    return ExportReport(path, opset, shape, view.count(*predicted.shape), shapes, *gaps)


def _validate_place(path: Path) -> None:
    """Raise `ExportError` unless a file can be written there: tracing takes minutes."""
    if path.is_dir():
        got = "a folder"
    elif not path.parent.is_dir():
        got = "no such folder"
    elif not os.access(path.parent, os.W_OK):
        got = "a folder that cannot be written to"
    else:
        return
    raise ExportError(
        expected="a file in a folder that is there", got=got, where=f"{path}", fix="make the folder, or choose another"
    )


def _required_packages() -> dict[str, Any]:
    """The optional packages, by name."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST_TORCH:
        oldest = ".".join(map(str, _OLDEST_TORCH))
        raise ExportError(
            expected=f"torch {oldest} or newer", got=torch.__version__, where="export_onnx", fix="upgrade torch"
        )
    try:
        return {name: importlib.import_module(name) for name in _PACKAGES}
    except ImportError as error:
        raise ExportError(
            expected=", ".join(_PACKAGES),
            got=str(error),
            where="export_onnx",
            fix='pip install "crosskd_assign[export]"',
        ) from error


def _validate_size(view: TensorDetector) -> None:
    size = sum(x.numel() * x.element_size() for x in (*view.parameters(), *view.buffers()))
    if size > _LARGEST:
        raise ExportError(
            expected="weights that fit into one ONNX file, 2 GB",
            got=f"{size / 1e9:.1f} GB",
            where=type(view.adapter).__name__,
            fix="export a smaller detector; weights in a second file are not supported",
        )


# --- what the file is checked with ------------------------------------------------------------------------------------


def _batches(
    view: TensorDetector,
    probe: Probe,
    size: tuple[int, int] | None,
    batch_size: int | None,
    images: Sequence[Tensor] | Tensor | None,
) -> list[Tensor]:
    """Make batches of one and of more images, of one size or, where that is open, of several."""
    # 1. Given images, each beside its mirror image.
    counts = (1, 2) if batch_size is None else (batch_size,)
    if images is not None:
        validate_images(images)
        for i, image in enumerate(images):
            _validate_image_size(view, (image.shape[1], image.shape[2]), size, f"images[{i}]", ImageError)
        pairs = [torch.stack([image, image.flip(2)]).detach().cpu().float() for image in images]
        return [pair.repeat(n, 1, 1, 1)[:n] for pair in pairs for n in counts]

    # 2. Made-up ones otherwise.
    if size is not None:
        _validate_image_size(view, size, None, "image_size", OptionError)
        sizes = [size, size]
    elif view.preprocessing == "inside":
        sizes = [(240, 320), (333, 250), (480, 640)]
    else:
        d, (height, width) = view.adapter.size_divisible, _roomy(view, probe)
        sizes = [(height, width), (height + d, width - d), (width, height)]
    generator = torch.Generator().manual_seed(0)
    return [_made_up(n, *size, generator) for size, n in zip(sizes, cycle(counts), strict=False)]


def _validate_image_size(
    view: TensorDetector, size: tuple[int, int], wanted: tuple[int, int] | None, where: str, error: type[CrossKDError]
) -> None:
    d = view.adapter.size_divisible if view.preprocessing == "outside" else 1
    if wanted is not None and tuple(wanted) != tuple(size):
        raise error(
            expected=f"images of {wanted}",
            got=f"{size}",
            where=where,
            fix="choose images of image_size, or leave it open",
        )
    if any(side < d or side % d for side in size):
        raise error(
            expected=f"height and width in multiples of {d}",
            got=f"{tuple(size)}",
            where=where,
            fix='pad as adapter.preprocess does, or use preprocessing="inside"',
        )


def _roomy(view: TensorDetector, probe: Probe) -> tuple[int, int]:
    """Choose a size that makes every map at least three rows high: the tracer would take one row for a constant."""
    d = view.adapter.size_divisible
    coarsest = max(d, *probe.strides)
    return ceil(3 * coarsest / d) * d, ceil(4 * coarsest / d) * d


def _made_up(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Images with large and small structure, ``(count, 3, height, width)`` in 0…1."""
    layers = [torch.rand(count, 3, height // cell + 2, width // cell + 2, generator=generator) for cell in (64, 16, 4)]
    smooth = [F.interpolate(layer, size=(height, width), mode="bilinear") for layer in layers]
    return torch.stack(smooth).mul(torch.tensor([0.5, 0.3, 0.2]).view(3, 1, 1, 1, 1)).sum(dim=0)


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


def _trace(view: TensorDetector, probe: Probe, size: tuple[int, int] | None, batch_size: int | None, opset: int) -> Any:
    """Trace the graph, an ``onnx_ir.Model``."""
    # 1. Which sizes stay open.
    d = view.adapter.size_divisible
    cut = size is None and view.preprocessing == "inside"
    images = torch.zeros(batch_size or 2, 3, *(size or _roomy(view, probe)))
    batch = {} if batch_size is not None else {0: torch.export.Dim("batch", min=1)}
    rows, columns = (d * torch.export.Dim(name, min=1) for name in ("rows", "columns"))
    height, width = (torch.export.Dim(name, min=2) for name in ("height", "width"))
    open_size = {} if size is not None else {2: height, 3: width} if cut else {2: rows, 3: columns}
    shapes = {"images": batch | open_size}
    module: nn.Module = view
    arguments: tuple[Tensor, ...] = (images,)
    outputs: tuple[str, ...] = OUTPUTS
    if cut:
        module, arguments, outputs = _Halves(view), (images, torch.zeros_like(images)), ("prepared", *OUTPUTS)
        shapes["canvas"] = batch | {2: rows, 3: columns}

    # 2. The graph.
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
        raise ExportError(
            expected="a detector that torch.onnx can trace",
            got=f"{error}",
            where=f"{type(view.adapter).__name__}, torch {torch.__version__}",
            fix="use plain torch operators in the adapter, and never turn a size or a value into a Python number there",
        ) from error
    model = program.model  # type: ignore[union-attr]  # None only without dynamo
    _validate_open(model, shapes, view)

    # 3. The two halves are joined.
    if cut:
        graph = model.graph
        graph.inputs[1].replace_all_uses_with(graph.outputs[0])
        del graph.inputs[1], graph.outputs[0]
        graph.sort()
    return model


def _validate_open(model: Any, shapes: Mapping[str, Mapping[int, Any]], view: TensorDetector) -> None:
    """Raise `ExportError` if an adapter's code has fixed a size that should stay open."""
    for value in model.graph.inputs:
        for axis in shapes[value.name]:
            size = value.shape[axis]
            if isinstance(size, int):
                option = "batch_size=1" if axis == 0 else "a fixed image_size"
                raise ExportError(
                    expected=f"an open {('number of images', '', 'image height', 'image width')[axis]}",
                    got=f"one that tracing has fixed at {size}",
                    where=type(view.adapter).__name__,
                    fix=f"write x.shape[0] for len(x) in the adapter and loop over no images, or export with {option}",
                )


def _describe(model: Any, view: TensorDetector, probe: Probe, entries: Mapping[str, str]) -> None:
    """Put metadata in, take traces of the machine out, and name open sizes.

    Raises:
        ExportError: A node's shape depends on what is in the picture.
    """
    # 1. No shape may depend on the picture.
    nodes = list(model.graph.all_nodes())
    wrong = sorted({node.op_type for node in nodes} & _DATA_DEPENDENT)
    if wrong:
        raise ExportError(
            expected="a graph without data-dependent shapes",
            got=", ".join(wrong),
            where=type(view.adapter).__name__,
            fix="leave suppression, masks and loops over values out of the adapter's features and head",
        )

    # 2. Names and metadata.
    for thing in (model.graph, *nodes, *(value for node in nodes for value in node.outputs)):
        thing.metadata_props.clear()  # file names and source lines
    for value in model.graph.outputs:
        if not isinstance(value.shape[1], int):
            value.shape[1] = "detections"
    adapter = view.adapter
    model.producer_name, model.producer_version = "crosskd_assign", __version__
    model.metadata_props.update(
        {
            "adapter": type(adapter).__name__,
            "torch": torch.__version__,
            "strides": json.dumps(probe.strides),
            "preprocessing": view.preprocessing,
            "size_divisible": str(adapter.size_divisible),
            "image_mean": json.dumps(adapter.image_mean.flatten().tolist()),
            "image_std": json.dumps(adapter.image_std.flatten().tolist()),
            **entries,
        }
    )
