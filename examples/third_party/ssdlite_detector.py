"""torchvision's SSDlite (BSD-3-Clause), which the library has not built in: softmax classes, and square input.

A network of your own: ``SSDLiteAdapter(ssdlite320_mobilenet_v3_large(weights="DEFAULT"))``. torchvision's class 0 is
the background. It is no class here: label c is torchvision's label c + 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection import ssdlite320_mobilenet_v3_large
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD

from crosskd_assign import DensePredictions, DetectorAdapter, GridLevel, functional
from crosskd_assign.structures import Batch, Target

__all__ = ["SSDLiteAdapter", "build", "own_loss"]


class SSDLiteAdapter(DetectorAdapter):
    """An SSDlite, whose images are squeezed into one square size."""

    strides = (16, 32, 64, 128, 256, 512)  # nominal: on a blank image of 256 pixels the last two maps are one cell each

    def __init__(self, model: SSD) -> None:
        transform = model.transform
        super().__init__(model, image_mean=transform.image_mean, image_std=transform.image_std, size_divisible=1)
        self.model: SSD

    def preprocess(
        self, images: Sequence[Tensor] | Tensor, targets: Sequence[Target | None] = ()
    ) -> tuple[Batch, list[Target | None]]:
        """Resize to the network's square as its own transform does, without antialiasing."""
        given = list(targets) or [None] * len(images)
        pairs = [
            self.model.transform.resize(x, None if t is None else dict(t)) for x, t in zip(images, given, strict=True)
        ]
        pixels = torch.stack([image for image, _ in pairs])
        originals = tuple((image.shape[-2], image.shape[-1]) for image in images)
        batch = Batch(pixels, ((pixels.shape[-2], pixels.shape[-1]),) * len(pairs), originals)
        return batch, [target for _, target in pairs] if targets else []

    def features(self, batch: Batch) -> list[Tensor]:
        """Compute six maps, down to a single cell."""
        return list(self.model.backbone(self.normalize(batch)).values())

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        """Run the head: scores, and offsets from six default boxes a cell."""
        output, generator, (height, width) = self.model.head(features), self.model.anchor_generator, image_size
        [anchors] = generator(ImageList(features[0].new_empty(1, 3, height, width), [image_size]), features)  # (A, 4)
        levels = []
        for x, stride, count in zip(features, self.strides, generator.num_anchors_per_location(), strict=True):
            rows, columns = x.shape[-2:]
            step = (width / columns, height / rows)
            levels.append(GridLevel(rows, columns, stride, step, (step[0] / 2, step[1] / 2), count))
        return DensePredictions.from_anchors(
            functional.sigmoid_logits(output["cls_logits"])[..., 1:],
            output["bbox_regression"],
            anchors,
            levels,
            weights=self.model.box_coder.weights,
        )


def build(classes: int, *, size: int = 320) -> SSDLiteAdapter:
    """Build a fresh network for squares of ``size`` pixels, without weights."""
    model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=classes + 1)
    model.transform.fixed_size = (size, size)
    return SSDLiteAdapter(model)


def own_loss(adapter: SSDLiteAdapter, images: Sequence[Tensor], targets: Sequence[Target]) -> Tensor:
    """Compute the one-to-many training loss of torchvision, whose labels count the background."""
    losses = adapter.model(images, [{**target, "labels": target["labels"] + 1} for target in targets])
    total: Tensor = torch.stack(list(losses.values())).sum()
    return total
