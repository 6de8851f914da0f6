"""Backbones of timm with a feature pyramid, P3 to P7."""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from coco_example.errors import MissingPackageError, ModelError, first_line
from coco_example.models.weights import load_weights

__all__ = ["TimmBackbone", "timm_backbone"]

_STRIDES = (8, 16, 32)


class TimmBackbone(nn.Module):
    """A network of timm with a pyramid of strides 8 to 128, made of ``body`` and ``fpn`` as torchvision's are.

    Args:
        body: Returns maps of strides 8, 16 and 32, by name.
        widths: Their channels.
        out_channels: Channels of the pyramid.
    """

    def __init__(self, body: nn.Module, widths: list[int], out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.body = body
        extra = LastLevelP6P7(out_channels, out_channels)
        self.fpn = FeaturePyramidNetwork(widths, out_channels, extra_blocks=extra)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute the feature pyramid of images ``(N, 3, H, W)``."""
        pyramid: dict[str, Tensor] = self.fpn(self.body(x))
        return pyramid


class _Body(nn.Module):
    """The maps of a network that a pyramid is built on."""

    def __init__(self, network: nn.Module, chosen: Sequence[int]) -> None:
        super().__init__()
        self.network = network
        self.chosen = tuple(chosen)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Compute them, by name."""
        maps = self.network(x)
        return OrderedDict((str(n), maps[i]) for n, i in enumerate(self.chosen))


def timm_backbone(name: str, weights: str, trainable_stages: int, out_channels: int) -> TimmBackbone:
    """Build a network of timm with a pyramid on its maps of strides 8, 16 and 32.

    Args:
        name: Its name in timm.
        weights: "imagenet" for timm's own, or the file of a state dict of the whole network; empty for none.
        trainable_stages: How many stages learn, from the last; -1 for 3 with weights, and all without.
        out_channels: Channels of the pyramid.

    Raises:
        MissingPackageError: timm is not installed.
        ModelError: No such network, one without such maps, or weights that cannot be had or do not fit.
    """
    # 1. The network, and what its maps are.
    network = _features(name, weights)
    maps = _blank_maps(network, name)
    strides = [64 // x.shape[-1] for x in maps]
    last = {stride: i for i, stride in enumerate(strides)}  # the deepest map of each stride
    if not set(_STRIDES) <= last.keys():
        raise ModelError(
            expected=f"maps of strides {', '.join(map(str, _STRIDES))}",
            got=f"strides {', '.join(map(str, strides))}",
            where=f"timm:{name}",
            fix="choose a network of stages, such as a ResNet, ConvNeXt, RegNet or MobileNet",
        )

    # 2. Freeze its first stages: all that their maps depend on.
    trained = (3 if weights else len(last)) if trainable_stages == -1 else trainable_stages
    for stride in sorted(last)[: max(0, len(last) - trained)]:
        for parameter in _reached(network, maps[last[stride]]):
            parameter.requires_grad_(False)

    # 3. Freeze what no chosen map depends on: it would never get a gradient.
    chosen = [last[stride] for stride in _STRIDES]
    used = {id(p) for p in _reached(network, sum(maps[i].sum() for i in chosen))}
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in used)
    return TimmBackbone(_Body(network, chosen), [maps[i].shape[1] for i in chosen], out_channels)


def _features(name: str, weights: str) -> nn.Module:
    """Build a network that returns maps, with frozen batch norm where there are weights, as torchvision's have."""
    timm = _timm()
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ModelError(
            expected="a network of timm",
            got=repr(name),
            where="--backbone",
            fix=f"did you mean {' or '.join(f'timm:{n}' for n in near)}?" if near else "see timm.list_models()",
        )
    options: dict[str, Any] = {"pretrained": bool(weights)}
    if weights and weights != "imagenet":
        whole = timm.create_model(name)
        load_weights(whole, Path(weights))  # all of it or nothing
        options["pretrained_cfg_overlay"] = {"state_dict": whole.state_dict()}
    try:
        network: nn.Module = timm.create_model(name, features_only=True, **options)
    except Exception as error:  # of each network its own, and of the hub
        raise ModelError(
            expected="a network of timm that returns maps" + (", and its weights" if weights else ""),
            got=f"{type(error).__name__}: {first_line(error)}",
            where=f"timm:{name}",
            fix="choose another, or give weights as a file: --backbone-weights FILE",
        ) from error
    return timm.layers.freeze_batch_norm_2d(network) if weights else network


def _timm() -> Any:
    try:
        import timm  # noqa: PLC0415  # an extra
        import timm.layers  # noqa: PLC0415
    except ImportError as error:
        raise MissingPackageError(
            expected="the package timm", got="none", where="--backbone timm:…", fix="pip install timm"
        ) from error
    return timm


def _blank_maps(network: nn.Module, name: str) -> list[Tensor]:
    """Compute the maps of a blank image of 64 pixels, with a graph."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        maps: list[Tensor] = network(torch.zeros(1, 3, 64, 64))
    except Exception as error:  # of each network its own
        raise ModelError(
            expected="a network for images of any size",
            got=f"{type(error).__name__}: {first_line(error)}",
            where=f"timm:{name}",
            fix="choose a convolutional one",
        ) from error
    for module, mode in modes.items():
        module.training = mode
    if not all(x.dim() == 4 and x.shape[-2] == x.shape[-1] for x in maps):
        raise ModelError(
            expected="maps (N, channels, height, width)",
            got=", ".join(str(tuple(x.shape)) for x in maps),
            where=f"timm:{name}",
            fix="choose a convolutional network",
        )
    return maps


def _reached(network: nn.Module, value: Any) -> list[nn.Parameter]:
    """List the parameters that a value depends on and that learn."""
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not (learning and value.requires_grad):
        return []
    gradients = torch.autograd.grad(value.sum(), learning, retain_graph=True, allow_unused=True)
    return [parameter for parameter, gradient in zip(learning, gradients, strict=True) if gradient is not None]
