"""Errors of the COCO example: each says what was expected, what came, where, and how to fix it."""

from __future__ import annotations

import errno
import os
import re
import unicodedata
from collections.abc import Mapping

from crosskd_assign.errors import CrossKDError

__all__ = [
    "DataError",
    "DeadLossError",
    "FileError",
    "MissingPackageError",
    "ModelError",
    "NonFiniteLossError",
    "RunError",
    "first_line",
    "of_options",
    "printable",
]


class DataError(CrossKDError):
    """Data that cannot be used: a data set on disk, detections to score, images to draw, a log to read."""

    page = "docs/troubleshooting.md#dataerror"


class FileError(CrossKDError):
    """The operating system refused to read or write a file."""

    page = "docs/troubleshooting.md#fileerror"

    @classmethod
    def of(cls, error: OSError) -> FileError:
        """Describe an error of the operating system, and what can be done about it."""
        reason = error.strerror or first_line(error)
        where = " and ".join(os.fsdecode(n) for n in (error.filename, error.filename2) if isinstance(n, (str, bytes)))
        fix = _FIXES.get(error.errno or 0, "check the path, and the disk it is on")
        return cls(expected="files that can be read and written", got=reason, where=where or "a file or pipe", fix=fix)


_FULL = "free some space, and go on"
_FILE = "remove or rename the file that is where a folder should be"
_CLOSED = "choose a place that you may read and write"
_FIXES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "raise the limit of a file's size, and go on",
    errno.EACCES: _CLOSED,
    errno.EPERM: _CLOSED,
    errno.EROFS: _CLOSED,
    errno.ENOENT: "check the path, and that nobody removed it meanwhile",
    errno.ENOTDIR: _FILE,
    errno.EEXIST: _FILE,
    errno.EISDIR: "remove or rename the folder that is where a file should be",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EPIPE: "keep reading what is printed",
}


class MissingPackageError(CrossKDError, ModuleNotFoundError):
    """A package that an option needs is not installed."""

    page = "docs/troubleshooting.md#missingpackageerror"


class ModelError(CrossKDError):
    """A model that cannot be built, or weights that do not fit it."""

    page = "docs/troubleshooting.md#modelerror"


class RunError(CrossKDError):
    """A run that cannot start, continue, be read or be exported: its folder, teacher or options.

    Args:
        message: As of `CrossKDError`, which has the parts, too.
        page: Section that explains this one better than the one of all.
    """

    page = "docs/troubleshooting.md#runerror"

    def __init__(self, message: str = "", *, page: str = "", **parts: str) -> None:
        self.page = page or type(self).page
        super().__init__(message, **parts)


class NonFiniteLossError(CrossKDError):
    """A loss or weight that is NaN or infinite; the last checkpoint is from before."""

    page = "docs/troubleshooting.md#nonfinitelosserror"


class DeadLossError(CrossKDError):
    """A loss term that has been exactly 0 for many steps: something is not connected."""

    page = "docs/troubleshooting.md#deadlosserror"


def first_line(error: BaseException) -> str:
    """Return the first line of another package's error message, which may have dozens; of an error of ours, what came.

    A whole sentence of ours would be nested in another.
    """
    if isinstance(error, CrossKDError) and error.got:
        return f"{error.got} instead of {error.expected}"
    return next(iter(str(error).splitlines()), type(error).__name__)


def of_options(error: CrossKDError, options: Mapping[str, str]) -> CrossKDError:
    """Write an error of the library for somebody who has options in the place of these arguments."""
    fix = re.sub(r"\w+", lambda word: options.get(word[0], word[0]), error.fix)
    return type(error)(expected=error.expected, got=error.got, where=error.where, fix=fix)


def printable(text: str) -> str:
    r"""Escape what a terminal would obey instead of show: control characters, and those that turn text around.

    Names of files and classes come from anywhere. Lines stay lines.

    Example:
        >>> printable("red \x1b[31m name")
        'red \\x1b[31m name'
    """
    return "".join(c if c == "\n" or not _obeyed(c) else c.encode("unicode_escape").decode() for c in text)


def _obeyed(character: str) -> bool:
    kind = unicodedata.category(character)
    return kind[0] == "C" or kind in ("Zl", "Zp")
