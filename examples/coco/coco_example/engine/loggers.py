"""Loggers of the user's choice, which get each record of a run's log and never cost the run anything."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from coco_example.commands import warn
from coco_example.engine.randomness import untouched_random_state
from coco_example.errors import MissingPackageError, RunError, first_line
from coco_example.functions import load_function

__all__ = ["PAGE", "TENSORBOARD", "Loggers"]

PAGE = "docs/troubleshooting.md#a-logger-failed"  # what explains the warning
TENSORBOARD = "tensorboard"  # the reference, and the name of its folder in the run's

Record = dict[str, Any]

_CPU = torch.device("cpu")


class Loggers:
    """The loggers of a run: what one of them raises is said once, and the run goes on.

    Args:
        references: "tensorboard" or "python:FILE:FUNCTION"; the function takes one record, a dict.

    Raises:
        MissingPackageError: TensorBoard is not installed.
        RunError: No such logger, or a function that cannot be loaded or takes something else.
    """

    def __init__(self, references: Sequence[str]) -> None:
        self._writers = {name: _load(name) for name in references}
        self._failed: set[str] = set()

    @contextmanager
    def opened(self, folder: Path, step: int) -> Iterator[Callable[[Record], None]]:
        """Open all loggers of a run, and yield what passes a record to each.

        Args:
            folder: The run's.
            step: Steps that were done before; later ones, of a part of the run that was killed, are dropped where that
                can be done.
        """
        for name, writer in self._writers.items():
            self._guarded(name, lambda writer=writer: writer.open(folder, step))  # type: ignore[misc]
        try:
            yield self._write
        finally:
            for name, writer in self._writers.items():
                self._guarded(name, writer.close)

    def _write(self, record: Record) -> None:
        for name, writer in self._writers.items():
            self._guarded(name, lambda writer=writer: writer.write(copy.deepcopy(record)))  # type: ignore[misc]

    def _guarded(self, name: str, action: Callable[[], None]) -> None:
        try:
            with untouched_random_state(_CPU):
                action()
        except (Exception, SystemExit) as error:  # noqa: BLE001, RUF100  # whatever somebody else's code raises
            if name not in self._failed:
                reason = f"{type(error).__name__}: {first_line(error)}"
                warn([f"--log-to {name} failed, and the run goes on: {reason}"], PAGE)
            self._failed.add(name)


class _Function:
    """A function of the user's own."""

    def __init__(self, reference: str) -> None:
        try:
            function = load_function(reference)
        except (Exception, SystemExit) as error:
            if isinstance(error, RunError):
                raise
            raise RunError(
                expected="a Python file that can be run",
                got=f"{type(error).__name__}: {first_line(error)}",
                where=f"--log-to {reference}",
                fix="mend it",
            ) from error
        try:
            inspect.signature(function).bind({})
        except (TypeError, ValueError) as error:
            raise RunError(
                expected="a function of one record",
                got=first_line(error),
                where=f"--log-to {reference}",
                fix="write def function(record), which gets a dict with kind, step and seconds",
            ) from error
        self._function = function

    def open(self, folder: Path, step: int) -> None:
        """Do nothing: the file was run when it was loaded."""

    def write(self, record: Record) -> None:
        """Call the function."""
        self._function(record)

    def close(self) -> None:
        """Do nothing."""


class _TensorBoard:
    """Scalars for TensorBoard, in a folder of the run's."""

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # an extra
        except ImportError as error:
            raise MissingPackageError(
                expected="the package tensorboard",
                got="none",
                where="--log-to tensorboard",
                fix="pip install tensorboard",
            ) from error
        self._kind: Any = SummaryWriter
        self._writer: Any = None

    def open(self, folder: Path, step: int) -> None:
        """Begin a file; TensorBoard drops what older files have of later steps."""
        self._writer = self._kind(str(folder / TENSORBOARD), purge_step=step + 1)

    def write(self, record: Record) -> None:
        """Write the numbers of a record; of an event there are none."""
        if self._writer is not None:
            for name, value in _scalars(record).items():
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


def _load(reference: str) -> Any:
    if reference == TENSORBOARD:
        return _TensorBoard()
    if reference.startswith("python:"):
        return _Function(reference)
    raise RunError(
        expected="tensorboard or python:FILE:FUNCTION", got=repr(reference), where="--log-to", fix="choose one of them"
    )


_FOLDERS = {"train": "loss", "validation": "validation", "eval": "score"}


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Name the numbers of a record: loss/…, validation/…, score/…, lr; a null is left out."""
    folder = _FOLDERS.get(record["kind"], "")
    terms = record.get("losses", {})
    found = {f"{folder}/{name}": value for name, value in {**terms, **record.get("scores", {})}.items()}
    if terms and None not in terms.values():
        found[f"{folder}/total"] = sum(terms.values())
    found |= {name: record[name] for name in ("lr", "images_per_second") if name in record}
    return {name: value for name, value in found.items() if value is not None}
