"""NanoDet-m and YOLOX-nano with their COCO weights, as one-to-many teachers.

Both networks come from one foreign file, ``coco_detectors.py``, a plain PyTorch transcription that lies beside its
weights ``nanodet_m_coco.pth`` and ``yolox_nano_coco.pth`` in the folder named by ``COCO_DETECTORS``. None of it is part
of this project: nothing is copied, the adapters call what is there. The originals are Apache-2.0
(github.com/RangiLyu/nanodet, github.com/Megvii-BaseDetection/YOLOX); their weights were trained on COCO train2017.

As a teacher of `examples/coco/train.py`::

    COCO_DETECTORS=weights python examples/coco/train.py --arm cross-head --data-path coco --output runs/student
        --teacher python:examples/third_party/nanodet_yolox.py:nanodet_m

Label c is class channel c; the detectors have 80 of them and no background.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crosskd_assign import DensePredictions, DetectorAdapter, GridLevel, ResizingAdapter, functional
from crosskd_assign.errors import CrossKDError
from crosskd_assign.structures import Batch

__all__ = ["NanoDetAdapter", "YOLOXAdapter", "nanodet_m", "yolox_nano"]

STRIDES = (8, 16, 32)
NORMALISATION: dict[str, Any] = {
    "image_mean": (0.485, 0.456, 0.406),
    "image_std": (0.229, 0.224, 0.225),
}  # torchvision's

# COCO numbers its 80 classes from 1 to 90; these numbers it never used.
_UNUSED = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
COCO_CATEGORIES = dict(enumerate(category for category in range(1, 91) if category not in _UNUSED))


class MissingFilesError(CrossKDError):
    """The networks or their weights are not there."""

    page = "docs/how-to/third-party.md#what-each-adapter-is-tested-for"


class NanoDetAdapter(ResizingAdapter):
    """Three levels of 96 channels; class logits and, for each side of the box, a distribution over 0…7 strides."""

    def features(self, batch: Batch) -> list[Tensor]:
        """Compute the pyramid as the network does in the middle of its ``forward``: down from coarse, then up again."""
        maps = self.model.backbone(self.normalize(batch))
        down = [lateral(x) for lateral, x in zip(self.model.lateral, maps, strict=True)]
        for i in (1, 0):
            down[i] = down[i] + _like(down[i + 1], down[i])
        up = down[:1]
        for x in down[1:]:
            up.append(x + _like(up[-1], x))
        return up

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        """Run tower and output of each level."""
        branches = zip(self.model.cls_convs, self.model.gfl, features, strict=True)
        out = torch.cat([output(tower(x)).flatten(2) for tower, output, x in branches], dim=2)  # (N, 80 + 4 · 8, A)
        logits, bins = out[:, : self.model.nc].transpose(1, 2), out[:, self.model.nc :]
        bins = bins.reshape(len(bins), 4, -1, bins.shape[2]).permute(0, 3, 1, 2)  # (N, A, 4, 8)
        return DensePredictions.from_bins(logits, bins, _grid(features))

    def parts(self) -> dict[str, nn.Module]:
        """Name backbone, lateral convolutions, and towers with outputs."""
        model = self.model
        head = nn.ModuleList([model.cls_convs, model.gfl])
        return {"backbone": model.backbone, "neck": model.lateral, "head": head}


class YOLOXAdapter(ResizingAdapter):
    """Three levels of 64, 128 and 256 channels; its score is class · objectness, here as one logit of the product."""

    def features(self, batch: Batch) -> list[Tensor]:
        """Compute the pyramid; this network has a method for it."""
        maps: list[Tensor] = self.model.features(self.normalize(batch))
        return maps

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        """Run stem and both towers of each level; boxes are a shift of the cell's corner and logarithms of sizes."""
        logits, codes = [], []
        for i, feature in enumerate(features):
            x = self.model.hs[i](feature)
            classes, boxes = self.model.cc[i](x), self.model.rc[i](x)
            logits.append(functional.product_logits(self.model.cp[i](classes), self.model.op[i](boxes)).flatten(2))
            codes.append(self.model.rp[i](boxes).flatten(2))
        code = torch.cat(codes, dim=2).transpose(1, 2).float()  # (N, A, 4)
        centers = torch.cat([code[..., :2] - 0.5, code[..., 2:].exp()], dim=-1)  # the point is the middle of the cell
        return DensePredictions.from_centers(torch.cat(logits, dim=2).transpose(1, 2), centers, _grid(features))

    def parts(self) -> dict[str, nn.Module]:
        """Name all modules of the network."""
        names = {"backbone": "stem d2 d3 d4 d5", "neck": "lat0 p4 red1 p3 bu2 n3 bu1 n4", "head": "hs cc rc cp op rp"}
        return {part: nn.ModuleList(getattr(self.model, x) for x in of.split()) for part, of in names.items()}


def _grid(features: list[Tensor]) -> list[GridLevel]:
    return [GridLevel.of(x, stride) for x, stride in zip(features, STRIDES, strict=True)]


def _like(x: Tensor, other: Tensor) -> Tensor:
    return F.interpolate(x, size=other.shape[-2:], mode="bilinear", align_corners=False)


def nanodet_m(size: int = 320) -> tuple[DetectorAdapter, dict[int, int]]:
    """Load NanoDet-m with its COCO weights, and the COCO category of each of its labels."""
    return NanoDetAdapter(_network("NanoDetM", "nanodet_m_coco.pth"), size=size, **NORMALISATION), COCO_CATEGORIES


def yolox_nano(size: int = 416) -> tuple[DetectorAdapter, dict[int, int]]:
    """Load YOLOX-nano with its COCO weights, and the COCO category of each of its labels."""
    return YOLOXAdapter(_network("YOLOXNano", "yolox_nano_coco.pth"), size=size, **NORMALISATION), COCO_CATEGORIES


def _network(name: str, weights: str) -> nn.Module:
    """Load a network of ``coco_detectors.py`` with its weights."""
    folder = Path(os.environ.get("COCO_DETECTORS", "."))
    missing = [file for file in ("coco_detectors.py", weights) if not (folder / file).is_file()]
    spec = importlib.util.spec_from_file_location("coco_detectors", folder / "coco_detectors.py")
    if missing or spec is None or spec.loader is None:
        raise MissingFilesError(
            expected=f"coco_detectors.py and {weights}",
            got=f"no {' and no '.join(missing)}",
            where=f"{folder}",
            fix="name their folder in the environment variable COCO_DETECTORS",
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network: nn.Module = getattr(module, name)()
    network.load_state_dict(torch.load(folder / weights, weights_only=True))
    return network
