"""Bring an exported ONNX file to OpenVINO's format, verified in OpenVINO before it is written."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from ..errors import ExportError, OptionError
from .requirements import required_packages, validate_place
from .running import Agreement, Runner, agreement, detections_of, onnx_runner, validate_inputs

__all__ = ["OpenVinoReport", "convert_openvino"]

# Share found again, and mean difference of scores. Integers are rounded in other places by other kernels.
_BOUNDS = {"": (1.0, 1e-3), "float16": (0.98, 0.01), "int8": (0.9, 0.05)}


@dataclass(frozen=True)
class OpenVinoReport:
    """What was written, and how far OpenVINO's detections are from onnxruntime's.

    Attributes:
        path: The .xml file; its weights are in the .bin file beside it.
        megabytes: Size of both.
        agreement: Of OpenVINO with onnxruntime, on the images.
    """

    path: Path
    megabytes: float
    agreement: Agreement


def convert_openvino(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    images: Sequence[Tensor],
    *,
    threshold: float = 0.3,
) -> OpenVinoReport:
    """Write an ONNX file of `export_onnx`, `quantize_onnx` or `halve_onnx` as OpenVINO's .xml and .bin.

    Before they are there, OpenVINO has run them on its CPU, in float32 where the file has no lower precision, and found
    what onnxruntime finds: every detection again, scores within 1e-3 on average. Of a half-precision file 98 % and
    0.01; of an INT8 file 90 % and 0.05, because other kernels round integers in other places.

    Args:
        path: The ONNX file.
        output: The .xml file to write.
        images: ``(3, H, W)`` in 0…1 to check with.
        threshold: Detections that score less are not compared.

    Raises:
        ExportError: OpenVINO is not installed or lacks an operator, there is no such folder, or it finds something
            else.
        ImageError: ``images`` are none, no images, or of another size than the file takes.
        OptionError: ``output`` does not end in .xml.

    Example:
        >>> convert_openvino("model.onnx", "model.xml", images).agreement.matched  # doctest: +SKIP
        1.0
    """
    # 1. What is needed, before any work.
    path, output = Path(path), Path(output)
    packages = required_packages(["openvino"], where="convert_openvino", extra="openvino")
    packages |= required_packages(["onnx", "onnxruntime"], where="convert_openvino")
    validate_place(output)
    if output.suffix != ".xml":
        raise OptionError(
            expected="a file that ends in .xml",
            got=output.name,
            where="output",
            fix="its weights go into a .bin beside it",
        )
    original = packages["onnx"].load(str(path))
    metadata = {entry.key: entry.value for entry in original.metadata_props}
    inputs = validate_inputs(original, images)
    expected = detections_of(onnx_runner(path), inputs, where=f"{path}")

    # 2. The two files, once OpenVINO has found with them what onnxruntime finds.
    with TemporaryDirectory(dir=output.parent, prefix=".unchecked") as folder:
        files = [Path(folder) / f"{output.stem}{suffix}" for suffix in (".bin", ".xml")]
        model = _read(packages["openvino"], path)
        for key, value in metadata.items():
            model.set_rt_info(value, ["crosskd_assign", key])
        packages["openvino"].save_model(model, str(files[1]), compress_to_fp16=False)
        found = detections_of(openvino_runner(files[1]), inputs, where=f"{output}")
        measured = agreement(expected, found, threshold=threshold)
        _validate(measured, *_BOUNDS[metadata.get("precision", "")], output)
        megabytes = sum(file.stat().st_size for file in files) / 2**20
        for file in files:
            file.replace(output.parent / file.name)
    return OpenVinoReport(output, megabytes, measured)


def openvino_runner(path: Path) -> Runner:
    """Open a file with OpenVINO on the CPU, in float32 where the file has no lower precision."""
    openvino: Any = importlib.import_module("openvino")
    # Some processors would compute in bfloat16 by default, three digits.
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    try:
        compiled = openvino.Core().compile_model(_read(openvino, path), "CPU", options)
    except RuntimeError as error:
        raise _refused(error, path) from error
    return lambda images: [compiled([images])[output] for output in compiled.outputs]


def _read(openvino: Any, path: Path) -> Any:
    try:
        return openvino.Core().read_model(str(path))
    except RuntimeError as error:
        raise _refused(error, path) from error


def _refused(error: Exception, path: Path) -> ExportError:
    return ExportError(
        expected="a graph of operators that OpenVINO has",
        got=" ".join(str(error).split())[:300],
        where=f"{path}",
        fix='export it with outputs="dense" and a fixed image_size, or run the ONNX file',
    )


def _validate(found: Agreement, least: float, tolerance: float, output: Path) -> None:
    if found.matched < least or found.mean_score_difference > tolerance:
        raise ExportError(
            expected=f"{least:.0%} of onnxruntime's detections in OpenVINO, mean gap {tolerance}",
            got=f"{found.matched:.1%}, mean gap {found.mean_score_difference:.3g}",
            where=f"{output}",
            fix="run the ONNX file with onnxruntime; for INT8, calibrate on more images",
        )
