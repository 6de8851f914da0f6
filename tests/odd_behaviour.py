"""More ways to wrap the detector of `odd_detectors` wrongly: what shows only in how it behaves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from crosskd_assign import Batch, DensePredictions, Detection, Target
from tests.odd_detectors import Good


class RawWhileTraining(Good):
    def decode(self, raw: Tensor, points: Tensor, strides: Tensor, batch: Batch) -> Tensor:
        return raw if self.training else super().decode(raw, points, strides, batch)


class AnotherTypeWhileTraining(Good):
    def head(self, features: list[Tensor], batch: Batch) -> Any:
        p = super().head(features, batch)
        return (p.logits, p.boxes) if self.training else p


class BoxesDetached(Good):
    def decode(self, raw: Tensor, points: Tensor, strides: Tensor, batch: Batch) -> Tensor:
        return super().decode(raw.detach(), points, strides, batch)


class Remembers(Good):
    """The head reads the last maps that features() made, as modules with an attribute for them do."""

    last: list[Tensor]

    def features(self, batch: Batch) -> list[Tensor]:
        self.last = super().features(batch)
        return self.last

    def head(self, features: list[Tensor], batch: Batch) -> DensePredictions:
        mixed = [
            x + 0.5 * last[: len(x)] if x.shape[1:] == last.shape[1:] else x
            for x, last in zip(features, self.last, strict=True)
        ]
        return super().head(mixed, batch)


class Random(Good):
    def head(self, features: list[Tensor], batch: Batch) -> DensePredictions:
        return super().head([x + 0.1 * torch.randn_like(x) for x in features], batch)


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

    def head_rest(self, maps: dict[str, list[Tensor]], k: int, batch: Batch) -> DensePredictions:
        return self.head(maps["tower"], batch)  # runs the tower again


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


class EmptyTrunk(Good):
    def trunk(self) -> nn.Module:
        return nn.Identity()


class OtherTrunk(Good):
    def trunk(self) -> nn.Module:
        return nn.Conv2d(1, 1, 1)


class KeepsGraph(Good):
    """Keeps what it saw last, with its graph; torch copies no such tensor."""

    def head(self, features: list[Tensor], batch: Batch) -> DensePredictions:
        self.seen = [x * 1 for x in features] if features[0].requires_grad else getattr(self, "seen", None)
        return super().head(features, batch)


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


class NoAutocast(Good):
    def head(self, features: list[Tensor], batch: Batch) -> DensePredictions:
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("no kernel for bfloat16")
        return super().head(features, batch)


class Locked(Good):
    """Cannot be pickled."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        self.function = lambda x: x


class EditsMaps(Good):
    """Allowed."""

    def head(self, features: list[Tensor], batch: Batch) -> DensePredictions:
        return super().head([x.relu_() for x in features], batch)


class Raises(Good):
    """Fails in the method it is told to."""

    where: str = ""

    def _maybe(self, name: str) -> None:
        if name == self.where:
            raise ZeroDivisionError(f"{name} is broken\nwith a second line")

    def preprocess(self, images: Any, targets: Sequence[Target] | None = None) -> Any:
        self._maybe("preprocess")
        return super().preprocess(images, targets)

    def features(self, batch: Batch) -> list[Tensor]:
        self._maybe("features")
        return super().features(batch)

    def head(self, features: list[Tensor], batch: Batch) -> DensePredictions:
        self._maybe("head")
        return super().head(features, batch)

    def restore(self, detections: list[Detection], batch: Batch) -> list[Detection]:
        self._maybe("restore")
        return super().restore(detections, batch)

    def pyramid(self) -> Any:
        self._maybe("pyramid")
        return super().pyramid()

    def trunk(self) -> nn.Module:
        self._maybe("trunk")
        return super().trunk()

    def unused_parameters(self) -> Iterable[nn.Parameter]:
        self._maybe("unused_parameters")
        return super().unused_parameters()
