"""What can go wrong, as types. Every error says what was expected, what came, where, and what to do."""

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
    """Root of every error this library raises on purpose.

    The message is "Expected …, but got … (…). Fix: ….", made of the four parts, which are attributes too.

    Args:
        message: The whole message, in place of the four parts.
        expected: What was expected.
        got: What came instead.
        where: Where: an argument, an option, a file.
        fix: What to do about it.

    Attributes:
        page: Page of the documentation that explains errors of this kind.

    Example:
        >>> try:
        ...     raise OptionError(expected="alpha of at least 0", got="-1", where="argument", fix="raise it")
        ... except CrossKDError as error:
        ...     error.fix
        'raise it'
    """

    page = "docs/troubleshooting.md"

    def __init__(self, message: str = "", *, expected: str = "", got: str = "", where: str = "", fix: str = "") -> None:
        super().__init__(message or f"Expected {expected}, but got {got} ({where}). Fix: {fix}.")
        self.expected, self.got, self.where, self.fix = expected, got, where, fix


class OptionError(CrossKDError):
    """A constructor argument lies outside its range."""


class ImageError(CrossKDError):
    """The images of a call are not a sequence of ``(3, H, W)`` float tensors."""


class TargetError(CrossKDError):
    """The targets of a call cannot be trained on: wrong shape, dtype, device, label or box."""


class PredictionError(CrossKDError):
    """A detector's predictions break the contract of `DensePredictions`."""

    page = "docs/how-to/your-detector.md"


class DetectorError(CrossKDError):
    """A detector cannot play the part it was given."""

    page = "docs/how-to/your-detector.md"


class UnknownDetectorError(DetectorError):
    """No built-in adapter knows this model."""


class IncompatibleDetectorsError(DetectorError):
    """A student cannot learn from this teacher."""

    page = "docs/how-it-works.md"


class MissingTeacherError(CrossKDError):
    """A copied or unpickled distiller was asked to train; the teacher never travels with it."""


class ExportError(CrossKDError):
    """No ONNX file was written: a package is missing, the detector cannot be traced, or the file disagrees with it."""

    page = "docs/how-to/export.md"
