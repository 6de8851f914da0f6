"""Checkpoints of a run: everything needed to go on, in files that are whole, known and checked before they are used."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from coco_example.errors import RunError, first_line
from coco_example.files import digest, write_with

__all__ = ["CHECKPOINTS", "load_checkpoint", "misfit", "read_checkpoint", "save_checkpoint"]

CHECKPOINTS = ("last.pt", "previous.pt")  # newest first

State = dict[str, Any]

_NEEDED = {"state", "param_groups", "params", "lr", "last_epoch", "lr_lambdas", "scale", "cpu"}  # of all versions


def save_checkpoint(folder: Path, state: State) -> None:
    """Write ``last.pt``, keeping the one before as ``previous.pt``; at every moment one of them is whole.

    A digest of the content is part of it: nothing else would tell of a flipped bit in a weight.
    """
    whole = {**state, "digest": digest(state)}
    last, previous = (folder / name for name in CHECKPOINTS)
    write_with(last, lambda file: _save(whole, file), keep=previous)


def _save(state: State, file: BinaryIO) -> None:
    sink = _Sink(file)
    torch.save(state, sink)  # type: ignore[arg-type]  # it needs only what a sink has
    if sink.error is not None:
        raise sink.error


class _Sink:
    """Passes writes on and keeps the first error: torch.save would raise one of its own, which tells nothing."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write, unless it failed before."""
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Leave flushing to the end."""


def load_checkpoint(folder: Path, check: Callable[[State], str | None] = lambda _: None) -> State:
    """Read the newest checkpoint of a run that is readable, unchanged since it was written, and fits.

    A ``last.pt`` that is not becomes ``damaged.pt``, or the next one saved would make it replace the good one.

    Args:
        folder: The run's folder.
        check: Describes what is wrong with a state; None if nothing is.

    Returns:
        The state.

    Raises:
        RunError: There is none.
    """
    reasons = []
    for name in CHECKPOINTS:
        try:
            state = read_checkpoint(folder / name)
        except Exception as error:  # noqa: BLE001, PERF203, RUF100  # torch.load raises a dozen types for a damaged file
            reasons.append(f"{name}: {first_line(error)}")
            continue
        wrong = check(state)
        if wrong is None:
            if reasons:
                with suppress(FileNotFoundError):  # never written
                    (folder / CHECKPOINTS[0]).replace(folder / "damaged.pt")
            return state
        reasons.append(f"{name}: {wrong}")
    raise RunError(
        expected="a readable checkpoint of this run",
        got=f"none: {'; '.join(reasons)}",
        where=f"{folder}",
        fix="resume with what the run was started with, or start a new run",
    )


def read_checkpoint(path: Path) -> State:
    """Read a checkpoint; only tensors and plain types are accepted, and only as they were written.

    Raises:
        RunError: It is no checkpoint, or has changed. ``torch.load`` raises other types for a damaged file.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise RunError(f"{type(state).__name__} instead of a checkpoint")
    written = state.pop("digest", None)
    whole = written == digest(state)
    if written is None:  # as earlier versions wrote it; their archives have checksums, which torch does not look at
        with zipfile.ZipFile(path) as archive:
            whole = archive.testzip() is None
    if not whole:
        raise RunError("it has changed since it was written")
    return state


def misfit(own: State, state: State, *, total_steps: int, random: dict[str, Tensor]) -> str | None:
    """Describe why a state is no checkpoint of a run; None if it is one.

    Args:
        own: The states of the run's parts now.
        state: The checkpoint.
        total_steps: Steps of the run.
        random: The random states of this process now.
    """
    # 1. Everything is there.
    odd = {*own, "step", "seconds", "random"} ^ (state.keys() - {"run"})
    if odd:
        return f"it lacks or adds {', '.join(sorted(map(str, odd)))}"

    # 2. The numbers can be.
    step, states = state["step"], state["random"]
    if type(step) is not int or not 0 < step <= total_steps:
        return f"step: expected 1 to {total_steps}, but got {step!r:.40}"
    if not (isinstance(states, list) and states):
        return "random: expected the states of one process or more"

    # 3. The parts fit, and a scheduler is at the step.
    pairs = [(0.0, state["seconds"], "seconds"), *((random, entry, f"random.{n}") for n, entry in enumerate(states))]
    pairs += [(own[name], state[name], name) for name in own]
    wrong = next(filter(None, (_difference(*pair) for pair in pairs)), None)
    for name in ("method", "average"):
        if wrong is None and name in own and own[name].keys() != state[name].keys():
            wrong = f"{name}: other tensors"
    if wrong is None and state["scheduler"]["last_epoch"] != step:
        wrong = "scheduler: at another step"
    return wrong or _odd_moments(state["optimizer"], own["method"])


def _difference(own: Any, other: Any, name: str) -> str | None:
    """Describe the first place where a state does not fit another of the same thing; None if it fits.

    Tensors need equal shapes and types, lists equal lengths. Most entries that only one mapping has are left to
    ``load_state_dict``, for versions of torch add some.
    """
    parts: list[tuple[Any, Any, str]] = []
    if isinstance(own, Tensor):
        fits = isinstance(other, Tensor) and (own.shape, own.dtype) == (other.shape, other.dtype)
        fits = fits and bool(other.isfinite().all())
    elif isinstance(own, Mapping):
        if fits := isinstance(other, Mapping) and not (own.keys() - other.keys()) & _NEEDED:
            parts = [(own[key], other[key], f"{name}.{key}") for key in own if key in other]
    elif isinstance(own, (list, tuple)):
        if fits := isinstance(other, (list, tuple)) and len(own) == len(other):
            parts = [(*pair, f"{name}.{n}") for n, pair in enumerate(zip(own, other, strict=True))]
    else:
        fits = type(own) is type(other) and (not isinstance(other, float) or math.isfinite(other))
    if not fits:
        return f"{name}: expected {_kind(own)}, but got {_kind(other)}"
    return next(filter(None, (_difference(*part) for part in parts)), None)


def _odd_moments(optimizer: State, method: State) -> str | None:
    """Describe what an optimizer's state holds that can be no parameter's moments; a new optimizer has none to fit."""
    moments = optimizer["state"]
    count = sum(len(group["params"]) for group in optimizer["param_groups"])
    if not isinstance(moments, dict) or not all(type(n) is int and 0 <= n < count for n in moments):
        return "optimizer: moments of other parameters"
    known = {tuple(value.shape) for value in method.values()} | {()}
    for n, entry in moments.items():
        values = list(entry.values()) if isinstance(entry, dict) else [None]
        fit = all(
            isinstance(v, Tensor) and tuple(v.shape) in known and v.isfinite().all() for v in values if v is not None
        )
        if not fit or not isinstance(entry, dict):
            return f"optimizer: no moments at {n}"
    return None


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"finite {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return f"{value!r:.40}" if isinstance(value, (int, float, str)) else type(value).__name__
