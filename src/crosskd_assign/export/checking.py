"""Make the images that an exported file is checked with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from ..detectors import Probe
from ..errors import CrossKDError, ImageError, OptionError
from ..validation import validate_images
from .tensor_detector import TensorDetector

__all__ = ["check_batches", "roomy_size"]

_SMALL = ((64, 64), (96, 64))  # (height, width) in pixels


def check_batches(
    view: TensorDetector,
    probe: Probe,
    size: tuple[int, int] | None,
    batch_size: int | None,
    images: Sequence[Tensor] | Tensor | None,
) -> list[Tensor]:
    """Make batches of one and of more images, of one size or, where that is open, of several.

    Small ones are among these: heads with an ``if`` on a size mostly tell those apart.
    """
    # 1. Given images, each beside its mirror image.
    counts = (1, 2) if batch_size is None else (batch_size,)
    if images is not None:
        validate_images(images)
        for i, image in enumerate(images):
            _validate_image_size(view, (image.shape[1], image.shape[2]), size, f"images[{i}]", ImageError)
        pairs = [torch.stack([image, image.flip(2)]).detach().cpu().float() for image in images]
        return [pair.repeat(n, 1, 1, 1)[:n] for pair in pairs for n in counts]

    # 2. Made-up ones otherwise.
    if size is not None:
        _validate_image_size(view, size, None, "image_size", OptionError)
        sizes = [size, size]
    elif view.preprocessing == "inside":
        usual = _shorter_side(view, (240, 320))
        small = [size for size in _SMALL if _shorter_side(view, size) < usual]  # not where the network enlarges them
        sizes = [(240, 320), (333, 250), (480, 640), *small]
    else:
        d, (height, width) = view.adapter.size_divisible, roomy_size(view, probe)
        small = [(ceil(height / d) * d, ceil(width / d) * d) for height, width in _SMALL]
        sizes = [(height, width), (height + d, width - d), (width, height), *small]
    generator = torch.Generator().manual_seed(0)
    batches = [_made_up(n, *size, generator) for size, n in zip(sizes, cycle(counts), strict=False)]

    # 3. Not the small ones that the detector itself refuses.
    return batches[:3] + [batch for batch in batches[3:] if _takes(view, batch)]


def _shorter_side(view: TensorDetector, size: tuple[int, int]) -> int:
    """Measure the shorter side of what the network sees of an image, in pixels."""
    batch, _ = view.adapter.preprocess([torch.zeros(3, *size)])
    return min(batch.image_size)


@torch.no_grad()
def _takes(view: TensorDetector, images: Tensor) -> bool:
    """Whether a detector can be run on images; group normalisation, for one, refuses a map of a single cell."""
    try:
        view(images)
    except (RuntimeError, ValueError):
        return False
    return True


def _validate_image_size(
    view: TensorDetector, size: tuple[int, int], wanted: tuple[int, int] | None, where: str, error: type[CrossKDError]
) -> None:
    d = view.adapter.size_divisible if view.preprocessing == "outside" else 1
    if wanted is not None and tuple(wanted) != tuple(size):
        raise error(
            expected=f"images of {wanted}",
            got=f"{size}",
            where=where,
            fix="choose images of image_size, or leave it open",
        )
    if any(side < d or side % d for side in size):
        raise error(
            expected=f"height and width in multiples of {d}",
            got=f"{tuple(size)}",
            where=where,
            fix='pad as adapter.preprocess does, or use preprocessing="inside"',
        )


def roomy_size(view: TensorDetector, probe: Probe) -> tuple[int, int]:
    """Choose a size that makes every map at least three rows high: the tracer would take one row for a constant."""
    d = view.adapter.size_divisible
    coarsest = max(d, *probe.strides)
    return ceil(3 * coarsest / d) * d, ceil(4 * coarsest / d) * d


def _made_up(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Images with large and small structure, ``(count, 3, height, width)`` in 0…1."""
    layers = [torch.rand(count, 3, height // cell + 2, width // cell + 2, generator=generator) for cell in (64, 16, 4)]
    smooth = [F.interpolate(layer, size=(height, width), mode="bilinear") for layer in layers]
    return torch.stack(smooth).mul(torch.tensor([0.5, 0.3, 0.2]).view(3, 1, 1, 1, 1)).sum(dim=0)
