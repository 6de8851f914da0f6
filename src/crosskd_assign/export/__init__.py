"""Out of PyTorch: a detector as a function of tensors, and as a verified ONNX file without NMS."""

from __future__ import annotations

from .onnx import ExportReport, export_onnx
from .tensor_detector import TensorDetector

__all__ = ["ExportReport", "TensorDetector", "export_onnx"]
