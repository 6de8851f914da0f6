"""What several test files build on: grids, random predictions and targets, and the smallest detector there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

from crosskd_assign import DensePredictions, DetectorAdapter, GridLevel
from crosskd_assign.structures import Assignment, Batch, Target

settings.register_profile("crosskd", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("crosskd")

torch.set_num_threads(1)  # maps of a few points are slower on more, and much slower where cores are shared

KINDS = ("scattered", "crowded", "identical", "tiny", "huge", "stacked", "corner")


def grid(size: int = 64, strides: Sequence[int] = (8, 16, 32), anchors: int = 1) -> tuple[GridLevel, ...]:
    """The pyramid of a square image: one point in the middle of every cell."""
    return tuple(GridLevel.of(torch.empty(1, 1, size // s, size // s), float(s), anchors=anchors) for s in strides)


def random_boxes(kind: str, count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """``(count, 4)`` float32 boxes of one image of ``size`` pixels."""
    low, high = {"tiny": (0.5, 6.0), "huge": (1.5 * size, 3.0 * size)}.get(kind, (size / 8, size / 2))
    extent = rng.uniform(low, high, (count, 2))
    center = rng.uniform(0, size, (count, 2))
    if kind == "crowded":
        center = size / 3 + rng.normal(0, 3, (count, 2))
    if kind == "corner":  # a crowd at point 0
        center = rng.uniform(2, 8, (count, 2))
    if kind == "identical":  # two places, many copies
        pick = rng.integers(0, 2, count) % max(1, count)
        center, extent = center[pick], extent[pick]
    if kind == "stacked":  # one centre, nested
        center = np.broadcast_to(center[:1], center.shape)
    return np.concatenate([center - extent / 2, center + extent / 2], axis=1).astype(np.float32)


def random_targets(
    counts: Sequence[int], *, seed: int = 0, kind: str = "scattered", size: int = 64, classes: int = 3
) -> list[Target]:
    """One target an image, with ``counts`` boxes."""
    rng = np.random.default_rng(seed)
    return [
        Target(
            boxes=torch.from_numpy(random_boxes(kind, count, size, rng)),
            labels=torch.from_numpy(rng.integers(0, classes, count)),
        )
        for count in counts
    ]


def random_predictions(
    targets: Sequence[Target], levels: Sequence[GridLevel], *, seed: int = 0, classes: int = 3
) -> DensePredictions:
    """Predictions that know a little: each point predicts a jittered copy of some box, or a box around itself."""
    rng = np.random.default_rng(seed + 1)
    points = torch.cat([level.points() for level in levels]).numpy()  # (A, 2)
    a = len(points)
    images = []
    for target in targets:
        radius = np.exp(rng.normal(2, 0.7, (a, 2)))
        boxes = np.concatenate([points - radius, points + radius], axis=1)  # (A, 4)
        if len(target["boxes"]) > 0:
            known = target["boxes"].numpy()[rng.integers(0, len(target["boxes"]), a)]
            jitter = rng.normal(0, 0.2, (a, 4)) * np.tile(known[:, 2:] - known[:, :2], 2)
            boxes = np.where(rng.random((a, 1)) < 0.7, known + jitter, boxes)
        images.append(boxes)
    logits = rng.normal(-1, 2, (len(targets), a, classes))
    return DensePredictions.on_grid(
        torch.from_numpy(logits).float(), torch.from_numpy(np.stack(images)).float(), levels
    )


GRIDS = [  # square; several predictions a point; steps that are not the stride, from 0 on
    grid(32, (8, 16)),
    grid(64, (8, 16, 32)),
    grid(64, (16, 32), anchors=3),
    (GridLevel(5, 9, 8.0, (7.0, 12.5), (0.0, 0.0)), GridLevel(3, 3, 16.0, (16.0, 21.0), (0.0, 0.0), 2)),
]


@dataclass(frozen=True)
class Scene:
    """What predictions and targets of one to three images are made from; hypothesis prints this, not the tensors."""

    kind: str
    counts: list[int]
    grid: int
    broken: float  # share of predictions that are ``value``
    value: float
    seed: int

    def build(self) -> tuple[DensePredictions, list[Target]]:
        size = 32 if self.grid == 0 else 64
        targets = random_targets(self.counts, seed=self.seed, kind=self.kind, size=size)
        predictions = random_predictions(targets, GRIDS[self.grid], seed=self.seed)
        rng = np.random.default_rng(self.seed)
        for tensor in (predictions.logits, predictions.boxes):
            tensor[torch.from_numpy(rng.random(tensor.shape) < self.broken / tensor.shape[-1])] = self.value
        return predictions, targets


def scenes(most: int = 6) -> st.SearchStrategy[Scene]:
    """Scenes with up to ``most`` boxes an image, of every kind, some with predictions that are not finite."""
    return st.builds(
        Scene,
        kind=st.sampled_from(KINDS),
        counts=st.lists(st.integers(0, most), min_size=1, max_size=3),
        grid=st.sampled_from(range(len(GRIDS))),
        broken=st.sampled_from([0, 0, 0.3, 1]),
        value=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
        seed=st.integers(0, 2**20),
    )


def assignment_of(*pairs: tuple[int, int, int]) -> Assignment:
    """An assignment of (image, point, target) triples."""
    image, point, target = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 3).unbind(1)
    return Assignment(image, point, target, torch.ones(len(pairs)), torch.zeros(len(pairs), dtype=torch.bool))


class TinyNetwork(nn.Module):
    """Three levels of stride 8, 16 and 32, and one head for all of them."""

    def __init__(self, classes: int = 3, channels: int = 8, *, batch_norm: bool = False) -> None:
        super().__init__()
        self.backbone = nn.ModuleList(
            [
                nn.Conv2d(3, channels, 8, stride=8),
                nn.Conv2d(channels, channels, 3, stride=2, padding=1),
                nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            ]
        )
        norm: nn.Module = nn.BatchNorm2d(channels) if batch_norm else nn.Identity()
        self.tower = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), norm, nn.SiLU())
        self.classification = nn.Conv2d(channels, classes, 1)
        self.regression = nn.Conv2d(channels, 4, 1)
        self.quality = nn.Conv2d(channels, 1, 1)


class TinyAdapter(DetectorAdapter):
    """A detector for images of 32 to 64 pixels that decodes distances by exp, without a kink to trip over."""

    model: TinyNetwork

    def features(self, batch: Batch) -> list[Tensor]:
        x, maps = self.normalize(batch), []
        for stage in self.model.backbone:
            x = stage(x)
            maps.append(x)
            x = x.tanh()
        return maps

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        levels = [GridLevel.of(x, image_size[-1] / x.shape[-1]) for x in features]
        towers = [self.model.tower(x) for x in features]

        def flat(branch: nn.Module) -> Tensor:
            return torch.cat([branch(t).flatten(2).transpose(1, 2) for t in towers], dim=1)  # (N, A, *)

        sides = flat(self.model.regression).float().clamp(max=4).exp()  # (N, A, 4)
        quality = flat(self.model.quality).squeeze(-1)
        return DensePredictions.from_sides(flat(self.model.classification), sides, levels, quality=quality)

    def parts(self) -> dict[str, nn.Module]:
        head = [self.model.tower, self.model.classification, self.model.regression, self.model.quality]
        return {"backbone": self.model.backbone[:1], "neck": self.model.backbone[1:], "head": nn.ModuleList(head)}

    def unused_parameters(self) -> list[nn.Parameter]:
        return list(self.model.quality.parameters())


def tiny_detector(seed: int = 0, classes: int = 3, channels: int = 8, *, batch_norm: bool = False) -> TinyAdapter:
    """A fresh detector with reproducible weights; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyAdapter(TinyNetwork(classes, channels, batch_norm=batch_norm))


def random_images(count: int = 2, size: int = 64, *, seed: int = 0) -> list[Tensor]:
    """Images ``(3, size, size)`` in 0…1."""
    return list(torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)))
