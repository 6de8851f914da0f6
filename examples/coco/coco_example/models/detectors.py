"""Build detectors: torchvision's FCOS and RetinaNet on its usual backbones, and on a small one for CPUs."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

from coco_example.errors import ModelError, first_line
from coco_example.models.timm_backbone import timm_backbone
from coco_example.models.weights import load_weights
from coco_example.options import TIMM, Architecture, Backbone, ModelOptions
from crosskd_assign import SelectionBranch

__all__ = ["add_selection", "build_detector", "selection_of", "torchvision_classes", "torchvision_detector"]


class SmallBackbone(nn.Module):
    """A residual network of 0.6 M parameters with a pyramid of strides 8, 16, 32 and 64, for small images on a CPU.

    Made of ``body`` and ``fpn``, as torchvision's ``BackboneWithFPN`` is.
    """

    def __init__(self, widths: tuple[int, int, int, int, int] = (24, 48, 64, 96, 128), out_channels: int = 64) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.body = _SmallBody(widths)
        self.fpn = FeaturePyramidNetwork(list(widths[2:]), out_channels, extra_blocks=LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the feature pyramid of images ``(N, 3, H, W)``."""
        pyramid: dict[str, Tensor] = self.fpn(self.body(x))
        return pyramid


class _SmallBody(nn.Module):
    """Two strided convolutions and three residual stages, whose maps are returned."""

    def __init__(self, widths: tuple[int, int, int, int, int]) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv_norm_relu(3, widths[0], 2), _conv_norm_relu(widths[0], widths[1], 2))
        self.stages = nn.ModuleList(_ResidualStage(i, o) for i, o in pairwise(widths[1:]))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the maps of strides 8, 16 and 32, by name."""
        maps: OrderedDict[str, Tensor] = OrderedDict()
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            x = stage(x)
            maps[str(i)] = x
        return maps


class _ResidualStage(nn.Module):
    """Halves the resolution, then adds one residual convolution."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.down = _conv_norm_relu(channels_in, channels_out, 2)
        self.residual = _conv_norm_relu(channels_out, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, *, H, W)`` to ``(N, *, H / 2, W / 2)``."""
        x = self.down(x)
        y: Tensor = x + self.residual(x)
        return y


def _conv_norm_relu(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True))


def build_detector(options: ModelOptions, num_classes: int, *, resize_to_train: bool = True) -> nn.Module:
    """Build a torchvision detector with weights drawn at random, but for those that ``options`` name.

    Args:
        options: Which one.
        num_classes: Classes, background included.
        resize_to_train: Whether images are resized in training as for detection; else they are taken as they come.

    Raises:
        ModelError: Unknown names, numbers that cannot be, or weights that do not fit.
    """
    # 1. Refuse what a command line or a file may name but nobody can build.
    named = options.backbone in get_args(Backbone) or options.backbone.startswith(TIMM)
    if options.architecture not in get_args(Architecture) or not named:
        raise ModelError(
            expected=f"an architecture of {get_args(Architecture)} on a backbone of {get_args(Backbone)} or timm:NAME",
            got=f"{options.architecture!r} on {options.backbone!r}",
            where="build_detector",
            fix="choose from these",
        )
    small = options.backbone == "small"
    channels = options.channels or (64 if small else 256)
    if channels % 32:
        raise ModelError(
            expected="channels in multiples of 32, as group norm needs them",
            got=f"{channels}",
            where="--channels",
            fix=f"choose {channels // 32 * 32 + 32}",
        )

    # 2. Backbone and pyramid.
    backbone = _small_backbone(options, channels) if small else _large_backbone(options, channels)
    strides = (8, 16, 32, 64) if small else (8, 16, 32, 64, 128)

    # 3. Anchors and head.
    sides = {"min_size": options.short_side or options.size, "max_size": options.size}
    sides |= {} if resize_to_train else {"_skip_resize": True}
    detector: nn.Module
    if options.architecture == "fcos":
        anchors = AnchorGenerator(tuple((s,) for s in strides), ((1.0,),) * len(strides))
        head = FCOSHead(channels, 1, num_classes, num_convs=options.head_convs or (2 if small else 4))
        # The head predicts distances in strides through a ReLU, and objects measure several strides. Starting at 2
        # instead of 0 spares every arm the first epochs, in which half of the boxes are empty and get no gradient.
        nn.init.constant_(head.regression_head.bbox_reg.bias, 2.0)
        detector = FCOS(backbone, num_classes, anchor_generator=anchors, head=head, **sides)
    else:
        scales = tuple(tuple(int(4 * s * 2 ** (i / 3)) for i in range(3)) for s in strides)
        anchors = AnchorGenerator(scales, ((0.5, 1.0, 2.0),) * len(strides))
        head = RetinaNetHead(channels, 9, num_classes, norm_layer=_group_norm)
        detector = RetinaNet(backbone, num_classes, anchor_generator=anchors, head=head, **sides)

    # 4. A branch that selects, which travels with the detector: in its weights, copies and averages.
    return add_selection(detector, options)


def add_selection(detector: nn.Module, options: ModelOptions) -> nn.Module:
    """Give a detector, or the adapter of one, the selection branch that options ask for; `selection_of` finds it."""
    if options.selection:
        detector.selection = SelectionBranch(detector, class_score=options.class_score)
    return detector


def selection_of(detector: nn.Module) -> SelectionBranch | None:
    """Return the selection branch that a detector, or the adapter of one, was built with, if it was."""
    for owner in (detector, getattr(detector, "model", None)):
        branch = getattr(owner, "selection", None)
        if isinstance(branch, SelectionBranch):
            return branch
    return None


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


def _small_backbone(options: ModelOptions, out_channels: int) -> SmallBackbone:
    backbone = SmallBackbone(out_channels=out_channels)
    if options.backbone_weights == "imagenet" or options.trainable_stages != -1:
        raise ModelError(
            expected="a torchvision backbone for ImageNet weights or frozen stages",
            got="the small one",
            where="--backbone-weights, --trainable-stages",
            fix="leave them out, or choose another backbone",
        )
    if options.backbone_weights:
        load_weights(backbone, Path(options.backbone_weights))
    return backbone


def _large_backbone(options: ModelOptions, out_channels: int) -> nn.Module:
    """Build backbone and pyramid as torchvision does for dense detectors, P3 to P7."""
    if not -1 <= options.trainable_stages <= 5:
        raise ModelError(
            expected="0 to 5 stages to train",
            got=f"{options.trainable_stages}",
            where="--trainable-stages",
            fix="choose within, or -1 for the usual",
        )
    if options.backbone.startswith(TIMM):
        name = options.backbone.removeprefix(TIMM)
        return timm_backbone(name, options.backbone_weights, options.trainable_stages, out_channels)
    backbone: nn.Module = _torchvision_backbone(options, out_channels)
    return backbone


def _torchvision_backbone(options: ModelOptions, out_channels: int) -> BackboneWithFPN:
    # 1. The classification network, its last stages left out.
    body = _classification_body(options.backbone, options.backbone_weights)
    widths, strides = _measure(body)
    last = {stride: i for i, stride in enumerate(strides)}  # the deepest map of each stride

    # 2. Freeze its first stages.
    usual = 3 if options.backbone_weights else len(last)
    trained = usual if options.trainable_stages == -1 else options.trainable_stages
    frozen = sorted(last)[: len(last) - trained]
    for block, stride in zip(body, strides, strict=True):
        if stride in frozen:
            block.requires_grad_(False)

    # 3. The pyramid on its maps of strides 8, 16 and 32.
    names = [child for child, _ in body.named_children()]
    layers = {names[last[stride]]: str(i) for i, stride in enumerate((8, 16, 32))}
    channels = [widths[last[stride]] for stride in (8, 16, 32)]
    last_levels = LastLevelP6P7(out_channels, out_channels)
    return BackboneWithFPN(body, layers, channels, out_channels, extra_blocks=last_levels)


def _classification_body(name: str, weights: str) -> nn.Sequential:
    """Build the convolutional part of a classification network; ``weights`` as `ModelOptions.backbone_weights`."""
    # Batches of detectors are too small to re-estimate the statistics that pre-trained weights rely on.
    eps = 1e-3 if name.startswith("mobilenet_v3") else 1e-5
    norm = {"norm_layer": partial(FrozenBatchNorm2d, eps=eps)} if weights else {}
    network = get_model(name, weights=get_model_weights(name).DEFAULT if weights == "imagenet" else None, **norm)
    if weights and weights != "imagenet":
        load_weights(network, Path(weights))
    # ResNets keep their stages as attributes, MobileNets in one sequence, whose last expansion detectors do not need.
    if name.startswith("resnet"):
        return nn.Sequential(OrderedDict(list(network.named_children())[:-2]))
    body: nn.Sequential = network.features[:-1]
    return body


@torch.no_grad()
def _measure(body: nn.Sequential) -> tuple[list[int], list[int]]:
    """Measure channels and stride of the map behind every block."""
    modes = {module: module.training for module in body.modules()}
    body.eval()
    x, widths, strides = torch.zeros(1, 3, 64, 64), [], []
    for block in body:
        x = block(x)
        widths.append(x.shape[1])
        strides.append(64 // x.shape[-1])
    for module, mode in modes.items():
        module.training = mode
    return widths, strides


# The only dense one whose norms torchvision changes when it fetches the weights, which were trained so.
_NORM_EPSILON = {"retinanet_resnet50_fpn": 0.0}


def torchvision_detector(name: str, *, size: int, short_side: int = 0, fetch: bool = True) -> nn.Module:
    """Fetch a COCO-trained detector of torchvision, e.g. "fcos_resnet50_fpn"; its labels are COCO's category ids.

    Args:
        name: Its name in ``torchvision.models``.
        size: Longer side of the images in pixels.
        short_side: What their shorter side must not exceed; 0 for no such bound.
        fetch: Whether to fetch the weights; without, a detector of the same form, to load others into.

    Raises:
        ModelError: The weights cannot be had.
    """
    options: dict[str, Any] = {"min_size": short_side or size, "max_size": size}
    options |= {"weights": "DEFAULT"} if fetch else {"weights": None, "weights_backbone": None}
    try:
        detector: nn.Module = get_model(name, **options)
    except (ValueError, OSError) as error:
        raise ModelError(
            expected="a detector of torchvision with COCO weights",
            got=f"none of the name {name}: {first_line(error)}",
            where=f"torchvision:{name}",
            fix="choose one of torchvision.models.list_models(torchvision.models.detection), and have a network or its "
            "file in the cache",
        ) from error
    if not fetch:
        for module in detector.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = _NORM_EPSILON.get(name, module.eps)
    return detector


def torchvision_classes(name: str) -> dict[int, str]:
    """Name the classes of a detector of torchvision by label, which is COCO's category id.

    Raises:
        ModelError: torchvision has none of this name, or no weights for it.
    """
    try:
        names = get_model_weights(name).DEFAULT.meta["categories"]
    except (ValueError, AttributeError) as error:
        raise ModelError(
            expected="a detector of torchvision with COCO weights",
            got=f"none of the name {name}",
            where=f"torchvision:{name}",
            fix="choose one of torchvision.models.list_models(torchvision.models.detection)",
        ) from error
    return {label: text for label, text in enumerate(names) if text not in ("__background__", "N/A")}
