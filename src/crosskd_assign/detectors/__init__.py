"""Adapters: how the library talks to detectors."""

from __future__ import annotations

from torch import nn

from ..errors import UnknownDetectorError, problem
from .base import DetectorAdapter, PyramidLevel

__all__ = ["DetectorAdapter", "PyramidLevel", "adapt"]


def adapt(model: nn.Module | DetectorAdapter) -> DetectorAdapter:
    """The adapter of a model: itself if it is one, the built-in one for torchvision's FCOS and RetinaNet.

    Raises:
        UnknownDetectorError: No built-in adapter fits; the message shows how to write one.
    """
    if isinstance(model, DetectorAdapter):
        return model
    # Importing torchvision's models takes a second, and detectors from elsewhere do not need them.
    from torchvision.models.detection import FCOS, RetinaNet  # noqa: PLC0415

    from .torchvision import FCOSAdapter, RetinaNetAdapter  # noqa: PLC0415

    if isinstance(model, FCOS):
        return FCOSAdapter(model)
    if isinstance(model, RetinaNet):
        return RetinaNetAdapter(model)
    fix = (
        "subclass DetectorAdapter with features(batch) -> list of maps and head(features, batch) -> DensePredictions, "
        "and pass MyAdapter(model); docs/how-to/your-detector.md shows how, check_adapter tells whether it is right; a "
        "model wrapped by DistributedDataParallel or torch.compile is wrapped after, not "
        "before"
    )
    got = f"{type(model).__module__}.{type(model).__qualname__}"
    raise UnknownDetectorError(problem("torchvision's FCOS or RetinaNet, or a DetectorAdapter", got, "adapt", fix))
