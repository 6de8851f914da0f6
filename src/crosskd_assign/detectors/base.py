"""The interface between the library and a detector: three steps, ``preprocess → features → head``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DetectorError
from ..geometry import clip, scale
from ..structures import Batch, DensePredictions, Detection, Target

__all__ = ["PARTS", "DetectorAdapter", "PyramidLevel"]

PARTS = ("backbone", "neck", "head")


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
        strides: Stride of each level in pixels, for networks in which a blank image cannot measure them;
            None, the default, to measure them.

    Example:
        >>> class TinyAdapter(DetectorAdapter):
        ...     def features(self, batch):
        ...         return [self.model.body(self.normalize(batch))]
        ...     def head(self, features, image_size):
        ...         out = self.model.head(features[0]).flatten(2).transpose(1, 2)  # (N, A, C + 4)
        ...         levels = [GridLevel.of(features[0], stride=8)]
        ...         return DensePredictions.from_sides(out[..., :-4], out[..., -4:].exp(), levels)
        >>> from crosskd_assign import GridLevel
        >>> parts = {"body": nn.Conv2d(3, 16, 8, stride=8), "head": nn.Conv2d(16, 3 + 4, 3, padding=1)}
        >>> adapter = TinyAdapter(nn.ModuleDict(parts))
        >>> batch, _ = adapter.preprocess([torch.rand(3, 60, 64)])
        >>> tuple(adapter.head(adapter.features(batch), batch.image_size).logits.shape)
        (1, 64, 3)
    """

    max_entry: int = 0
    strides: Sequence[float] | None = None

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
            numbers = [float(value) for value in values]  # a mean of (0, 0, 0) would make a buffer of integers
            self.register_buffer(name, torch.tensor(numbers, device=device).view(3, 1, 1), persistent=False)

    @abstractmethod
    def features(self, batch: Batch) -> list[Tensor]:
        """Compute the feature pyramid of a batch: L maps ``(N, *, H, W)``, the ones `head` starts from."""

    @abstractmethod
    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        """Predict on a feature pyramid, this detector's own or another's of the same shape.

        Args:
            features: L maps ``(N, *, H, W)``.
            image_size: ``(height, width)`` in pixels of the padded images that the maps were made from.
        """

    def preprocess(
        self, images: Sequence[Tensor] | Tensor, targets: Sequence[Target | None] = ()
    ) -> tuple[Batch, list[Target | None]]:
        """Bring images to one shape, and targets along with them.

        The default does not resize: it pads to the largest height and width, rounded up to ``size_divisible``.

        Args:
            images: N tensors ``(3, H, W)`` in 0…1.
            targets: N targets in pixels of these images; none while detecting.

        Returns:
            The batch, and as many targets, in pixels of the batch image.
        """
        sizes = tuple((image.shape[-2], image.shape[-1]) for image in images)
        return Batch(self.pad(images), sizes, sizes), list(targets)

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
        """Compute ``(images − mean) / std`` with the padding at 0, as networks that normalise before padding see it."""
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

    def parts(self) -> dict[str, nn.Module]:
        """Name the modules of the network: "backbone", "neck" and "head".

        `inherit`, `AuxiliaryHead` and freezing read them. The default takes the attributes of these names that the
        model has; override it for a model that calls them otherwise. A part of several modules is an ``nn.ModuleList``
        of them.
        """
        found = {name: getattr(self.model, name, None) for name in PARTS}
        return {name: module for name, module in found.items() if isinstance(module, nn.Module)}

    def part(self, name: str) -> nn.Module:
        """Return one of `parts`.

        Raises:
            DetectorError: There is none of this name.
        """
        parts = self.parts()
        if name not in parts:
            raise DetectorError(
                expected=f'a module named "{name}" in parts()',
                got=", ".join(parts) or "none",
                where=type(self).__name__,
                fix=f"return the detector's {name} in {type(self).__name__}.parts()",
            )
        return parts[name]

    def unused_parameters(self) -> Iterable[nn.Parameter]:
        """List parameters that one-to-one training leaves without a gradient, such as a centerness branch."""
        return ()

    # --- heads that can be entered further in, for ``CrossHeadDistiller(entry=k)`` -----------------------------------

    def head_stem(self, features: list[Tensor], k: int) -> dict[str, list[Tensor]]:
        """Run the first part of the head: ``k`` convolutions of every branch, with what follows each of them.

        Args:
            features: L maps, as `head` takes them.
            k: 1 to ``max_entry``.

        Returns:
            For every branch, by name, L maps of the sizes of ``features``. Two heads can be crossed at ``k`` if their
            branches have the same names.
        """
        self._raise_unsplit()

    def head_rest(self, maps: dict[str, list[Tensor]], k: int, image_size: tuple[int, int]) -> DensePredictions:
        """Run the rest of the head: ``head_rest(head_stem(features, k), k, size)`` equals ``head(features, size)``.

        Like `head` it reads nothing but its arguments: ``maps`` may be another detector's.
        """
        self._raise_unsplit()

    def _raise_unsplit(self) -> NoReturn:
        raise DetectorError(
            expected="a head that can be split",
            got="one that cannot",
            where=type(self).__name__,
            fix="override max_entry, head_stem() and head_rest(), or leave entry at 0",
        )
