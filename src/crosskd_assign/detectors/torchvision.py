"""Adapters of torchvision's FCOS and RetinaNet."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet

from ..geometry import at_least_float32, boxes_from_anchors, scale
from ..structures import Batch, DensePredictions, GridLevel, Target
from .base import DetectorAdapter

__all__ = ["FCOSAdapter", "RetinaNetAdapter"]

_BRANCHES = ("classification", "regression")
_ANCHOR_CACHE_SIZE = 64  # distinct image shapes; multi-scale training meets a few dozen


class _TorchvisionAdapter(DetectorAdapter):
    """What FCOS and RetinaNet share: the transform inside the model, the backbone, and anchors on a grid."""

    def __init__(self, model: FCOS | RetinaNet) -> None:
        transform = model.transform
        super().__init__(
            model,
            image_mean=transform.image_mean,
            image_std=transform.image_std,
            size_divisible=transform.size_divisible,
        )
        self.model: FCOS | RetinaNet
        self._anchors: dict[tuple[tuple[GridLevel, ...], torch.device], Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_anchors": {}}  # megabytes that anyone can make again

    def preprocess(
        self, images: Sequence[Tensor] | Tensor, targets: Sequence[Target | None] = ()
    ) -> tuple[Batch, list[Target | None]]:
        """Resize as the model's own transform does, then pad; normalisation is left to `features`."""
        given = list(targets) or [None] * len(images)
        pairs = [
            self._resize(image, None if target is None else dict(target))
            for image, target in zip(images, given, strict=True)
        ]
        resized = [image for image, _ in pairs]
        sizes = tuple((image.shape[-2], image.shape[-1]) for image in resized)
        original_sizes = tuple((image.shape[-2], image.shape[-1]) for image in images)
        moved = [target for _, target in pairs] if targets else []
        return Batch(self.pad(resized), sizes, original_sizes), moved

    def _resize(self, image: Tensor, target: dict[str, Any] | None) -> tuple[Tensor, Any]:
        transform = self.model.transform
        if target is not None or transform.fixed_size is not None or isinstance(sum(image.shape[-2:]), int):
            ratio = min(transform.min_size[-1] / min(image.shape[-2:]), transform.max_size / max(image.shape[-2:]))
            if transform.fixed_size is None and min(image.shape[-2:]) * ratio < 1:
                return _resize_thin(image, target, ratio)
            return transform.resize(image, target)  # type: ignore[no-any-return]
        # A size that a tracer leaves open. torchvision compares it in Python, which would fix it; in float64 as there,
        # because in float32 some sizes come out a pixel off.
        h, w, short, long = (
            torch.full((), side, dtype=torch.float64)
            for side in (*image.shape[-2:], transform.min_size[-1], transform.max_size)
        )
        ratio = torch.minimum(short / torch.minimum(h, w), long / torch.maximum(h, w))
        size: list[Any] = [(side * ratio).floor().clamp(min=1).long().item() for side in (h, w)]
        return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0], None

    def features(self, batch: Batch) -> list[Tensor]:
        """Compute the feature pyramid with the model's backbone."""
        features = self.model.backbone(self.normalize(batch))
        return [features] if isinstance(features, Tensor) else list(features.values())

    def parts(self) -> dict[str, nn.Module]:
        """Name backbone, feature pyramid network and head; a backbone without an ``fpn`` keeps its neck."""
        backbone: nn.Module = self.model.backbone
        neck = getattr(backbone, "fpn", None)
        if not isinstance(neck, nn.Module):
            return {"backbone": backbone, "head": self.model.head}
        # Whatever stands beside the pyramid network: torchvision's body, somebody's stem and stages.
        rest = nn.ModuleDict({name: module for name, module in backbone.named_children() if module is not neck})
        return {"backbone": rest, "neck": neck, "head": self.model.head}

    @property
    def max_entry(self) -> int:  # type: ignore[override]  # read-only, because it follows from the head
        """Count the convolutions of the towers; 0 for a head that is not made of torchvision's two."""
        towers = [getattr(branch, "conv", None) for branch in self._branches().values()]
        if len(towers) != len(_BRANCHES) or not all(isinstance(tower, nn.Sequential) for tower in towers):
            return 0
        return min(len(_convolutions(tower)) for tower in towers)  # type: ignore[arg-type]  # checked above

    def head_stem(self, features: list[Tensor], k: int) -> dict[str, list[Tensor]]:
        """Run the first ``k`` convolutions of both towers, with norm and activation."""
        stems = {name: branch.conv[: _boundary(branch.conv, k)] for name, branch in self._branches().items()}
        return {name: [stem(x) for x in features] for name, stem in stems.items()}

    def head_rest(self, maps: dict[str, list[Tensor]], k: int, image_size: tuple[int, int]) -> DensePredictions:
        """Run the rest of both towers and all that follows."""
        outputs = {}
        for name, branch in self._branches().items():
            rest = copy.copy(branch)  # the head's own code and weights, on a shorter tower
            rest._modules = {**branch._modules, "conv": branch.conv[_boundary(branch.conv, k) :]}
            outputs[name] = rest.forward(maps[name])  # not called: what was compiled or hooked is the whole branch
        return self._decode(self._gathered(outputs), next(iter(maps.values())), image_size)

    def _branches(self) -> dict[str, Any]:
        """The two halves of the head that have a tower of their own."""
        return {name: half for name in _BRANCHES if (half := getattr(self.model.head, f"{name}_head", None))}

    @abstractmethod
    def _gathered(self, outputs: dict[str, Any]) -> dict[str, Tensor]:
        """Name the outputs of both branches as the head itself names them."""

    @abstractmethod
    def _decode(
        self, output: dict[str, Tensor], features: list[Tensor], image_size: tuple[int, int]
    ) -> DensePredictions:
        """Decode the outputs of the head; only the sizes of ``features`` count."""

    def _grid(self, features: list[Tensor], image_size: tuple[int, int]) -> tuple[GridLevel, ...]:
        """Build the grids of torchvision's anchors: first point at 0, steps of image size // map size on each axis."""
        image_height, image_width = image_size
        levels = []
        for feature, size, anchors in zip(
            features,
            self.model.anchor_generator.sizes,
            self.model.anchor_generator.num_anchors_per_location(),
            strict=True,
        ):
            height, width = feature.shape[-2:]
            step: tuple[Any, Any] = (torch.sym_float(image_width // width), torch.sym_float(image_height // height))
            levels.append(GridLevel(height, width, self._stride(step, size), step, (0.0, 0.0), anchors))
        return tuple(levels)

    def _stride(self, step: tuple[float, float], anchor_sizes: Sequence[float]) -> float:
        return max(step)

    def _anchor_boxes(self, levels: tuple[GridLevel, ...], device: torch.device) -> Tensor:
        """Anchors ``(A, 4)`` in float32; torchvision would make them in the dtype of the features, even bfloat16."""
        key = (levels, device)
        anchors = None if torch.compiler.is_compiling() else self._anchors.get(key)  # traced sizes have no hash
        if anchors is None:
            with torch.inference_mode(False), torch.no_grad():  # a cached inference tensor could not be trained with
                generator = self.model.anchor_generator
                anchors = torch.cat(
                    [
                        level.points(device).repeat(1, 2)
                        + generator.generate_anchors(sizes, ratios, device=device).repeat(level.height * level.width, 1)
                        for level, sizes, ratios in zip(levels, generator.sizes, generator.aspect_ratios, strict=True)
                    ]
                )
            if not torch.compiler.is_compiling():
                if len(self._anchors) >= _ANCHOR_CACHE_SIZE:
                    self._anchors.clear()
                self._anchors[key] = anchors
        return anchors


class FCOSAdapter(_TorchvisionAdapter):
    """torchvision's FCOS. Its centerness is `DensePredictions.quality`; one-to-one training does not use it."""

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        """Run the head and decode its distances, in float32 at least."""
        return self._decode(self.model.head(features), features, image_size)

    def _decode(
        self, output: dict[str, Tensor], features: list[Tensor], image_size: tuple[int, int]
    ) -> DensePredictions:
        levels = self._grid(features, image_size)
        distances = at_least_float32(output["bbox_regression"])
        boxes = self.model.box_coder.decode(distances, self._anchor_boxes(levels, distances.device))
        return DensePredictions.on_grid(output["cls_logits"], boxes, levels, output["bbox_ctrness"].squeeze(-1))

    def _gathered(self, outputs: dict[str, Any]) -> dict[str, Tensor]:
        sides, centerness = outputs["regression"]
        return {"cls_logits": outputs["classification"], "bbox_regression": sides, "bbox_ctrness": centerness}

    def unused_parameters(self) -> Iterable[nn.Parameter]:
        """List the centerness convolution, if the head is torchvision's: one-to-one, the class alone is the score."""
        branch = getattr(getattr(self.model.head, "regression_head", None), "bbox_ctrness", None)
        return branch.parameters() if isinstance(branch, nn.Module) else ()

    def _stride(self, step: tuple[float, float], anchor_sizes: Sequence[float]) -> float:
        return float(anchor_sizes[0])  # FCOS's anchors are as large as the stride, and its radius counts in them


class RetinaNetAdapter(_TorchvisionAdapter):
    """torchvision's RetinaNet: several anchors at each grid point, no quality branch."""

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        """Run the head and decode its anchor offsets, in float32 at least."""
        return self._decode(self.model.head(features), features, image_size)

    def _decode(
        self, output: dict[str, Tensor], features: list[Tensor], image_size: tuple[int, int]
    ) -> DensePredictions:
        levels = self._grid(features, image_size)
        offsets = at_least_float32(output["bbox_regression"])
        # torchvision's box coder computes the same, but makes the host wait for the device.
        anchors = self._anchor_boxes(levels, offsets.device).to(offsets.dtype)
        boxes = boxes_from_anchors(anchors, offsets, self.model.box_coder.weights)
        return DensePredictions.on_grid(output["cls_logits"], boxes, levels)

    def _gathered(self, outputs: dict[str, Any]) -> dict[str, Tensor]:
        return {"cls_logits": outputs["classification"], "bbox_regression": outputs["regression"]}


def _resize_thin(image: Tensor, target: dict[str, Any] | None, ratio: float) -> tuple[Tensor, Any]:
    """Resize an image whose shorter side would vanish, which torchvision refuses: it gets one pixel."""
    height, width = image.shape[-2:]
    size = (max(1, math.floor(height * ratio)), max(1, math.floor(width * ratio)))
    resized = F.interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
    if target is None:
        return resized, None
    return resized, {**target, "boxes": scale(target["boxes"], (height, width), size)}


def _convolutions(tower: nn.Sequential) -> list[int]:
    """Where in a tower its convolutions begin; norm and activation follow each, or stand in one block with it."""
    return [i for i, layer in enumerate(tower) if any(isinstance(part, nn.Conv2d) for part in layer.modules())]


def _boundary(tower: nn.Sequential, k: int) -> int:
    """Where the first ``k`` convolutions of a tower end."""
    starts = [*_convolutions(tower), len(tower)]
    return starts[k] if k > 0 else 0
