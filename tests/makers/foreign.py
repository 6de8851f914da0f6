"""Detectors in the style of other code bases, and how they are wrapped: rightly, and as they are wrapped by mistake.

Nothing of these code bases is here; what is theirs is the habit: how heads start, what they multiply, what they expect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

from crosskd_assign import DensePredictions, DetectorAdapter, GridLevel, ResizingAdapter, adapt, functional
from crosskd_assign.structures import Batch
from tests.makers.small_models import SmallBackbone

CLASSES = 3
PRIOR = -math.log((1 - 0.01) / 0.01)  # the score that fresh heads begin with is 0.01


class Body(nn.Module):
    """Maps of stride 8, 16, 32 and so on, and a neck that adds the coarse ones to the fine ones."""

    def __init__(self, levels: int, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, 4, 1), nn.BatchNorm2d(channels), nn.SiLU())
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.SiLU())
            for _ in range(levels)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in range(levels))

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.stem(x), []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            maps.append(lateral(x))
        for i in range(len(maps) - 1, 0, -1):
            maps[i - 1] = maps[i - 1] + F.interpolate(maps[i], size=maps[i - 1].shape[-2:])
        return maps


class Foreign(DetectorAdapter):
    """Maps come from ``model.body``; each class below has a head of its own."""

    model: Any

    def features(self, batch: Batch) -> list[Tensor]:
        return self.model.body(self.normalize(batch))  # type: ignore[no-any-return]


def flat(maps: Sequence[Tensor]) -> Tensor:
    """``(N, C, H, W)`` each to ``(N, A, C)``."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)


def grid(maps: Sequence[Tensor]) -> list[GridLevel]:
    return [GridLevel.of(x, 8 * 2**i) for i, x in enumerate(maps)]


def network(levels: int = 3, **modules: nn.Module) -> nn.Module:
    model = nn.Module()
    model.body = Body(levels)
    for name, module in modules.items():
        setattr(model, name, module)
    return model


# --- YOLOX: class times objectness ------------------------------------------------------------------------------------


def yolox_network(classes: int = CLASSES, prior: float = PRIOR) -> nn.Module:
    def tower() -> nn.Module:
        return nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU())

    outputs = {"cls": nn.Conv2d(16, classes, 1), "obj": nn.Conv2d(16, 1, 1), "reg": nn.Conv2d(16, 4, 1)}
    for name in ("cls", "obj"):
        nn.init.constant_(outputs[name].bias, prior)  # type: ignore[arg-type]
    return network(classes_tower=tower(), boxes_tower=tower(), **outputs)


class YOLOX(Foreign):
    """Pixels come as in 0…255, without normalisation: 255 times those in 0…1, in BGR."""

    def features(self, batch: Batch) -> list[Tensor]:
        return self.model.body(255 * self.normalize(batch).flip(1))  # type: ignore[no-any-return]

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        classes = flat([self.model.cls(self.model.classes_tower(x)) for x in features])
        towers = [self.model.boxes_tower(x) for x in features]
        objectness, code = flat([self.model.obj(x) for x in towers]), flat([self.model.reg(x) for x in towers])
        centers = torch.cat([code[..., :2] - 0.5, code[..., 2:].clamp(max=5).exp()], dim=-1)
        return self.scored(classes, objectness, centers, grid(features))

    def scored(
        self, classes: Tensor, objectness: Tensor, centers: Tensor, levels: Sequence[GridLevel]
    ) -> DensePredictions:
        return DensePredictions.from_centers(functional.product_logits(classes, objectness), centers, levels)


class ObjectnessAsQuality(YOLOX):
    """The mistake: class and objectness side by side."""

    def scored(
        self, classes: Tensor, objectness: Tensor, centers: Tensor, levels: Sequence[GridLevel]
    ) -> DensePredictions:
        return DensePredictions.from_centers(classes, centers, levels, quality=objectness[..., 0])


# --- YOLOv6, NanoDet-Plus, RetinaNet: outputs that are zero or tiny when fresh ----------------------------------------


def yolov6_network(classes: int = CLASSES, bins: int = 17) -> nn.Module:
    """Output convolutions are zero: every point predicts what the biases say."""
    outputs = {"cls": nn.Conv2d(16, classes, 1), "reg": nn.Conv2d(16, 4 * bins, 1)}
    for module, bias in zip(outputs.values(), (PRIOR, 1.0), strict=True):
        nn.init.zeros_(module.weight)
        nn.init.constant_(module.bias, bias)  # type: ignore[arg-type]
    return network(stem=nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.SiLU()), **outputs)


class YOLOv6(Foreign):
    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        stems = [self.model.stem(x) for x in features]
        bins = flat([self.model.reg(x) for x in stems])
        logits = flat([self.model.cls(x) for x in stems])
        return DensePredictions.from_bins(logits, bins.unflatten(2, (4, -1)), grid(features))


def nanodet_plus_network(classes: int = CLASSES, bins: int = 8) -> nn.Module:
    """Four levels up to stride 64, and one convolution for classes and bins, with weights of 0.01."""
    output = nn.Conv2d(16, classes + 4 * bins, 1)
    nn.init.normal_(output.weight, std=0.01)
    nn.init.constant_(output.bias, PRIOR)  # type: ignore[arg-type]
    tower = nn.Sequential(nn.Conv2d(16, 16, 5, padding=2, groups=16), nn.BatchNorm2d(16), nn.LeakyReLU(0.1))
    for norm in (tower[1],):
        nn.init.normal_(norm.weight, std=0.01)  # type: ignore[arg-type]  # as its init_weights has it
    return network(4, tower=tower, output=output)


class NanoDetPlus(Foreign):
    """Pixels come as BGR in 0…255 with numbers of that range, which the adapter divides by 255."""

    def features(self, batch: Batch) -> list[Tensor]:
        return self.model.body(self.normalize(batch).flip(1))  # type: ignore[no-any-return]

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        out = flat([self.model.output(self.model.tower(x)) for x in features])
        return DensePredictions.from_bins(out[..., :CLASSES], out[..., CLASSES:].unflatten(2, (4, -1)), grid(features))


BGR = {"mean": (103.53, 116.28, 123.675), "std": (57.375, 57.12, 58.395)}
RGB_OF_BGR: dict[str, Any] = {
    "image_mean": [x / 255 for x in reversed(BGR["mean"])],
    "image_std": [x / 255 for x in reversed(BGR["std"])],
}


def fresh_retinanet() -> DetectorAdapter:
    """A RetinaNet as torchvision builds it, four convolutions of 0.01 a tower; nobody has livened it up."""
    anchors = AnchorGenerator(tuple((s,) for s in (32, 64, 128, 256, 512)), ((0.5, 1.0, 2.0),) * 5)
    model = RetinaNet(SmallBackbone(), CLASSES, anchor_generator=anchors, min_size=64, max_size=160)
    return adapt(model)


# --- inputs of a fixed size -------------------------------------------------------------------------------------------


def fixed_network(size: int) -> nn.Module:
    """Learns what is where: a table of positions, so that maps have one size alone."""
    model = network(2, output=nn.Conv2d(16, CLASSES + 4, 3, padding=1))
    model.places = nn.Parameter(0.1 * torch.randn(1, 16, size // 8, size // 8))
    return model


class FixedSize(ResizingAdapter):
    def features(self, batch: Batch) -> list[Tensor]:
        fine, coarse = self.model.body(self.normalize(batch))
        return [fine + self.model.places, coarse]

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        out = flat([self.model.output(x) for x in features])
        return DensePredictions.from_sides(out[..., :-4], out[..., -4:].clamp(max=4).exp(), grid(features))


class Own255(FixedSize):
    """Has mean and standard deviation for 0…255, and brings pixels to that range itself."""

    def features(self, batch: Batch) -> list[Tensor]:
        fine, coarse = self.model.body((255 * batch.images - self.image_mean) / self.image_std)
        return [fine + self.model.places, coarse]


# --- one grid, and heads that leave something out or too much in ------------------------------------------------------


class Plain(Foreign):
    """Five levels up to stride 128, points in the middle of cells, stride 128 also where the padded side is 160."""

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        out = flat([self.model.output(x) for x in features])
        logits, sides = self.scores(out[..., :-4]), out[..., -4:].clamp(max=4).exp()
        return self.made(DensePredictions.from_sides(logits, sides, grid(features)))

    def scores(self, out: Tensor) -> Tensor:
        return out

    def made(self, predictions: DensePredictions) -> DensePredictions:
        return predictions


class SigmoidInTheHead(Plain):
    def scores(self, out: Tensor) -> Tensor:
        return out.sigmoid()


class SoftmaxInTheHead(Plain):
    """Softmax over classes and background, which is the last channel."""

    def scores(self, out: Tensor) -> Tensor:
        return out.softmax(dim=-1)[..., :-1]


class LogSoftmaxInTheHead(Plain):
    def scores(self, out: Tensor) -> Tensor:
        return out.log_softmax(dim=-1)


class ByHand(Plain):
    """Builds the record itself, without levels."""

    def made(self, predictions: DensePredictions) -> DensePredictions:
        return replace(predictions, levels=None)


class OtherwiseInExport(Plain):
    """Leaves out what its export script does not want."""

    def scores(self, out: Tensor) -> Tensor:
        return out.sigmoid() if torch.onnx.is_in_onnx_export() else out


class SizesByLen(Plain):
    """Splits and counts with ``len(level)``, a Python number."""

    def made(self, predictions: DensePredictions) -> DensePredictions:
        counts = [len(level) for level in predictions.levels or ()]
        return replace(predictions, logits=torch.cat(predictions.logits.split(counts, dim=1), dim=1))


def plain_network(levels: int = 5, classes: int = CLASSES) -> nn.Module:
    return network(levels, output=nn.Conv2d(16, classes + 4, 3, padding=1))


def seeded(make: Any, *arguments: Any, **options: Any) -> Any:
    """Build with reproducible weights; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*arguments, **options)


ImageNet: dict[str, Any] = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}

# Everything that trains: built fresh, as a user does before the first step.
RIGHT: dict[str, Any] = {
    "YOLOX": lambda: YOLOX(yolox_network()),
    "YOLOX of bias 0": lambda: YOLOX(yolox_network(prior=0.0)),
    "YOLOv6": lambda: YOLOv6(yolov6_network()),
    "NanoDet-Plus": lambda: NanoDetPlus(nanodet_plus_network(), size_divisible=64, **RGB_OF_BGR),
    "RetinaNet": fresh_retinanet,
    "five levels": lambda: Plain(plain_network(), **ImageNet),
    "five levels, padded to 32": lambda: Plain(plain_network(), size_divisible=32, **ImageNet),
    "built by hand": lambda: ByHand(plain_network(3), **ImageNet),
    "integer mean": lambda: Plain(plain_network(3), image_mean=(0, 0, 0), image_std=(1, 1, 1)),
    "integer mean of 1": lambda: Plain(plain_network(3), image_mean=(1, 1, 1), image_std=(2, 2, 2)),
    "fixed 320": lambda: FixedSize(fixed_network(320), size=320, fit="letterbox", **ImageNet),
    "fixed 640": lambda: FixedSize(fixed_network(640), size=640, fit="stretch", **ImageNet),
    "fixed 128": lambda: FixedSize(fixed_network(128), size=128, fit="stretch", **ImageNet),
    "mean of 0…255, multiplied": lambda: Own255(
        fixed_network(128), size=128, fit="letterbox", image_mean=BGR["mean"], image_std=BGR["std"]
    ),
    "otherwise in export": lambda: OtherwiseInExport(plain_network(3), **ImageNet),
    "sizes by len": lambda: SizesByLen(plain_network(3), **ImageNet),
}
