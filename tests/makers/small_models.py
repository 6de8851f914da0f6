"""Small torchvision detectors and drawn scenes that tests are made of. Same seed, same model, same scene."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

from crosskd_assign.structures import Target

Norm = Literal["none", "batch"]

torch.set_num_threads(1)  # maps of a few points are slower on more, and much slower where cores are shared

CLASSES = 3
STRIDES = (8, 16, 32, 64, 128)


class SmallBackbone(nn.Module):
    """Three strided convolutions and a feature pyramid: P3 to P5, and P6 and P7 where ``levels`` is 5."""

    def __init__(self, channels: int = 32, *, levels: int = 5, norm: Norm = "none", stem_stride: int = 4) -> None:
        super().__init__()
        self.out_channels = channels
        layer = nn.BatchNorm2d if norm == "batch" else nn.Identity
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 5, stem_stride, 2), layer(16), nn.ReLU())
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), layer(outputs), nn.ReLU())
            for inputs, outputs in [(16, 16), (16, 24), (24, 32)]
        )
        extra = LastLevelP6P7(channels, channels) if levels == 5 else None
        self.fpn = FeaturePyramidNetwork([16, 24, 32], channels, extra_blocks=extra)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps ``(N, channels, *, *)`` by name, fine to coarse."""
        x = self.stem(images)
        maps: OrderedDict[str, Tensor] = OrderedDict()
        for i, stage in enumerate(self.body):
            x = stage(x)
            maps[str(i)] = x
        pyramid: dict[str, Tensor] = self.fpn(maps)
        return pyramid


def small_fcos(
    seed: int = 0,
    *,
    classes: int = CLASSES,
    channels: int = 32,
    levels: int = 5,
    norm: Norm = "none",
    stem_stride: int = 4,
    confidence: float = 0.3,
    **options: Any,
) -> FCOS:
    """An FCOS of about 0.1 M parameters whose outputs vary from point to point; ``confidence`` is its mean score."""
    torch.manual_seed(seed)
    anchors = AnchorGenerator(tuple((s * stem_stride // 4,) for s in STRIDES[:levels]), ((1.0,),) * levels)
    model = FCOS(
        SmallBackbone(channels, levels=levels, norm=norm, stem_stride=stem_stride),
        classes,
        anchor_generator=anchors,
        head=FCOSHead(channels, 1, classes, num_convs=1),
        **{"min_size": 64, "max_size": 128, **options},
    )
    if norm == "batch":
        _batch_norm_head(model.head)
    _liven(model, confidence)
    nn.init.constant_(model.head.regression_head.bbox_reg.bias, 1.5)  # distances go through a ReLU
    return model


def small_retinanet(
    seed: int = 0,
    *,
    classes: int = CLASSES,
    channels: int = 32,
    levels: int = 5,
    norm: Norm = "none",
    version: Literal[1, 2] = 1,
    confidence: float = 0.3,
    **options: Any,
) -> RetinaNet:
    """A RetinaNet with two anchors at a point; version 2 has group normalisation in its head, as torchvision's v2."""
    torch.manual_seed(seed)
    anchors = AnchorGenerator(tuple((3 * s,) for s in STRIDES[:levels]), ((0.5, 2.0),) * levels)
    layer: Callable[..., nn.Module] | None = None
    if norm == "batch":
        layer = nn.BatchNorm2d
    elif version == 2:
        layer = partial(nn.GroupNorm, 32)
    model = RetinaNet(
        SmallBackbone(channels, levels=levels, norm=norm),
        classes,
        anchor_generator=anchors,
        head=RetinaNetHead(channels, 2, classes, norm_layer=layer),
        **{"min_size": 64, "max_size": 128, **options},
    )
    _liven(model, confidence)
    return model


MAKERS: dict[str, Callable[..., FCOS | RetinaNet]] = {
    "fcos": small_fcos,
    "retinanet": small_retinanet,
    "retinanet_v2": partial(small_retinanet, version=2),
}


def _batch_norm_head(head: nn.Module) -> None:
    for tower in (head.classification_head.conv, head.regression_head.conv):  # type: ignore[union-attr]
        for i, layer in enumerate(tower):  # type: ignore[arg-type]
            if isinstance(layer, nn.GroupNorm):
                tower[i] = nn.BatchNorm2d(layer.num_channels)  # type: ignore[assignment, operator]


def _liven(model: FCOS | RetinaNet, confidence: float) -> None:
    """torchvision starts heads with weights of 0.01, so that all points predict the same; here they differ."""
    for module in [*model.backbone.stem, *model.backbone.body.modules(), *model.head.modules()]:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    classifier = model.head.classification_head.cls_logits
    with torch.no_grad():
        classifier.weight.mul_(0.5)
        classifier.bias.fill_(float(torch.logit(torch.tensor(confidence))))
        model.head.regression_head.bbox_reg.weight.mul_(0.2)


def scene(
    sizes: Sequence[tuple[int, int]] = ((64, 64), (64, 64)),
    *,
    boxes: Sequence[int] | int = 2,
    classes: int = CLASSES,
    seed: int = 0,
) -> tuple[list[Tensor], list[Target]]:
    """Noisy images of ``(height, width)`` with filled rectangles, and their targets; ``boxes`` for each image."""
    generator = torch.Generator().manual_seed(seed)
    counts = [boxes] * len(sizes) if isinstance(boxes, int) else boxes
    images, targets = [], []
    for (height, width), count in zip(sizes, counts, strict=True):
        image = torch.rand(3, height, width, generator=generator) * 0.3
        frame = torch.tensor([width, height], dtype=torch.float32)
        corner = torch.rand(count, 2, generator=generator) * frame * 0.5
        extent = (0.2 + 0.25 * torch.rand(count, 2, generator=generator)) * frame
        xyxy = torch.cat([corner, corner + extent], dim=1).round()
        labels = torch.randint(classes, (count,), generator=generator)
        for (x1, y1, x2, y2), label in zip(xyxy.int().tolist(), labels.tolist(), strict=True):
            image[:, y1:y2, x1:x2] = F.one_hot(torch.tensor(label % 3), 3).float()[:, None, None]
        images.append(image)
        targets.append(Target(boxes=xyxy, labels=labels))
    return images, targets


def total(losses: dict[str, Tensor]) -> Tensor:
    """The sum that a training loop goes backward from."""
    return torch.stack(list(losses.values())).sum()


def backward(losses: dict[str, Tensor]) -> None:
    """Gradients of the sum of all losses."""
    total(losses).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Gradients of all parameters that have one, by name."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of parameters and buffers, to compare with later."""
    return {name: value.clone() for name, value in module.state_dict().items()}
