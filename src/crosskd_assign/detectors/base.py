"""What the library needs to know of a detector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DetectorError, problem
from ..geometry import clip, scale
from ..structures import Batch, DensePredictions, Detection, Target

__all__ = ["DetectorAdapter", "PyramidLevel"]

PROBE_SIZE = 256  # pixels; a multiple of every usual stride, so that measured strides are exact


@dataclass(frozen=True)
class PyramidLevel:
    """Channels and stride (pixels) of one feature level."""

    channels: int
    stride: float


class DetectorAdapter(nn.Module, ABC):
    """A dense detector, seen as three steps: ``preprocess → features → head``.

    Two methods make an adapter, `features` and `head`. The rest has a default that suits detectors which take any image
    size. The wrapped network stays available, unchanged, as ``adapter.model``.

    Contract:
        - `features` normalises ``batch.images`` itself (call `normalize`), because two detectors with different
          normalisation share one batch.
        - `head` reads nothing but its arguments, so that it can be run on another detector's features, and returns
          boxes in pixels of the batch image in training and evaluation mode alike.
        - Class channel c of the logits belongs to label c of the targets.

    Args:
        model: The network.
        image_mean: Per-channel mean of its input normalisation, for pixels in 0…1.
        image_std: Per-channel standard deviation of its input normalisation.
        size_divisible: Images are padded to a multiple of this many pixels.

    Attributes:
        max_entry: How many convolutions `head_stem` can run at most; 0, the default, for a head that cannot be split.
    """

    max_entry: int = 0

    def __init__(
        self,
        model: nn.Module,
        *,
        image_mean: Sequence[float] = (0.0, 0.0, 0.0),
        image_std: Sequence[float] = (1.0, 1.0, 1.0),
        size_divisible: int = 32,
    ) -> None:
        super().__init__()
        self.model = model
        self.size_divisible = size_divisible
        self.image_mean: Tensor
        self.image_std: Tensor
        parameter = next(model.parameters(), None)
        device = None if parameter is None else parameter.device  # the model may have been moved already
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            self.register_buffer(name, torch.tensor(values, device=device).view(3, 1, 1), persistent=False)

    @staticmethod
    def from_functions(
        model: nn.Module,
        *,
        features: Callable[[Any, Tensor], Sequence[Tensor]],
        head: Callable[[Any, list[Tensor]], DensePredictions],
        image_mean: Sequence[float] = (0.0, 0.0, 0.0),
        image_std: Sequence[float] = (1.0, 1.0, 1.0),
        size_divisible: int = 32,
        trunk: nn.Module | None = None,
        unused_parameters: Iterable[nn.Parameter] = (),
    ) -> DetectorAdapter:
        """An adapter of two functions instead of a subclass.

        Args:
            model: The network; both functions get it as their first argument, so that a copy runs the copied network.
            features: ``features(model, images)`` gives the maps of normalised, padded images ``(N, 3, H, W)``.
            head: ``head(model, maps)`` gives the predictions on such maps.
            image_mean: See `DetectorAdapter`; likewise the next two.
            image_std: As above.
            size_divisible: As above.
            trunk: Backbone and neck, a part of ``model``; by default all of it.
            unused_parameters: Parameters that one-to-one training leaves without a gradient.

        Raises:
            DetectorError: A function does not take two arguments, or a part is none of the model's.
        """
        from .functions import FunctionAdapter  # noqa: PLC0415  # it is a subclass of this class

        return FunctionAdapter(
            model,
            features,
            head,
            image_mean=image_mean,
            image_std=image_std,
            size_divisible=size_divisible,
            trunk=trunk,
            unused_parameters=unused_parameters,
        )

    @abstractmethod
    def features(self, batch: Batch) -> list[Tensor]:
        """Feature pyramid of a batch: L maps ``(N, *, H, W)``, the ones `head` starts from."""

    @abstractmethod
    def head(self, features: list[Tensor], batch: Batch) -> DensePredictions:
        """Predictions on a feature pyramid, this detector's own or another's of the same shape."""

    def preprocess(
        self, images: Sequence[Tensor] | Tensor, targets: Sequence[Target] | None = None
    ) -> tuple[Batch, list[Target] | None]:
        """Bring images to one shape, and targets along with them.

        The default does not resize: it pads to the largest height and width, rounded up to ``size_divisible``.

        Args:
            images: N tensors ``(3, H, W)`` in 0…1.
            targets: N targets in pixels of these images.

        Returns:
            The batch, and targets in pixels of the batch image.
        """
        sizes = tuple((image.shape[-2], image.shape[-1]) for image in images)
        return (
            Batch(self.pad(images), sizes, sizes),
            None if targets is None else list(targets),
        )

    def pad(self, images: Sequence[Tensor] | Tensor) -> Tensor:
        """Stack images to ``(N, 3, H, W)``, padded with zeros at the right and the bottom."""
        if isinstance(images, Tensor) and not any(s % self.size_divisible for s in images.shape[-2:]):
            return images
        d = self.size_divisible
        height = (max(image.shape[-2] for image in images) + d - 1) // d * d
        width = (max(image.shape[-1] for image in images) + d - 1) // d * d
        return torch.stack(
            [F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in images]
        )

    def normalize(self, batch: Batch) -> Tensor:
        """``(images − mean) / std`` with the padding at zero, as networks that normalise before padding see it."""
        images = batch.images
        x = (images - self.image_mean.to(images)) / self.image_std.to(images)
        height, width = x.shape[-2:]
        shared = len(batch.sizes) == 1
        if shared and torch.compiler.is_compiling():  # compared in the graph, because sizes may be open here
            ((h, w),) = batch.sizes
            rows, columns = (torch.arange(n, device=x.device) < m for n, m in ((height, h), (width, w)))
            return x * rows[:, None] * columns
        for i, (h, w) in enumerate(batch.sizes):
            image = x if shared else x[i]
            if h < height:
                image[..., h:, :] = 0
            if w < width:
                image[..., w:] = 0
        return x

    def restore(self, detections: list[Detection], batch: Batch) -> list[Detection]:
        """Clip detections to their images and carry them to the coordinates of the images that came in."""
        restored: list[Detection] = []
        for detection, size, original in zip(detections, batch.sizes, batch.original_sizes, strict=True):
            boxes = clip(detection["boxes"], size)
            same = size is original or (not torch.compiler.is_compiling() and size == original)
            restored.append({**detection, "boxes": boxes if same else scale(boxes, size, original)})
        return restored

    def trunk(self) -> nn.Module:
        """Backbone and neck: what `inherit` copies. Override it when the model keeps them in a module of their own."""
        return self.model

    def unused_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters that one-to-one training leaves without a gradient, such as a centerness branch."""
        return ()

    # --- heads that can be entered further in, for ``CrossHeadDistiller(entry=k)`` -----------------------------------

    def head_stem(self, features: list[Tensor], k: int) -> dict[str, list[Tensor]]:
        """The first part of the head: ``k`` convolutions of every branch, with what follows each of them.

        Args:
            features: L maps, as `head` takes them.
            k: 1 to ``max_entry``.

        Returns:
            For every branch, by name, L maps of the sizes of ``features``. Two heads can be crossed at ``k`` if their
            branches have the same names.
        """
        raise self._unsplit()

    def head_rest(self, maps: dict[str, list[Tensor]], k: int, batch: Batch) -> DensePredictions:
        """What is left of the head: ``head_rest(head_stem(features, k), k, batch)`` equals ``head(features, batch)``.

        Like `head` it reads nothing but its arguments: ``maps`` may be another detector's.
        """
        raise self._unsplit()

    def _unsplit(self) -> DetectorError:
        fix = "override max_entry, head_stem() and head_rest(), or leave entry at 0"
        return DetectorError(problem("a head that can be split", "one that cannot", f"{type(self).__name__}", fix))

    # --- measured ----------------------------------------------------------------------------------------------------

    def pyramid(self) -> list[PyramidLevel]:
        """Channels and strides of the feature levels, measured on one blank image without touching any state.

        Raises:
            DetectorError: `features` does not return a list of 4-dimensional maps.
        """
        features, _ = self._probe(with_head=False)
        return [PyramidLevel(x.shape[1], PROBE_SIZE / x.shape[-1]) for x in features]

    def edits_features(self) -> bool:
        """Whether `head` begins with an in-place operation, which would edit maps that others still need."""
        _, edited = self._probe(with_head=True)
        return edited

    def _probe(self, *, with_head: bool) -> tuple[list[Tensor], bool]:
        """The features of one blank image, and whether the head edits them."""
        with self._probing() as batch:
            features = self.features(batch)
            self._check_features(features)
            versions = [x._version for x in features]
            if with_head:
                self.head(list(features), batch)
        return features, any(x._version != version for x, version in zip(features, versions, strict=True))

    @contextmanager
    def _probing(self) -> Iterator[Batch]:
        """A blank image to measure something with, in evaluation mode and without a graph; no state is touched."""
        parameter = next(self.model.parameters(), None)
        device, dtype = (None, None) if parameter is None else (parameter.device, parameter.dtype)
        image = torch.zeros(1, 3, PROBE_SIZE, PROBE_SIZE, device=device, dtype=dtype)
        size = ((PROBE_SIZE, PROBE_SIZE),)
        modes = {module: module.training for module in self.modules()}
        self.eval()  # batch-norm statistics must not see the blank image
        try:
            with torch.no_grad():
                yield Batch(image, size, size)
        finally:
            for module, mode in modes.items():
                module.training = mode

    def _check_features(self, features: list[Tensor]) -> None:
        fix = "return the pyramid as a list of maps"
        where = f"{type(self).__name__}.features()"
        if not isinstance(features, (list, tuple)) or not features:
            raise DetectorError(problem("a list of maps", type(features).__name__, where, fix))
        for i, x in enumerate(features):
            if not isinstance(x, Tensor) or x.dim() != 4:
                got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise DetectorError(problem("a map of shape (N, *, H, W)", got, f"{where}[{i}]", fix))
