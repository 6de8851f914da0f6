"""torchvision's SSDlite (BSD-3-Clause), which the library has not built in: softmax classes, and square input.

A network of your own: ``SSDLiteAdapter(ssdlite320_mobilenet_v3_large(weights="DEFAULT"))``. torchvision's class 0 is
the background. It is no class here: label c is torchvision's label c + 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD

from crosskd_assign import Batch, DensePredictions, DetectorAdapter, GridLevel, Target
from crosskd_assign.detectors import PyramidLevel

__all__ = ["SSDLiteAdapter", "build", "own_loss", "sigmoid_logits"]


class SSDLiteAdapter(DetectorAdapter):
    """An SSDlite, whose images are squeezed into one square size."""

    def __init__(self, model: SSD) -> None:
        transform = model.transform
        super().__init__(model, image_mean=transform.image_mean, image_std=transform.image_std, size_divisible=1)
        self.model: SSD

    def preprocess(
        self, images: Sequence[Tensor] | Tensor, targets: Sequence[Target] | None = None
    ) -> tuple[Batch, list[Target] | None]:
        """Resize to the network's square, as its own transform does."""
        resize = self.model.transform.resize
        pairs = [resize(image, None if targets is None else dict(targets[i])) for i, image in enumerate(images)]
        pixels = torch.stack([image for image, _ in pairs])
        originals = tuple((image.shape[-2], image.shape[-1]) for image in images)
        batch = Batch(pixels, ((pixels.shape[-2], pixels.shape[-1]),) * len(pairs), originals)
        return batch, None if targets is None else [target for _, target in pairs]

    def features(self, batch: Batch) -> list[Tensor]:
        """Six maps, down to a single cell."""
        return list(self.model.backbone(self.normalize(batch)).values())

    def head(self, features: list[Tensor], batch: Batch) -> DensePredictions:
        """Scores and box codes of six default boxes a cell, decoded by torchvision's own coder."""
        output, anchors = self.model.head(features), self.model.anchor_generator
        height, width = batch.images.shape[-2:]
        [boxes] = anchors(ImageList(batch.images[:1], [(height, width)]), features)  # (A, 4)
        codes = output["bbox_regression"].float()
        decoded = torch.stack([self.model.box_coder.decode_single(code, boxes) for code in codes])
        levels = []
        for x, count in zip(features, anchors.num_anchors_per_location(), strict=True):
            h, w = x.shape[-2:]
            step = (width / w, height / h)
            levels.append(GridLevel(h, w, max(step), step, (step[0] / 2, step[1] / 2), count))
        return DensePredictions.on_grid(sigmoid_logits(output["cls_logits"])[..., 1:], decoded, levels)

    def pyramid(self) -> list[PyramidLevel]:
        """Nominal strides, each twice the last; measured on a small probe, two maps of one cell would look alike."""
        levels = super().pyramid()
        return [PyramidLevel(level.channels, levels[0].stride * 2**i) for i, level in enumerate(levels)]

    def trunk(self) -> nn.Module:
        """The backbone with its extra layers."""
        backbone: nn.Module = self.model.backbone
        return backbone


def sigmoid_logits(scores: Tensor) -> Tensor:
    """Logits ``(…, C)`` whose sigmoid is the softmax of ``scores (…, C)``: a score less the logsumexp of the others.

    The library scores every class by itself; with these, it scores as the softmax detector does.
    """
    log_p = scores.float().log_softmax(dim=-1)
    best = log_p.argmax(dim=-1, keepdim=True)
    others = log_p.scatter(-1, best, float("-inf")).logsumexp(dim=-1, keepdim=True)
    # 1 − p loses all digits where p is nearly 1, which only the best can be: its odds are against the others' sum.
    small = log_p.scatter(-1, best, -1.0)
    return (small - torch.log1p(-small.exp())).scatter(-1, best, log_p.gather(-1, best) - others)


def build(classes: int, *, size: int = 320) -> SSDLiteAdapter:
    """A fresh network for squares of ``size`` pixels, without weights."""
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=classes + 1)
    model.transform.fixed_size = (size, size)
    return SSDLiteAdapter(model)


def own_loss(adapter: SSDLiteAdapter, images: Sequence[Tensor], targets: Sequence[Target]) -> Tensor:
    """The one-to-many training loss of torchvision, whose labels count the background."""
    losses = adapter.model(images, [{**target, "labels": target["labels"] + 1} for target in targets])
    total: Tensor = torch.stack(list(losses.values())).sum()
    return total
