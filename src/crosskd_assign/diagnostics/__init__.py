"""How end-to-end a detector is, and why: duplicates, the AP lost without NMS, thresholds, the teacher's head."""

from __future__ import annotations

from .comparisons import EndToEndReport, cross_head_detections, end_to_end_report
from .duplicates import DuplicateReport, duplicate_report
from .thresholds import Threshold, Thresholds, best_thresholds

__all__ = [
    "DuplicateReport",
    "EndToEndReport",
    "Threshold",
    "Thresholds",
    "best_thresholds",
    "cross_head_detections",
    "duplicate_report",
    "end_to_end_report",
]
