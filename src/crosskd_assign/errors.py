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
        page: Section of the documentation that explains errors of this kind. Tracebacks show it from Python 3.11 on.

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
        self.__notes__ = [f"See {self.page}."]  # what add_note does, which Python 3.10 lacks


class OptionError(CrossKDError):
    """A constructor argument lies outside its range."""

    page = "docs/troubleshooting.md#optionerror"


class ImageError(CrossKDError):
    """The images of a call are not a sequence of ``(3, H, W)`` float tensors."""

    page = "docs/troubleshooting.md#imageerror"


class TargetError(CrossKDError):
    """The targets of a call cannot be trained on: wrong shape, dtype, device, label or box."""

    page = "docs/troubleshooting.md#targeterror"


class PredictionError(CrossKDError):
    """A detector's predictions break the contract of `DensePredictions`."""

    page = "docs/troubleshooting.md#predictionerror"


class DetectorError(CrossKDError):
    """A detector cannot play the part it was given."""

    page = "docs/troubleshooting.md#detectorerror"


class UnknownDetectorError(DetectorError):
    """No built-in adapter knows this model."""

    page = "docs/troubleshooting.md#unknowndetectorerror"


class IncompatibleDetectorsError(DetectorError):
    """A student cannot learn from this teacher."""

    page = "docs/troubleshooting.md#incompatibledetectorserror"


class MissingTeacherError(CrossKDError):
    """A copied or unpickled distiller was asked to train; the teacher never travels with it."""

    page = "docs/troubleshooting.md#missingteachererror"


class ExportError(CrossKDError):
    """No ONNX file was written: a package is missing, the detector cannot be traced, or the file disagrees with it."""

    page = "docs/troubleshooting.md#exporterror"
