"""Out of PyTorch: a detector as a function of tensors, and as a verified file without NMS."""

from __future__ import annotations

from .onnx import ExportReport, export_onnx
from .openvino import OpenVinoReport, convert_openvino
from .precision import PrecisionReport, halve_onnx, quantize_onnx
from .running import Agreement, agreement
from .tensor_detector import TensorDetector

__all__ = [
    "Agreement",
    "ExportReport",
    "OpenVinoReport",
    "PrecisionReport",
    "TensorDetector",
    "agreement",
    "convert_openvino",
    "export_onnx",
    "halve_onnx",
    "quantize_onnx",
]
