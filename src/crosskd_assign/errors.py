"""What can go wrong, as types. Every message says what was expected, what came, where, and what to do."""

from __future__ import annotations

__all__ = [
    "CrossKDError",
    "DetectorError",
    "ExportError",
    "ImageError",
    "IncompatibleDetectorsError",
    "MissingTeacherError",
    "OptionError",
    "PredictionError",
    "TargetError",
    "UnknownDetectorError",
]


class CrossKDError(ValueError):
    """Root of every error this library raises on purpose."""


class OptionError(CrossKDError):
    """A constructor argument lies outside its range."""


class ImageError(CrossKDError):
    """The images of a call are not a sequence of ``(3, H, W)`` float tensors."""


class TargetError(CrossKDError):
    """The targets of a call cannot be trained on: wrong shape, dtype, device, label or box."""


class PredictionError(CrossKDError):
    """A detector's predictions break the contract of `DensePredictions`."""


class DetectorError(CrossKDError):
    """A detector cannot play the part it was given."""


class UnknownDetectorError(DetectorError):
    """No built-in adapter knows this model."""


class IncompatibleDetectorsError(DetectorError):
    """Student and teacher cannot be crossed."""


class MissingTeacherError(CrossKDError):
    """A copied or unpickled distiller was asked to train; the teacher never travels with it."""


class ExportError(CrossKDError):
    """No ONNX file was written: a package is missing, the detector cannot be traced, or the file disagrees with it."""


def problem(expected: str, got: str, where: str, fix: str) -> str:
    """The one template of an error message."""
    return f"Expected {expected}, but got {got} ({where}). Fix: {fix}."
