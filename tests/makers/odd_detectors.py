"""One small detector with two predictions a point, and many ways to wrap it wrongly; each class makes one mistake."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosskd_assign import DensePredictions, DetectorAdapter, GridLevel
from crosskd_assign.structures import Batch, Detection

CLASSES = 3
ANCHORS = 2


class Net(nn.Module):
    """Three levels of stride 8, 16 and 32, one head for all of them, and a batch norm that has something to lose."""

    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, channels, k, stride=s, padding=p), nn.BatchNorm2d(channels))
            for i, k, s, p in [(3, 8, 8, 0), (channels, 3, 2, 1), (channels, 3, 2, 1)]
        )
        self.tower = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.SiLU())
        self.classes = nn.Conv2d(channels, ANCHORS * CLASSES, 3, padding=1)
        self.sides = nn.Conv2d(channels, ANCHORS * 4, 3, padding=1)

    def maps(self, x: Tensor) -> list[Tensor]:
        found = []
        for stage in self.body:
            x = stage(x)
            found.append(x)
            x = x.tanh()
        return found


class Good(DetectorAdapter):
    """As it should be. What is broken below overrides one of these methods."""

    model: Net

    def features(self, batch: Batch) -> list[Tensor]:
        return self.model.maps(self.normalize(batch))

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        levels = self.levels(features)
        towers = self.towers(features)
        logits = torch.cat(self.rows([self.model.classes(t) for t in towers], CLASSES), dim=1)
        raw = torch.cat(self.rows([self.model.sides(t) for t in towers], 4), dim=1)
        points = torch.cat([level.points(raw.device) for level in levels])
        strides = torch.cat([points.new_full((len(level), 1), level.stride) for level in levels])
        return self.predictions(logits, self.decode(raw, points, strides, image_size), levels)

    def towers(self, features: list[Tensor]) -> list[Tensor]:
        return [self.model.tower(x) for x in features]

    def levels(self, features: list[Tensor]) -> list[GridLevel]:
        return [GridLevel.of(x, 8 * 2**i, anchors=ANCHORS) for i, x in enumerate(features)]

    def rows(self, maps: list[Tensor], channels: int) -> list[Tensor]:
        """``(N, anchors · channels, H, W)`` to ``(N, H · W · anchors, channels)``."""
        return [x.unflatten(1, (ANCHORS, channels)).permute(0, 3, 4, 1, 2).reshape(len(x), -1, channels) for x in maps]

    def decode(self, raw: Tensor, points: Tensor, strides: Tensor, image_size: tuple[int, int]) -> Tensor:
        sides = self.sides(raw, strides)
        return torch.cat([points - sides[..., :2], points + sides[..., 2:]], dim=-1)

    def sides(self, raw: Tensor, strides: Tensor) -> Tensor:
        return raw.float().clamp(max=3).exp() * strides if raw.dtype != torch.float64 else raw.exp() * strides

    def predictions(self, logits: Tensor, boxes: Tensor, levels: Sequence[GridLevel]) -> DensePredictions:
        return DensePredictions.on_grid(logits, boxes, levels)

    def parts(self) -> dict[str, nn.Module]:
        head = nn.ModuleList([self.model.tower, self.model.classes, self.model.sides])
        return {"backbone": self.model.body[:1], "neck": self.model.body[1:], "head": head}


MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def build(kind: type[Good] = Good, seed: int = 0, **options: Any) -> Good:
    """An adapter with reproducible weights; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(Net(), **{"image_mean": MEAN, "image_std": STD, **options})


# --- features and images ----------------------------------------------------------------------------------------------


class DictOfMaps(Good):
    def features(self, batch: Batch) -> Any:
        return {str(i): x for i, x in enumerate(super().features(batch))}


class NoGraph(Good):
    @torch.no_grad()
    def features(self, batch: Batch) -> list[Tensor]:
        return super().features(batch)


class OneMapDetached(Good):
    def features(self, batch: Batch) -> list[Tensor]:
        first, *others = super().features(batch)
        return [first.detach(), *others]


class NotNormalised(Good):
    def features(self, batch: Batch) -> list[Tensor]:
        return self.model.maps(batch.images)


class NormalisedInPlace(Good):
    def features(self, batch: Batch) -> list[Tensor]:
        return self.model.maps(batch.images.sub_(self.image_mean).div_(self.image_std))


class NormalisedTwice(Good):
    def preprocess(self, images: Any, targets: Any = ()) -> Any:
        batch, moved = super().preprocess(images, targets)
        return replace(batch, images=(batch.images - self.image_mean) / self.image_std), moved


class SameStrideTwice(Good):
    def features(self, batch: Batch) -> list[Tensor]:
        first, *others = super().features(batch)
        return [first, first, *others]


class TransposedMaps(Good):
    def features(self, batch: Batch) -> list[Tensor]:
        return [x.transpose(2, 3) for x in super().features(batch)]


class MirroredImages(Good):
    def features(self, batch: Batch) -> list[Tensor]:
        return super().features(replace(batch, images=batch.images.flip(3)))


class ResizedWithoutBoxes(Good):
    def preprocess(self, images: Any, targets: Any = ()) -> Any:
        resized = [F.interpolate(x[None], scale_factor=2, mode="nearest")[0] for x in images]
        batch, _ = super().preprocess(resized)
        return replace(batch, original_sizes=tuple((x.shape[-2], x.shape[-1]) for x in images)), list(targets)


class NeverRestored(Good):
    """Doubles images and boxes, and forgets to halve the detections."""

    def preprocess(self, images: Any, targets: Any = ()) -> Any:
        resized = [F.interpolate(x[None], scale_factor=2, mode="nearest")[0] for x in images]
        moved: Any = [{**t, "boxes": 2 * t["boxes"]} for t in targets]
        batch, moved = super().preprocess(resized, moved)
        return replace(batch, original_sizes=tuple((x.shape[-2], x.shape[-1]) for x in images)), moved

    def restore(self, detections: list[Detection], batch: Batch) -> list[Detection]:
        return detections


class LabelsFromZero(Good):
    """A channel short of the labels of its data."""

    def predictions(self, logits: Tensor, boxes: Tensor, levels: Sequence[GridLevel]) -> DensePredictions:
        return super().predictions(logits[..., 1:], boxes, levels)


class OddSizesFail(Good):
    """Adds the coarse map to the fine one, which fits only where 32 divides the image."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **{**options, "size_divisible": 1})

    def features(self, batch: Batch) -> list[Tensor]:
        fine, middle, coarse = super().features(batch)
        return [fine + F.interpolate(coarse, scale_factor=4), middle, coarse]


# --- predictions ------------------------------------------------------------------------------------------------------


class LostPoints(Good):
    def predictions(self, logits: Tensor, boxes: Tensor, levels: Sequence[GridLevel]) -> DensePredictions:
        return replace(super().predictions(logits, boxes, levels), boxes=boxes[:, :-1])


class PlainTuple(Good):
    def predictions(self, logits: Tensor, boxes: Tensor, levels: Sequence[GridLevel]) -> Any:
        return logits, boxes


class NotANumber(Good):
    def sides(self, raw: Tensor, strides: Tensor) -> Tensor:
        return raw.log() * strides


class PointsInCells(Good):
    """Points count cells instead of pixels; boxes are right."""

    def predictions(self, logits: Tensor, boxes: Tensor, levels: Sequence[GridLevel]) -> DensePredictions:
        p = super().predictions(logits, boxes, levels)
        return replace(p, points=p.points / p.strides[:, None] - 0.5, levels=None)


class StridesInCells(Good):
    def predictions(self, logits: Tensor, boxes: Tensor, levels: Sequence[GridLevel]) -> DensePredictions:
        p = super().predictions(logits, boxes, levels)
        return replace(p, strides=torch.ones_like(p.strides), levels=None)


class PointsOfOtherLevels(Good):
    """The grids say one thing and the points another."""

    def predictions(self, logits: Tensor, boxes: Tensor, levels: Sequence[GridLevel]) -> DensePredictions:
        p = super().predictions(logits, boxes, levels)
        return replace(p, points=p.points + 3)


class LogitsBackwards(Good):
    """Logits from coarse to fine, all else from fine to coarse."""

    def rows(self, maps: list[Tensor], channels: int) -> list[Tensor]:
        found = super().rows(maps, channels)
        return found[::-1] if channels == CLASSES else found


class ColumnByColumn(Good):
    def rows(self, maps: list[Tensor], channels: int) -> list[Tensor]:
        return super().rows([x.transpose(2, 3) for x in maps], channels)


class LogitsColumnByColumn(Good):
    def rows(self, maps: list[Tensor], channels: int) -> list[Tensor]:
        return super().rows([x.transpose(2, 3) if channels == CLASSES else x for x in maps], channels)


class BottomUp(Good):
    def rows(self, maps: list[Tensor], channels: int) -> list[Tensor]:
        return super().rows([x.flip(2) for x in maps], channels)


class AnchorByAnchor(Good):
    def rows(self, maps: list[Tensor], channels: int) -> list[Tensor]:
        return [x.unflatten(1, (ANCHORS, channels)).permute(0, 1, 3, 4, 2).reshape(len(x), -1, channels) for x in maps]


class Shuffled(Good):
    def rows(self, maps: list[Tensor], channels: int) -> list[Tensor]:
        order = [
            torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0)) for x in super().rows(maps, channels)
        ]
        return [x[:, o] for x, o in zip(super().rows(maps, channels), order, strict=True)]


class IgnoresItsMaps(Good):
    """Runs the whole network on an image of its own."""

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        images = torch.rand(len(features[0]), 3, *image_size, generator=torch.Generator().manual_seed(0))
        return super().head(self.model.maps(images.to(features[0])), image_size)


# --- boxes ------------------------------------------------------------------------------------------------------------


class BoxesInStrides(Good):
    def decode(self, raw: Tensor, points: Tensor, strides: Tensor, image_size: tuple[int, int]) -> Tensor:
        return super().decode(raw, points, strides, image_size) / strides


class BoxesInFractions(Good):
    def decode(self, raw: Tensor, points: Tensor, strides: Tensor, image_size: tuple[int, int]) -> Tensor:
        height, width = image_size
        return super().decode(raw, points, strides, image_size) / raw.new_tensor([width, height, width, height])


class CentreAndSize(Good):
    def decode(self, raw: Tensor, points: Tensor, strides: Tensor, image_size: tuple[int, int]) -> Tensor:
        b = super().decode(raw, points, strides, image_size)
        return torch.cat([(b[..., :2] + b[..., 2:]) / 2, b[..., 2:] - b[..., :2]], dim=-1)


class CornerAndSize(Good):
    def decode(self, raw: Tensor, points: Tensor, strides: Tensor, image_size: tuple[int, int]) -> Tensor:
        b = super().decode(raw, points, strides, image_size)
        return torch.cat([b[..., :2], b[..., 2:] - b[..., :2]], dim=-1)


class RowsFirst(Good):
    def decode(self, raw: Tensor, points: Tensor, strides: Tensor, image_size: tuple[int, int]) -> Tensor:
        return super().decode(raw, points, strides, image_size)[..., [1, 0, 3, 2]]


class OffsetsOnly(Good):
    def decode(self, raw: Tensor, points: Tensor, strides: Tensor, image_size: tuple[int, int]) -> Tensor:
        return super().decode(raw, torch.zeros_like(points), strides, image_size)


class NegativeSides(Good):
    def sides(self, raw: Tensor, strides: Tensor) -> Tensor:
        return raw * strides


class SidesInPixels(Good):
    """Forgets the strides of the sides; a note, because a head may mean pixels."""

    def sides(self, raw: Tensor, strides: Tensor) -> Tensor:
        return 16 * super().sides(raw, strides) / strides
