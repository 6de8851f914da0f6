"""Adapters: how the library runs detectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import OptionError, UnknownDetectorError
from ..structures import DensePredictions
from .base import DetectorAdapter, PyramidLevel
from .entry import HeadEntry, PyramidEntry, measure_entry
from .functions import FunctionAdapter
from .probing import Probe, probe_detector
from .resizing import ResizingAdapter

__all__ = [
    "DetectorAdapter",
    "HeadEntry",
    "Probe",
    "PyramidEntry",
    "PyramidLevel",
    "ResizingAdapter",
    "adapt",
    "measure_entry",
    "probe_detector",
]


def adapt(
    model: nn.Module | DetectorAdapter,
    *,
    features: Callable[[Any, Tensor], Sequence[Tensor]] | None = None,
    head: Callable[[Any, list[Tensor]], DensePredictions] | None = None,
    parts: Mapping[str, nn.Module] | None = None,
    unused_parameters: Iterable[nn.Parameter] = (),
    **options: Any,
) -> DetectorAdapter:
    """Return the adapter of a model: itself if it is one, its own if it is an `EndToEndDetector`, else a built-in one.

    Built in are those of torchvision's FCOS and RetinaNet.

    With ``features`` and ``head`` two functions make an adapter of any other network.

    Args:
        model: The network; both functions get it as their first argument, so that a copy runs the copied network.
        features: ``features(model, images)`` computes the maps of normalised, padded images ``(N, 3, H, W)``.
        head: ``head(model, maps)`` predicts on such maps.
        parts: Modules of the model named "backbone", "neck" and "head"; by default its attributes of these names.
        unused_parameters: Parameters that one-to-one training leaves without a gradient.
        options: ``image_mean``, ``image_std`` and ``size_divisible`` of `DetectorAdapter`.

    Raises:
        UnknownDetectorError: No built-in adapter fits; the message shows how to write one.
        DetectorError: A function does not take two arguments, or a part is none of the model's.
        OptionError: Only one of the two functions is given, or options without them.

    Example:
        >>> import torch
        >>> from crosskd_assign import GridLevel
        >>> def features(model, images):
        ...     return [model.body(images)]
        >>> def head(model, maps):
        ...     out = model.head(maps[0]).flatten(2).transpose(1, 2)  # (N, A, C + 4)
        ...     levels = [GridLevel.of(maps[0], stride=8)]
        ...     return DensePredictions.from_sides(out[..., :-4], out[..., -4:].exp(), levels)
        >>> model = nn.Module()
        >>> model.body, model.head = nn.Conv2d(3, 16, 8, stride=8), nn.Conv2d(16, 3 + 4, 3, padding=1)
        >>> adapter = adapt(model, features=features, head=head, image_mean=(0.5, 0.5, 0.5))
        >>> sorted(adapter.parts())
        ['head']
    """
    # 1. Two functions.
    if features is not None and head is not None:
        return FunctionAdapter(model, features, head, parts=parts, unused_parameters=unused_parameters, **options)
    if features is not None or head is not None or parts is not None or unused_parameters or options:
        raise OptionError(
            expected="both features and head beside other options",
            got="one of them" if (features is None) != (head is None) else "neither",
            where="adapt",
            fix="give adapt(model, features=f, head=g, …), or the model alone",
        )

    # 2. An adapter already, or what wraps one.
    own = getattr(model, "adapter", model)
    if isinstance(own, DetectorAdapter):
        return own

    # 3. torchvision's. Importing its models takes a second, and detectors from elsewhere do not need them.
    from torchvision.models.detection import FCOS, RetinaNet  # noqa: PLC0415

    from .torchvision import FCOSAdapter, RetinaNetAdapter  # noqa: PLC0415

    if isinstance(model, FCOS):
        return FCOSAdapter(model)
    if isinstance(model, RetinaNet):
        return RetinaNetAdapter(model)
    raise UnknownDetectorError(
        expected="torchvision's FCOS or RetinaNet, or a DetectorAdapter",
        got=f"{type(model).__module__}.{type(model).__qualname__}",
        where="adapt",
        fix="subclass DetectorAdapter with features(batch) -> list of maps and head(features, image_size) -> "
        "DensePredictions, and pass MyAdapter(model); docs/how-to/your-detector.md shows how, check_adapter tells "
        "whether it is right; for SSDlite, EfficientDet, YOLO, YOLOX and NanoDet docs/how-to/third-party.md has "
        "ready-made adapters; a model wrapped by DistributedDataParallel or torch.compile is wrapped after, not before",
    )
