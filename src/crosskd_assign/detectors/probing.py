"""A probe: what blank images show of a detector, as a rule in one features pass and one head pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CrossKDError, DetectorError
from ..structures import Batch, DensePredictions
from .base import DetectorAdapter, PyramidLevel

__all__ = ["PROBE_SIZE", "Probe", "edited", "evaluation_mode", "first_line", "probe_detector"]

PROBE_SIZE = 256  # pixels; a multiple of every usual stride, so that measured strides are exact
BRANCHES = ("quality", "distribution")


@dataclass(frozen=True)
class Probe:
    """What two blank images show of a detector.

    Attributes:
        levels: Channels and stride of each feature level.
        features: The feature maps of the blank images, ``(2, *, H, W)`` each.
        predictions: What the head predicts on them.
        image_size: Height and width of the blank images in pixels.
        edits_features: Whether the head begins with an in-place operation, which edits the maps it is given.
    """

    levels: tuple[PyramidLevel, ...]
    features: list[Tensor]
    predictions: DensePredictions
    image_size: tuple[int, int]
    edits_features: bool

    @property
    def branches(self) -> frozenset[str]:
        """The optional branches that the head has: "quality", "distribution"."""
        return frozenset(name for name in BRANCHES if getattr(self.predictions, name) is not None)

    @property
    def strides(self) -> list[float]:
        """The stride of each level in pixels."""
        return [level.stride for level in self.levels]


def probe_detector(adapter: DetectorAdapter) -> Probe:
    """Probe a detector with blank images; its modes, weights and buffers stay as they are.

    The images have 256 pixels on a side. A network that does not take these, or whose levels cannot be told apart on
    them, gets what its own `preprocess` makes of blank images, of this size or larger.

    Raises:
        DetectorError: `features` does not return a list of 4-dimensional maps, ``strides`` are not as many, or the
            network takes no blank image.
    """
    # 1. Blank images of 256 pixels, as they are.
    found: list[Probe] = []
    failures: list[Exception] = []
    for batch in _blank_batches(adapter):
        try:
            probe = _probe(adapter, batch)
        except (CrossKDError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:  # whatever a stranger's network raises where it is given another size than its own
            failures.append(error)
            continue
        found.append(probe)
        if len(set(probe.strides)) == len(probe.strides):
            return probe

    # 2. None that tells all levels apart: the first that ran is what there is.
    if found:
        return found[0]
    raise DetectorError(
        expected="a network that runs on blank images",
        got=first_line(failures[0]),
        where=f"{type(adapter).__name__}, on a blank image of {PROBE_SIZE} pixels",
        fix="let preprocess() bring every image to a size that the network takes, e.g. with ResizingAdapter",
    ) from failures[0]


def _probe(adapter: DetectorAdapter, batch: Batch) -> Probe:
    """Run both steps on blank images once, the head on copies: does it edit them?"""
    # 1. The maps and the predictions.
    with evaluation_mode(adapter):
        features = adapter.features(batch)
        _validate_features(features, adapter)
        given = [x.clone() for x in features]
        versions = [x._version for x in given]
        predictions = adapter.head(given, batch.image_size)

    # 2. The levels: strides are declared, or measured.
    strides = adapter.strides or [batch.image_size[1] / x.shape[-1] for x in features]
    if len(strides) != len(features):
        raise DetectorError(
            expected=f"{len(features)} strides, one a map",
            got=f"{len(strides)}",
            where=f"{type(adapter).__name__}.strides",
            fix="name the stride of every map that features() returns, or leave strides at None",
        )
    levels = (PyramidLevel(x.shape[1], stride) for x, stride in zip(features, strides, strict=True))
    return Probe(tuple(levels), list(features), predictions, batch.image_size, edited(given, versions))


def _blank_batches(adapter: DetectorAdapter) -> Iterator[Batch]:
    """Make batches of two blank images, on the device and in the dtype of a detector's parameters, one after another.

    Two, because norms refuse the only point of the coarsest map of a single image.
    """
    # 1. As they are.
    parameter = next(adapter.model.parameters(), None)
    device, dtype = (None, None) if parameter is None else (parameter.device, parameter.dtype)
    size = ((PROBE_SIZE, PROBE_SIZE),) * 2
    seen = [size[0]]
    yield Batch(torch.zeros(2, 3, *size[0], device=device, dtype=dtype), size, size)

    # 2. As the adapter prepares them.
    for side in (PROBE_SIZE, 2 * PROBE_SIZE, 4 * PROBE_SIZE):
        with evaluation_mode(adapter):
            batch, _ = adapter.preprocess([torch.zeros(3, side, side, device=device, dtype=dtype)] * 2)
        if batch.image_size not in seen:
            seen.append(batch.image_size)
            yield batch


@contextmanager
def evaluation_mode(adapter: DetectorAdapter) -> Iterator[None]:
    """Evaluation mode without a graph; every module's own mode is restored afterwards."""
    modes = {module: module.training for module in adapter.modules()}
    adapter.eval()  # batch-norm statistics must not see the blank image
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def first_line(error: Exception) -> str:
    """Return type and message of an exception, without what torch adds below."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


def edited(maps: Sequence[Tensor], versions: Sequence[int]) -> bool:
    """Whether maps were edited in place since their ``_version`` was noted."""
    return any(x._version != version for x, version in zip(maps, versions, strict=True))


def _validate_features(features: list[Tensor], adapter: DetectorAdapter) -> None:
    where, fix = f"{type(adapter).__name__}.features()", "return the pyramid as a list of maps"
    if not isinstance(features, (list, tuple)) or not features:
        raise DetectorError(expected="a list of maps", got=type(features).__name__, where=where, fix=fix)
    for i, x in enumerate(features):
        if not isinstance(x, Tensor) or x.dim() != 4:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise DetectorError(expected="a map of shape (N, *, H, W)", got=got, where=f"{where}[{i}]", fix=fix)
