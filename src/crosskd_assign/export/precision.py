"""Make an exported ONNX file smaller and faster: INT8, calibrated on images, and half precision."""

from __future__ import annotations

import importlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from torch import Tensor

from ..errors import ExportError
from ..validation import validate_choice, validate_option
from .graph import GraphParts, graph_parts
from .requirements import required_packages, validate_place
from .running import Agreement, agreement, detections_of, onnx_runner, validate_inputs

__all__ = ["Calibration", "PrecisionReport", "halve_onnx", "quantize_onnx"]

Calibration = Literal["minmax", "percentile", "entropy"]
_METHODS = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}
# What onnxruntime runs in integers beside the layers. Norms, softmax and the like stay in float.
_QUANTIZED = ["Conv", "ConvTranspose", "Gemm", "MatMul", "Relu", "Clip", "Add", "MaxPool"]


@dataclass(frozen=True)
class PrecisionReport:
    """What was written, and how far its detections are from those of the float32 file.

    Attributes:
        path: The file.
        megabytes: Its size.
        megabytes_before: Size of the float32 file.
        layers: Layers in lower precision.
        kept: Names of the head's last layers, which stay in float32, as does all that follows them.
        agreement: Measured in onnxruntime, on the images.
    """

    path: Path
    megabytes: float
    megabytes_before: float
    layers: int
    kept: tuple[str, ...]
    agreement: Agreement


def quantize_onnx(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    images: Sequence[Tensor],
    *,
    method: Calibration = "minmax",
    threshold: float = 0.3,
) -> PrecisionReport:
    """Quantise a detector's ONNX file to INT8, calibrated on images of its kind, by onnxruntime's static quantisation.

    Weights become int8, channel by channel, and maps uint8, between QuantizeLinear and DequantizeLinear nodes (QDQ).
    The head's last layers and all that follows them stay in float32: they are found by walking back from the outputs.
    Metadata is kept.

    Args:
        path: File of `export_onnx`, or of any detector with its inputs and outputs.
        output: File to write. It is replaced once it has run in onnxruntime.
        images: ``(3, H, W)`` in 0…1, of what the detector will see; some tens are enough.
        method: How the range of a map is chosen: all that was seen, or without the rarest values.
        threshold: Detections that score less are not compared.

    Raises:
        ExportError: A package is missing, there is no such folder, the file has no layers to quantise, or what was made
            of it does not run.
        ImageError: ``images`` are none, no images, or of another size than the file takes.
        OptionError: An option is none of these.

    Example:
        >>> report = quantize_onnx("model.onnx", "int8.onnx", images)  # doctest: +SKIP
        >>> report.agreement.matched  # doctest: +SKIP
        0.98
    """
    # 1. What is needed, before any work.
    validate_choice("method", method, tuple(_METHODS))
    quantization = required_packages(["onnx", "onnxruntime", "onnxruntime.quantization"], where="quantize_onnx")[
        "onnxruntime.quantization"
    ]

    # 2. The file, quantised.
    def quantized(model: Any, parts: GraphParts, inputs: list[Tensor], folder: Path) -> Any:
        onnx = importlib.import_module("onnx")
        onnx.save(model, str(folder / "prepared.onnx"))
        with _quiet():
            quantization.quantize_static(
                str(folder / "prepared.onnx"),
                str(folder / "int8.onnx"),
                _Reader(inputs),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=_QUANTIZED,
                nodes_to_quantize=list(parts.network),
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                calibrate_method=quantization.CalibrationMethod[_METHODS[method]],
            )
        return onnx.load(str(folder / "int8.onnx"))

    return _rewritten(Path(path), Path(output), images, quantized, "int8", threshold)


def halve_onnx(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    images: Sequence[Tensor],
    *,
    threshold: float = 0.3,
    least_matched: float = 0.98,
    score_tolerance: float = 0.01,
) -> PrecisionReport:
    """Bring the network in a detector's ONNX file to half precision; inputs, outputs and decoding stay in float32.

    In float16 a place beyond 1,024 pixels is a whole pixel off, so boxes are decoded in float32.

    Args:
        path: File of `export_onnx`, or of any detector with its inputs and outputs.
        output: File to write. It is replaced once it has run in onnxruntime.
        images: ``(3, H, W)`` in 0…1 to check with.
        threshold: Detections that score less are not compared.
        least_matched: Share of the detections that must be found again.
        score_tolerance: Mean difference of their scores that is put down to rounding. Single ones may differ by more:
            a selection branch decides between two points that score alike.

    Raises:
        ExportError: As `quantize_onnx`; or the detections are others.
        ImageError: As `quantize_onnx`.

    Example:
        >>> report = halve_onnx("model.onnx", "half.onnx", images)  # doctest: +SKIP
        >>> report.agreement.matched  # doctest: +SKIP
        1.0
    """
    validate_option("least_matched", least_matched, low=0, high=1)
    name = "onnxruntime.transformers.float16"
    convert = required_packages(["onnx", "onnxruntime", name], where="halve_onnx")[name].convert_float_to_float16

    def halved(model: Any, parts: GraphParts, inputs: list[Tensor], folder: Path) -> Any:
        del inputs, folder
        others = [node.name for node in model.graph.node if node.name not in set(parts.network)]
        return convert(model, keep_io_types=True, node_block_list=others)

    def verified(found: Agreement) -> None:
        if found.matched < least_matched or found.mean_score_difference > score_tolerance:
            raise ExportError(
                expected=f"{least_matched:.0%} of the detections in half precision, mean gap {score_tolerance}",
                got=f"{found.matched:.1%}, mean gap {found.mean_score_difference:.3g}",
                where=f"{output}",
                fix="leave it in float32, or lower the bounds",
            )

    return _rewritten(Path(path), Path(output), images, halved, "float16", threshold, verified)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep onnxruntime's progress and advice to itself: what it advises is done."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)


class _Reader:
    """Images one by one, as onnxruntime's calibration takes them."""

    def __init__(self, images: Sequence[Tensor]) -> None:
        self._rest: Iterator[Tensor] = iter(images)

    def get_next(self) -> dict[str, Any] | None:
        image = next(self._rest, None)
        return None if image is None else {"images": image[None].numpy()}


def _rewritten(
    path: Path,
    output: Path,
    images: Sequence[Tensor],
    rewrite: Callable[[Any, GraphParts, list[Tensor], Path], Any],
    precision: str,
    threshold: float,
    verify: Callable[[Agreement], None] = lambda _: None,
) -> PrecisionReport:
    """Rewrite a file, run both on the images, and put it in its place."""
    # 1. The file, with norms folded into convolutions; images that it takes.
    onnx = importlib.import_module("onnx")
    validate_place(output)
    if not path.is_file():
        raise ExportError(expected="an ONNX file", got="none", where=f"{path}", fix="write it with export_onnx")
    original = onnx.load(str(path))
    inputs = validate_inputs(original, images)
    expected = detections_of(onnx_runner(path), inputs, where=f"{path}")
    with TemporaryDirectory() as folder:
        prepared = Path(folder) / "folded.onnx"
        _fold(path, prepared)
        model = onnx.load(str(prepared))

        # 2. The other precision.
        parts = graph_parts(model)
        layers = sum(node.name in set(parts.network) and node.op_type in _QUANTIZED[:4] for node in model.graph.node)
        made = rewrite(model, parts, inputs, Path(folder))
    del made.metadata_props[:]
    made.metadata_props.extend(original.metadata_props)
    made.metadata_props.add(key="precision", value=precision)
    made.producer_name, made.producer_version = original.producer_name, original.producer_version

    # 3. The file, once it has run.
    unchecked = output.with_name(f".{output.name}.{os.getpid()}.unchecked")
    try:
        onnx.save(made, str(unchecked))
        found = agreement(
            expected, detections_of(onnx_runner(unchecked), inputs, where=f"{output}"), threshold=threshold
        )
        verify(found)
        sizes = [file.stat().st_size / 2**20 for file in (unchecked, path)]
        unchecked.replace(output)
    finally:
        unchecked.unlink(missing_ok=True)
    return PrecisionReport(output, sizes[0], sizes[1], layers, parts.outputs, found)


def _fold(path: Path, prepared: Path) -> None:
    """Let onnxruntime fold batch norms into convolutions."""
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(prepared)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
