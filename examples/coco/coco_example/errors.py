"""Errors of the COCO example: each says what was expected, what came, where, and how to fix it."""

from __future__ import annotations

from crosskd_assign.errors import CrossKDError

__all__ = [
    "DataError",
    "DeadLossError",
    "MissingPackageError",
    "ModelError",
    "NonFiniteLossError",
    "RunError",
    "first_line",
]


class DataError(CrossKDError):
    """Data that cannot be used: a data set on disk, detections to score, images to draw, a log to read."""


class MissingPackageError(CrossKDError, ModuleNotFoundError):
    """A package that an option needs is not installed."""


class ModelError(CrossKDError):
    """A model that cannot be built, or weights that do not fit it."""


class RunError(CrossKDError):
    """A run that cannot start, continue, be read or be exported: its folder, teacher or options."""


class NonFiniteLossError(CrossKDError):
    """A loss or weight that is NaN or infinite; the last checkpoint is from before."""


class DeadLossError(CrossKDError):
    """A loss term that has been exactly 0 for many steps: something is not connected."""


def first_line(error: Exception) -> str:
    """Return the first line of another package's error message, which may have dozens."""
    return next(iter(str(error).splitlines()), type(error).__name__)
