"""What the checks share: the adapter, what it was given, what it has said so far, and a guard around it all."""

from __future__ import annotations

import random
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from ..detectors import DetectorAdapter
from ..errors import CrossKDError, problem
from ..structures import Batch, DensePredictions, Target

T = TypeVar("T")

__all__ = [
    "Examination",
    "Finding",
    "Note",
    "Skip",
    "Wrong",
    "cut",
    "exception_sentence",
    "first_line",
    "untouched",
    "wrong",
]


class Wrong(Exception):  # noqa: N818  # it carries a finding
    """The contract is broken; the message says how and what to do."""


class Skip(Exception):  # noqa: N818  # it carries a finding
    """There is nothing to check, or what is needed is wrong already."""


class Note(str):
    """A finding that is no fault but worth knowing."""

    __slots__ = ()


Finding = str


def wrong(expected: str, got: str, where: str, fix: str) -> Wrong:
    """A finding, to be raised."""
    return Wrong(problem(expected, got, where, fix))


@dataclass
class Examination:
    """An adapter and what it has said; a part that is missing skips the checks that need it.

    Attributes:
        adapter: What is examined.
        images: Two images or more.
        targets: One an image, made up where none were given.
        given: Whether they were given.
    """

    adapter: DetectorAdapter
    images: list[Tensor]
    targets: list[Target]
    given: bool
    _batch: Batch | None = None
    _maps: list[Tensor] | None = None
    _strides: list[float] | None = None
    _predictions: DensePredictions | None = None

    @classmethod
    def of(cls, adapter: DetectorAdapter, images: list[Tensor], targets: Sequence[Target] | None) -> Self:
        """With a second image, the first one mirrored, if there is only one."""
        used = [made_up_target(image) for image in images] if targets is None else list(targets)
        if len(images) == 1:
            width = images[0].shape[-1]
            boxes = used[0]["boxes"].clone()
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
            images = [images[0], images[0].flip(-1)]
            used = [used[0], Target(boxes=boxes, labels=used[0]["labels"])]
        return cls(adapter, images, used, targets is not None)

    @property
    def name(self) -> str:
        """The adapter's class."""
        return type(self.adapter).__name__

    @property
    def batch(self) -> Batch:
        """What `preprocess` made of the images, a copy each time."""
        batch = self._needed(self._batch, "a batch")
        return replace(batch, images=batch.images.clone())  # an adapter may edit it

    @property
    def maps(self) -> list[Tensor]:
        """What `features` said of it."""
        return self._needed(self._maps, "feature maps")

    @property
    def strides(self) -> list[float]:
        """The stride of each map."""
        return self._needed(self._strides, "the strides of the maps")

    @property
    def predictions(self) -> DensePredictions:
        """What `head` said of them."""
        return self._needed(self._predictions, "predictions")

    @staticmethod
    def _needed(value: T | None, what: str) -> T:
        if value is None:
            raise Skip(f"needs {what}; see above")
        return value

    def pair(self) -> tuple[list[Tensor], Batch]:
        """Maps and batch of the first two images; a norm of a single point fails on one that is small."""
        return [x[:2] for x in self.maps], cut(self.batch, 2)

    @torch.no_grad()
    def head(self, maps: Sequence[Tensor], batch: Batch) -> DensePredictions:
        """The head on copies of the maps, which it may edit."""
        return self.adapter.head([x.clone() for x in maps], batch)


def cut(batch: Batch, n: int) -> Batch:
    """A batch of its first images, with the same padding."""
    return Batch(batch.images[:n], batch.sizes[:n], batch.original_sizes[:n])


def made_up_target(image: Tensor) -> Target:
    """One box of label 0 in the middle of an image."""
    height, width = image.shape[-2:]
    box = image.new_tensor([[0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height]], dtype=torch.float32)
    return Target(boxes=box, labels=torch.zeros(1, dtype=torch.int64, device=image.device))


HINTS = {
    "sizes": "give size_divisible the largest stride, or make the network take any size",
    "dtype": "make constants with x.new_tensor(...), or register them as buffers",
    "training mode": "return the same in training and in evaluation mode",
}


def exception_sentence(check: str, error: Exception) -> str:
    """What an adapter raised, and where in its own code."""
    if isinstance(error, CrossKDError):
        return str(error)  # such a sentence already
    package = Path(__file__).parents[1]
    frames = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    own = [i for i, path in enumerate(frames) if package not in path.parents and "site-packages" not in path.parts]
    frame = traceback.extract_tb(error.__traceback__)[own[-1]] if own else None
    where = check if frame is None else f"{Path(frame.filename).name}, line {frame.lineno}, in {frame.name}"
    return problem("no exception", first_line(error), where, HINTS.get(check, "mend what this line does"))


def first_line(error: Exception) -> str:
    """Type and message of an exception, without what torch adds below."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


@contextmanager
def untouched(adapter: DetectorAdapter) -> Iterator[None]:
    """Whatever happens inside, the adapter and the random state come out as they went in."""
    modules = list(adapter.modules())
    attributes = [(module, dict(vars(module))) for module in modules]
    buffers = [(module, dict(module._buffers)) for module in modules]
    parameters = [(p, p.requires_grad, p.grad) for p in adapter.parameters()]
    values = [(x, x.detach().clone()) for x in [*adapter.parameters(), *adapter.buffers()]]
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = list({x.device for x, _ in values if x.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
            for parameter, _, _ in parameters:
                parameter.grad = None
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
        with torch.no_grad():
            for module, before in attributes:
                _restore(vars(module), before)
            for module, before in buffers:
                _restore(module._buffers, before)
            for x, value in values:
                if not torch.equal(x, value):
                    x.copy_(value)
        for parameter, requires_grad, grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


def _restore(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Bring a dict back to what it held, if it holds anything else."""
    if now.keys() != before.keys() or any(now[key] is not value for key, value in before.items()):
        now.clear()
        now.update(before)
