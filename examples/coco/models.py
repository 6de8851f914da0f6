"""The example's detectors: torchvision's FCOS and RetinaNet on its usual backbones, and a small one for CPU."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import load_file
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

__all__ = [
    "Architecture",
    "Backbone",
    "ModelError",
    "build_detector",
    "load_weights",
    "read_state_dict",
    "torchvision_detector",
]

Architecture = Literal["fcos", "retinanet"]
Backbone = Literal[
    "small", "resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small"
]


class ModelError(ValueError):
    """A model cannot be built or its weights do not fit."""


class SmallBackbone(nn.Module):
    """A residual network of 0.6 M parameters with a pyramid of strides 8, 16, 32 and 64, for small images on a CPU."""

    def __init__(self, widths: tuple[int, int, int, int, int] = (24, 48, 64, 96, 128), out_channels: int = 64) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.stem = nn.Sequential(_conv_norm_relu(3, widths[0], 2), _conv_norm_relu(widths[0], widths[1], 2))
        self.stages = nn.ModuleList(_ResidualStage(i, o) for i, o in pairwise(widths[1:]))
        self.fpn = FeaturePyramidNetwork(list(widths[2:]), out_channels, extra_blocks=LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Feature pyramid of images ``(N, 3, H, W)``."""
        maps: OrderedDict[str, Tensor] = OrderedDict()
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            x = stage(x)
            maps[str(i)] = x
        pyramid: dict[str, Tensor] = self.fpn(maps)
        return pyramid


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


def build_detector(
    architecture: Architecture,
    backbone: Backbone,
    num_classes: int,
    *,
    size: int,
    short_side: int = 0,
    backbone_weights: str | None = None,
    trainable_stages: int | None = None,
    channels: int | None = None,
    head_convs: int | None = None,
) -> nn.Module:
    """A torchvision detector.

    Args:
        architecture: "fcos" or "retinanet".
        backbone: "small" or the name of a torchvision network.
        num_classes: Classes, background included.
        size: Longer side of the images in pixels; the detector resizes to it.
        short_side: What their shorter side must not exceed, as COCO's 800 with a size of 1333; 0 for no such bound.
        backbone_weights: "imagenet" for torchvision's weights, the path of a state dict, or None for none.
        trainable_stages: Backbone stages to train, of five and from the last; None trains 3 of a pre-trained backbone
            (torchvision's default) and all of a fresh one.
        channels: Of pyramid and head, a multiple of 32; None for 256, or 64 on the small backbone.
        head_convs: Convolutions of each branch of FCOS's head; None for 4, or 2 on the small backbone.

    Raises:
        ModelError: Unknown names, or weights that do not fit.
    """
    if architecture not in get_args(Architecture) or backbone not in get_args(Backbone):
        raise ModelError(
            f"Expected an architecture of {get_args(Architecture)} on a backbone of {get_args(Backbone)}, but got "
            f"{architecture!r} on {backbone!r} (build_detector). Fix: choose from these."
        )
    channels = channels or (64 if backbone == "small" else 256)
    if channels % 32:
        raise ModelError(
            f"Expected channels in multiples of 32, as group norm needs them, but got {channels} (--channels). Fix: "
            f"choose {channels // 32 * 32 + 32}."
        )
    trunk: nn.Module
    strides: tuple[int, ...]
    if backbone == "small":
        trunk, strides = SmallBackbone(out_channels=channels), (8, 16, 32, 64)
        if backbone_weights == "imagenet" or trainable_stages is not None:
            raise ModelError(
                "Expected a torchvision backbone for ImageNet weights or frozen stages, but got the small one "
                "(--backbone-weights, --trainable-stages). Fix: leave them out, or choose another backbone."
            )
        if backbone_weights is not None:
            load_weights(trunk, Path(backbone_weights))
    else:
        trunk = _torchvision_trunk(backbone, backbone_weights, trainable_stages, channels)
        strides = (8, 16, 32, 64, 128)
    options = {"min_size": short_side or size, "max_size": size}
    detector: nn.Module
    if architecture == "fcos":
        anchors = AnchorGenerator(tuple((s,) for s in strides), ((1.0,),) * len(strides))
        head = FCOSHead(channels, 1, num_classes, num_convs=head_convs or (2 if backbone == "small" else 4))
        # The head predicts distances in strides through a ReLU, and objects measure several strides. Starting at 2
        # instead of 0 spares every arm the first epochs, in which half of the boxes are empty and get no gradient.
        nn.init.constant_(head.regression_head.bbox_reg.bias, 2.0)
        detector = FCOS(trunk, num_classes, anchor_generator=anchors, head=head, **options)
    else:
        scales = tuple(tuple(int(4 * s * 2 ** (i / 3)) for i in range(3)) for s in strides)
        anchors = AnchorGenerator(scales, ((0.5, 1.0, 2.0),) * len(strides))
        head = RetinaNetHead(channels, 9, num_classes, norm_layer=_group_norm)
        detector = RetinaNet(trunk, num_classes, anchor_generator=anchors, head=head, **options)
    return detector


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


def _torchvision_trunk(
    name: str, weights: str | None, trainable_stages: int | None, out_channels: int
) -> BackboneWithFPN:
    """Backbone and FPN as torchvision builds them for dense detectors, P3 to P7."""
    if trainable_stages is not None and not 0 <= trainable_stages <= 5:
        raise ModelError(
            f"Expected 0 to 5 stages to train, but got {trainable_stages} (--trainable-stages). Fix: choose within."
        )
    # Batches of detectors are too small to re-estimate the statistics that pre-trained weights rely on.
    eps = 1e-3 if name.startswith("mobilenet_v3") else 1e-5
    norm = {} if weights is None else {"norm_layer": partial(FrozenBatchNorm2d, eps=eps)}
    network = get_model(name, weights=get_model_weights(name).DEFAULT if weights == "imagenet" else None, **norm)
    if weights not in (None, "imagenet"):
        load_weights(network, Path(str(weights)))
    # ResNets keep their stages as attributes, MobileNets in one sequence, whose last expansion detectors do not need.
    body = (
        nn.Sequential(OrderedDict(list(network.named_children())[:-2]))
        if name.startswith("resnet")
        else (network.features[:-1])
    )
    widths, strides = _measure(body)
    last = {stride: i for i, stride in enumerate(strides)}  # the deepest map of each stride
    stages = len(last) if trainable_stages is None and weights is None else trainable_stages
    frozen = sorted(last)[: len(last) - (3 if stages is None else stages)]
    for block, stride in zip(body, strides, strict=True):
        if stride in frozen:
            block.requires_grad_(False)
    names = [child for child, _ in body.named_children()]
    layers = {names[last[stride]]: str(i) for i, stride in enumerate((8, 16, 32))}
    channels = [widths[last[stride]] for stride in (8, 16, 32)]
    last_levels = LastLevelP6P7(out_channels, out_channels)
    return BackboneWithFPN(body, layers, channels, out_channels, extra_blocks=last_levels)


@torch.no_grad()
def _measure(body: nn.Sequential) -> tuple[list[int], list[int]]:
    """Channels and stride of the map behind every block."""
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


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a state dict file into a module, all of it or nothing.

    Raises:
        ModelError: No such file, not a state dict, or one of another network.
    """
    state = read_state_dict(path)
    own = module.state_dict()
    # BatchNorm2d counts batches and FrozenBatchNorm2d does not; either takes the other's weights without that count.
    counts = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    state = {name: value for name, value in state.items() if name in own or not name.endswith("num_batches_tracked")}
    state = counts | state
    wrong = list(own.keys() ^ state.keys())
    wrong += [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if wrong:
        raise ModelError(
            f"Expected weights of {type(module).__name__}, but got {len(wrong)} tensors that do not fit, such as "
            f"{sorted(wrong)[0]} ({path}). Fix: give the file that belongs to this network."
        )
    module.load_state_dict(state)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict, from safetensors or from ``torch.save``, without unpickling code.

    Raises:
        ModelError: No such file, or something else in it.
    """
    if not path.is_file():
        raise ModelError(f"Expected a weights file, but got none ({path}). Fix: check the path.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen types for a damaged or unsafe file
        raise ModelError(
            f"Expected a state dict of plain tensors, but got a file that cannot be read as one ({path}): {error}. "
            "Fix: save it with torch.save(model.state_dict(), path)."
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(
            f"Expected a state dict of plain tensors, but got {type(state).__name__} of other things ({path}). "
            "Fix: save model.state_dict() alone."
        )
    return state


def torchvision_detector(name: str, *, size: int, short_side: int = 0) -> nn.Module:
    """A COCO-trained detector of torchvision, e.g. "fcos_resnet50_fpn"; its labels are COCO's category ids.

    Raises:
        ModelError: The weights cannot be had.
    """
    try:
        detector: nn.Module = get_model(name, weights="DEFAULT", min_size=short_side or size, max_size=size)
    except (ValueError, OSError) as error:
        raise ModelError(
            f"Expected a detector of torchvision with COCO weights, but got none ({name}): {error}. Fix: choose one of "
            "torchvision.models.list_models(torchvision.models.detection), and have a network or its file in the cache."
        ) from error
    return detector
