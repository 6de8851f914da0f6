"""EfficientDet of the package `effdet <https://pypi.org/project/effdet/>`_ (Apache-2.0, as is `timm` below it).

A timm backbone, a BiFPN, and one class and one box network with batch-norms of their own for each of five levels; nine
anchors a cell. A network of your own: ``EfficientDetAdapter(effdet.create_model(…))``. Label c is class channel c,
from 0; the package's own data sets and detections count from 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crosskd_assign import DensePredictions, GridLevel, ResizingAdapter
from crosskd_assign.structures import Batch, Target

__all__ = ["EfficientDetAdapter", "build", "own_loss"]


class EfficientDetAdapter(ResizingAdapter):
    """An EfficientDet for images of any size, although the package builds it for one.

    Args:
        model: The network, without a bench around it.
        size: Longer side of the images in pixels; 0 takes them as they come.
    """

    def __init__(self, model: Any, *, size: int = 0) -> None:
        config = model.config
        mean, std = config.get("mean", (0.485, 0.456, 0.406)), config.get("std", (0.229, 0.224, 0.225))
        super().__init__(model, image_mean=tuple(mean), image_std=tuple(std), size=size)
        built_for = self._map_sizes(config.image_size)
        # The BiFPN enlarges maps to sizes that were fixed when it was built; this is which level's each is.
        self._enlarging: list[tuple[Any, int]] = [
            (module, built_for.index(tuple(module.size)))
            for module in model.modules()
            if hasattr(module, "scale_factor")
        ]

    def features(self, batch: Batch) -> list[Tensor]:
        """Run backbone and BiFPN; the latter is set to the size of this batch, and then to its own again."""
        self._fit(batch.image_size)
        maps: list[Tensor] = self.model.fpn(self.model.backbone(self.normalize(batch)))
        self._fit(self.model.config.image_size)
        return maps

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        """Run class and box network; boxes by the package's own coding, which bounds no size, unlike `from_anchors`."""
        from effdet.anchors import decode_box_outputs  # noqa: PLC0415  # the adapter can be read without the package

        config = self.model.config
        logits = _flat(self.model.class_net(features), config.num_classes)
        codes = _flat(self.model.box_net(features), 4).float()
        anchors = _anchors(config, image_size).boxes.to(codes)
        boxes = torch.stack([decode_box_outputs(code, anchors, output_xyxy=True) for code in codes])
        each = config.num_scales * len(config.aspect_ratios)
        levels = [_grid(x, image_size, 2.0 ** (config.min_level + i), each) for i, x in enumerate(features)]
        return DensePredictions.on_grid(logits, boxes, levels)

    def parts(self) -> dict[str, nn.Module]:
        """Name backbone, BiFPN, and both networks of the head."""
        model = self.model
        return {"backbone": model.backbone, "neck": model.fpn, "head": nn.ModuleList([model.class_net, model.box_net])}

    def _map_sizes(self, size: Sequence[int]) -> list[tuple[int, int]]:
        """Compute the sizes of maps for images of ``(height, width)``, halved 0, 1, 2, … times."""
        height, width = size
        return [(-(-height // 2**n), -(-width // 2**n)) for n in range(self.model.config.max_level + 1)]

    def _fit(self, size: Sequence[int]) -> None:
        sizes = self._map_sizes(size)
        for module, level in self._enlarging:
            module.size = sizes[level]


def _flat(maps: Sequence[Tensor], width: int) -> Tensor:
    """Flatten maps ``(N, anchors · width, H, W)`` to ``(N, A, width)``, row by row, the anchors of a cell together."""
    return torch.cat([x.permute(0, 2, 3, 1).reshape(len(x), -1, width) for x in maps], dim=1)


def _grid(x: Tensor, image: Sequence[int], stride: float, anchors: int) -> GridLevel:
    height, width = x.shape[-2:]
    step = (image[1] / width, image[0] / height)
    return GridLevel(height, width, stride, step, (step[0] / 2, step[1] / 2), anchors)


def _anchors(config: Any, size: Sequence[int]) -> Any:
    """Make the package's anchors for images of ``(height, width)``."""
    from effdet.anchors import Anchors  # noqa: PLC0415

    options = (config.num_scales, config.aspect_ratios, config.anchor_scale)
    return Anchors(config.min_level, config.max_level, *options, tuple(size))


def build(classes: int, *, name: str = "tf_efficientdet_lite0", size: int = 0) -> EfficientDetAdapter:
    """Build a fresh network of the package, without weights."""
    from effdet import create_model  # noqa: PLC0415

    network = create_model(name, num_classes=classes, pretrained_backbone=False)
    return EfficientDetAdapter(network, size=size)


def own_loss(adapter: EfficientDetAdapter, images: Sequence[Tensor], targets: Sequence[Target]) -> Tensor:
    """Compute the package's own one-to-many training loss."""
    from effdet.anchors import AnchorLabeler  # noqa: PLC0415
    from effdet.loss import DetectionLoss  # noqa: PLC0415

    batch, moved = adapter.preprocess(images, targets)
    model, features = adapter.model, adapter.features(batch)
    labeler = AnchorLabeler(_anchors(model.config, batch.image_size), model.config.num_classes)
    boxes = [target["boxes"][:, [1, 0, 3, 2]] for target in moved if target]
    classes = [target["labels"] + 1 for target in moved if target]  # here the package counts from 1
    loss: Tensor
    loss, _, _ = DetectionLoss(model.config)(
        model.class_net(features), model.box_net(features), *labeler.batch_label_anchors(boxes, classes)
    )
    return loss
