"""NMS-free dense object detectors through cross-label-assignment knowledge distillation.

``CrossHeadDistiller(student, teacher)`` trains like a torchvision detection model and, in evaluation mode, detects
without non-maximum suppression. Records are in `crosskd_assign.structures`, losses as pure functions in
`crosskd_assign.functional`, reports in `crosskd_assign.diagnostics`, checks of an adapter in `crosskd_assign.testing`,
and exporters in `crosskd_assign.export`.
"""

from .assignment import TaskAwareOneToOneAssigner
from .auxiliary import AuxiliaryHead
from .detectors import DetectorAdapter, ResizingAdapter, adapt
from .distillation import CrossHeadDistiller, Distiller, fade, inherit
from .end_to_end import EndToEndDetector
from .losses import CrossHeadLoss, OneToOneLoss
from .selection import SelectionBranch
from .structures import DensePredictions, GridLevel
from .version import __version__ as __version__

__all__ = [
    "AuxiliaryHead",
    "CrossHeadDistiller",
    "CrossHeadLoss",
    "DensePredictions",
    "DetectorAdapter",
    "Distiller",
    "EndToEndDetector",
    "GridLevel",
    "OneToOneLoss",
    "ResizingAdapter",
    "SelectionBranch",
    "TaskAwareOneToOneAssigner",
    "adapt",
    "fade",
    "inherit",
]
