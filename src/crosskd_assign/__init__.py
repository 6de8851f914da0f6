"""NMS-free dense object detectors through cross-label-assignment knowledge distillation.

``CrossHeadDistiller(student, teacher)`` trains like a torchvision detection model and, in evaluation mode, detects
without non-maximum suppression.
"""

from . import diagnostics, errors, functional
from .alignment import FeatureAligner
from .assigner import TaskAwareOneToOneAssigner
from .conformance import AdapterReport, check_adapter
from .detectors import DetectorAdapter, adapt
from .distiller import CrossHeadDistiller
from .end_to_end import EndToEndDetector
from .export import ExportReport, export_onnx
from .inheritance import Inheritance, inherit
from .structures import Assignment, Batch, DensePredictions, Detection, GridLevel, Target
from .tensors import TensorDetector

__version__ = "0.1.0"

__all__ = [
    "AdapterReport",
    "Assignment",
    "Batch",
    "CrossHeadDistiller",
    "DensePredictions",
    "Detection",
    "DetectorAdapter",
    "EndToEndDetector",
    "ExportReport",
    "FeatureAligner",
    "GridLevel",
    "Inheritance",
    "Target",
    "TaskAwareOneToOneAssigner",
    "TensorDetector",
    "adapt",
    "check_adapter",
    "diagnostics",
    "errors",
    "export_onnx",
    "functional",
    "inherit",
]
