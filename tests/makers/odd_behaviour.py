"""More ways to wrap the detector of `odd_detectors` wrongly: what shows only in how it behaves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crosskd_assign import DensePredictions
from crosskd_assign.structures import Batch, Detection, Target
from tests.makers.odd_detectors import Good


class RawWhileTraining(Good):
    def decode(self, raw: Tensor, points: Tensor, strides: Tensor, image_size: tuple[int, int]) -> Tensor:
        return raw if self.training else super().decode(raw, points, strides, image_size)


class AnotherTypeWhileTraining(Good):
    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> Any:
        p = super().head(features, image_size)
        return (p.logits, p.boxes) if self.training else p


class BoxesDetached(Good):
    def decode(self, raw: Tensor, points: Tensor, strides: Tensor, image_size: tuple[int, int]) -> Tensor:
        return super().decode(raw.detach(), points, strides, image_size)


class Remembers(Good):
    """The head reads the last maps that features() made, as modules with an attribute for them do."""

    last: list[Tensor]

    def features(self, batch: Batch) -> list[Tensor]:
        self.last = super().features(batch)
        return self.last

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        mixed = [
            x + 0.5 * last[: len(x)] if x.shape[1:] == last.shape[1:] else x
            for x, last in zip(features, self.last, strict=True)
        ]
        return super().head(mixed, image_size)


class Random(Good):
    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        return super().head([x + 0.1 * torch.randn_like(x) for x in features], image_size)


class ImagesMixed(Good):
    """Reshapes images into one another."""

    def rows(self, maps: list[Tensor], channels: int) -> list[Tensor]:
        return [x - x.mean(dim=0, keepdim=True) for x in super().rows(maps, channels)]


class AlwaysTraining(Good):
    """Batch norm uses statistics of the batch, in evaluation mode too."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.training = True
        return self


class SplitWrongly(Good):
    max_entry = 1

    def head_stem(self, features: list[Tensor], k: int) -> dict[str, list[Tensor]]:
        return {"tower": [self.model.tower(x) for x in features]}

    def head_rest(self, maps: dict[str, list[Tensor]], k: int, image_size: tuple[int, int]) -> DensePredictions:
        return self.head(maps["tower"], image_size)  # runs the tower again


class ScalesBoxesInPlace(Good):
    """Edits the caller's boxes; here by a shift, lest other checks complain of where they are."""

    def preprocess(self, images: Any, targets: Sequence[Target | None] = ()) -> Any:
        batch, moved = super().preprocess(images, targets)
        for target in moved:
            target["boxes"] += 0.25  # type: ignore[index]
        return batch, moved


class NoListWithoutTargets(Good):
    def preprocess(self, images: Any, targets: Sequence[Target | None] = ()) -> Any:
        batch, moved = super().preprocess(images, targets)
        return batch, moved or None


class UnusedBranch(Good):
    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        model.auxiliary = nn.Conv2d(4, 4, 1)


class UsedDeclaredUnused(Good):
    def unused_parameters(self) -> Iterable[nn.Parameter]:
        return self.model.sides.parameters()


class ForeignUnused(Good):
    def unused_parameters(self) -> Iterable[nn.Parameter]:
        return nn.Linear(1, 1).parameters()


class PartsInAList(Good):
    def parts(self) -> Any:
        return [self.model.body]


class PartsOfOtherNames(Good):
    def parts(self) -> dict[str, nn.Module]:
        return {**super().parts(), "trunk": self.model.body}


class PartsOfAnother(Good):
    def parts(self) -> dict[str, nn.Module]:
        return {**super().parts(), "neck": nn.Conv2d(1, 1, 1)}


class EmptyPart(Good):
    def parts(self) -> dict[str, nn.Module]:
        return {**super().parts(), "neck": nn.Identity()}


class PartsSwapped(Good):
    """Calls the head's tower the neck."""

    def parts(self) -> dict[str, nn.Module]:
        return {**super().parts(), "neck": self.model.tower}


class PartsInTheHead(Good):
    """Calls a stage of the backbone the head."""

    def parts(self) -> dict[str, nn.Module]:
        return {**super().parts(), "head": self.model.body[2]}


class NoNeck(Good):
    """Allowed."""

    def parts(self) -> dict[str, nn.Module]:
        return {"backbone": self.model.body}


class KeepsGraph(Good):
    """Keeps what it saw last, with its graph; torch copies no such tensor."""

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        self.seen = [x * 1 for x in features] if features[0].requires_grad else getattr(self, "seen", None)
        return super().head(features, image_size)


class RunsAnother(Good):
    """Reaches its network through a variable outside."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self.run = lambda x: model.maps(x)  # type: ignore[operator]  # noqa: PLW0108  # a bound method would be copied

    def features(self, batch: Batch) -> list[Tensor]:
        return self.run(self.normalize(batch))  # type: ignore[no-any-return]


class FixedType(Good):
    def rows(self, maps: list[Tensor], channels: int) -> list[Tensor]:
        return [x @ torch.eye(channels) for x in super().rows(maps, channels)]


class EditsMaps(Good):
    """Allowed."""

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        return super().head([x.relu_() for x in features], image_size)


class Raises(Good):
    """Fails in the method it is told to."""

    where: str = ""

    def _maybe(self, name: str) -> None:
        if name == self.where:
            raise ZeroDivisionError(f"{name} is broken\nwith a second line")

    def preprocess(self, images: Any, targets: Sequence[Target | None] = ()) -> Any:
        self._maybe("preprocess")
        return super().preprocess(images, targets)

    def features(self, batch: Batch) -> list[Tensor]:
        self._maybe("features")
        return super().features(batch)

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        self._maybe("head")
        return super().head(features, image_size)

    def restore(self, detections: list[Detection], batch: Batch) -> list[Detection]:
        self._maybe("restore")
        return super().restore(detections, batch)

    def parts(self) -> dict[str, nn.Module]:
        self._maybe("parts")
        return super().parts()

    def unused_parameters(self) -> Iterable[nn.Parameter]:
        self._maybe("unused_parameters")
        return super().unused_parameters()
