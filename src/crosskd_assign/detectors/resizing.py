"""A base class for detectors whose images are resized first, as most detectors' own loaders do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry import scale
from ..structures import Batch, Target
from ..validation import validate_choice, validate_option
from .base import DetectorAdapter

__all__ = ["ResizingAdapter"]

Fit = Literal["longer", "letterbox", "stretch"]


class ResizingAdapter(DetectorAdapter):
    """A `DetectorAdapter` that resizes images, boxes along with them, and carries detections back.

    Args:
        model: The network; ``self.model``, untyped, because what a foreign network holds is known at run time alone.
        size: Pixels: the longer side, or ``(height, width)``. 0 takes images as they come.
        fit: How an image is brought to ``size``. "longer": the sides keep their ratio, the longer one becomes ``size``
            (or the image fits into ``(height, width)``), then padded to a multiple of ``size_divisible``. "letterbox":
            likewise, then padded to exactly ``size``. "stretch": exactly ``size``, whatever the ratio.
        options: `DetectorAdapter`'s normalisation and padding.

    Raises:
        OptionError: ``size`` is negative, or ``fit`` is unknown or needs a size.

    Example:
        >>> import torch
        >>> class Letterboxed(ResizingAdapter):
        ...     def features(self, batch):
        ...         return [self.model(self.normalize(batch))]
        ...     def head(self, features, image_size):
        ...         raise NotImplementedError
        >>> batch, _ = Letterboxed(nn.Identity(), size=64, fit="letterbox").preprocess([torch.rand(3, 30, 120)])
        >>> batch.image_size, batch.sizes
        ((64, 64), ((16, 64),))
    """

    model: Any

    def __init__(
        self, model: nn.Module, *, size: int | tuple[int, int] = 0, fit: Fit = "longer", **options: Any
    ) -> None:
        super().__init__(model, **options)
        validate_choice("fit", fit, ("longer", "letterbox", "stretch"))
        height, width = (size, size) if isinstance(size, int) else size
        # 0 alone stands for images as they come; a frame of no height or width is none.
        validate_option("size", min(height, width), low=0 if fit == "longer" and size == 0 else 1)
        self.size = size
        self.fit = fit
        self._frame = (height, width)

    def preprocess(
        self, images: Sequence[Tensor] | Tensor, targets: Sequence[Target | None] = ()
    ) -> tuple[Batch, list[Target | None]]:
        """Resize images and boxes, then pad."""
        # 1. The size of every image inside its padding.
        originals = tuple((image.shape[-2], image.shape[-1]) for image in images)
        sizes = tuple(self._resized_size(height, width) for height, width in originals)

        # 2. Images and boxes at that size.
        resized = [_resize(image, size) for image, size in zip(images, sizes, strict=True)]
        moved: list[Target | None] = [
            None if target is None else {**target, "boxes": scale(target["boxes"], original, size)}
            for target, original, size in zip(targets, originals, sizes, strict=False)
        ]

        # 3. One shape for all.
        if self.fit == "longer":
            return Batch(self.pad(resized), sizes, originals), moved
        height, width = self._frame
        framed = [F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2])) for x in resized]
        return Batch(torch.stack(framed), sizes, originals), moved

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        if self.fit == "stretch":
            return self._frame
        if not self.size:
            return height, width
        # The ratio is min(H / height, W / width). In whole numbers, so that an exported graph has it for any size.
        high, wide = self._frame
        longest = torch.sym_max(height * wide, width * high)
        return _rounded(height * high * wide, longest), _rounded(width * high * wide, longest)


def _rounded(x: int, divisor: Any) -> Any:
    """Divide, rounded as `round` does, halves to the even number; at least 1."""
    doubled = 2 * x + divisor
    whole, rest = doubled // (2 * divisor), doubled % (2 * divisor)
    half = 1 - torch.sym_min(1, rest)
    return torch.sym_max(1, whole - half * (whole % 2))


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    # A graph for any size cannot ask; there, an image of that size is resized to itself.
    if not torch.compiler.is_compiling() and (image.shape[-2], image.shape[-1]) == size:
        return image
    return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]
