"""Ultralytics' YOLO (v8, 11, 26, and others whose last layer is a `Detect`), as student or teacher.

Licence: `ultralytics <https://pypi.org/project/ultralytics/>`_ is AGPL-3.0, or a licence you buy. This file holds none
of it: it reads attributes of a network that your own installation made, and imports the package only to make one. What
you train and ship with that package falls under its licence, not under ours.

A network of your own: ``YOLOAdapter(YOLO("best.pt").model)``. Label c is class channel c, from 0, without background.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from shared import ResizingAdapter, boxes_from_sides, mean_of_bins, points_and_strides
from torch import Tensor, nn

from crosskd_assign import Batch, DensePredictions, GridLevel, Target

__all__ = ["YOLOAdapter", "build", "own_loss"]

Branch = Literal["one-to-many", "one-to-one"]


class YOLOAdapter(ResizingAdapter):
    """A YOLO with one prediction a cell: class logits, and distances to the sides or distributions of them.

    Args:
        model: The network, a ``DetectionModel``; ``YOLO(…).model`` is one. It takes pixels in 0…1 as they are.
        branch: Which head to use where the network has two (26 and v10 have). A student trained in its one-to-one
            branch detects the same through the package's own end-to-end inference.
        size: Longer side of the images in pixels; 0 takes them as they come.
    """

    def __init__(self, model: nn.Module, *, branch: Branch = "one-to-many", size: int = 0) -> None:
        super().__init__(model, size=size)
        self.branch = branch

    def features(self, batch: Batch) -> list[Tensor]:
        """Every layer but the last; each names the layers it reads, -1 for the one before it."""
        *layers, detect = self.model.model
        maps = [self.normalize(batch)]  # maps[i + 1] is what layer i gives
        for layer in layers:
            inputs = _chosen(maps, layer.f)
            maps.append(layer(inputs[0] if isinstance(layer.f, int) else inputs))
        return _chosen(maps, detect.f)

    def head(self, features: list[Tensor], batch: Batch) -> DensePredictions:
        """The two branches of the last layer, which its own ``forward`` would join, and decode in evaluation alone."""
        detect = self.model.model[-1]
        box_branch, class_branch = self._branches(self.branch)
        code = torch.cat([f(x).flatten(2) for f, x in zip(box_branch, features, strict=True)], dim=2)
        logits = torch.cat([f(x).flatten(2) for f, x in zip(class_branch, features, strict=True)], dim=2)
        bins = code.reshape(len(code), 4, -1, code.shape[2]).permute(0, 3, 1, 2)  # (N, A, 4, R)
        levels = [GridLevel.of(x, s) for x, s in zip(features, detect.stride.tolist(), strict=True)]
        points, strides = points_and_strides(levels, code.device)
        single = bins.shape[-1] == 1  # no bins, but the distance itself
        sides = (bins.float().squeeze(-1) if single else mean_of_bins(bins)) * strides
        boxes = boxes_from_sides(points, sides)
        return DensePredictions.on_grid(logits.transpose(1, 2), boxes, levels, distribution=None if single else bins)

    def trunk(self) -> nn.Module:
        """Every layer but the last."""
        layers: nn.Module = self.model.model[:-1]
        return layers

    def unused_parameters(self) -> Iterable[nn.Parameter]:
        """The constants of the package's own decoding, and the other head of networks that have two."""
        detect = self.model.model[-1]
        unused = [*detect.dfl.parameters()]
        if hasattr(detect, "one2one_cv2"):
            other: Branch = "one-to-one" if self.branch == "one-to-many" else "one-to-many"
            unused += [parameter for branch in self._branches(other) for parameter in branch.parameters()]
        return unused

    def _branches(self, branch: Branch) -> tuple[nn.ModuleList, nn.ModuleList]:
        """Box and class branch: one module a level each."""
        prefix = "one2one_" if branch == "one-to-one" else ""
        detect = self.model.model[-1]
        return getattr(detect, f"{prefix}cv2"), getattr(detect, f"{prefix}cv3")


def _chosen(maps: Sequence[Any], layers: int | Sequence[int]) -> list[Any]:
    """Outputs of layers, by number; -1 is the last there is."""
    return [maps[-1] if i == -1 else maps[i + 1] for i in ([layers] if isinstance(layers, int) else layers)]


def build(classes: int, *, name: str = "yolov8n", branch: Branch = "one-to-many", size: int = 0) -> YOLOAdapter:
    """A fresh network from one of the package's own descriptions, such as "yolov8n", "yolo11n" or "yolo26n"."""
    from ultralytics.nn.tasks import DetectionModel  # noqa: PLC0415  # AGPL; only if you want it

    return YOLOAdapter(DetectionModel(f"{name}.yaml", nc=classes, verbose=False), branch=branch, size=size)


def own_loss(adapter: YOLOAdapter, images: Sequence[Tensor], targets: Sequence[Target]) -> Tensor:
    """The package's own training loss, one-to-many (where there are two heads: of both)."""
    from ultralytics.cfg import get_cfg  # noqa: PLC0415  # AGPL; only if you want it

    batch, moved = adapter.preprocess(images, targets)
    height, width = batch.images.shape[-2:]
    boxes = torch.cat([target["boxes"] for target in moved or []])
    centres, extents = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    if not hasattr(adapter.model, "args"):
        adapter.model.args = get_cfg()  # the loss reads its weights there
    losses, _ = adapter.model.loss(
        {
            "img": batch.images,
            "batch_idx": torch.cat([torch.full((len(t["labels"]),), float(i)) for i, t in enumerate(moved or [])]),
            "cls": torch.cat([target["labels"] for target in moved or []])[:, None].float(),
            "bboxes": torch.cat([centres, extents], dim=1) / boxes.new_tensor([width, height, width, height]),
        }
    )
    total: Tensor = losses.sum()
    return total
