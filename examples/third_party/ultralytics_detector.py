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
from torch import Tensor, nn

from crosskd_assign import DensePredictions, GridLevel, ResizingAdapter
from crosskd_assign.structures import Batch, Target

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
        """Run every layer but the last; each names the layers it reads, -1 for the one before it."""
        *layers, detect = self.model.model
        maps = [self.normalize(batch)]  # maps[i + 1] is the output of layer i
        for layer in layers:
            inputs = _chosen(maps, layer.f)
            maps.append(layer(inputs[0] if isinstance(layer.f, int) else inputs))
        return _chosen(maps, detect.f)

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        """Run the two branches of the last layer, which its own ``forward`` decodes in evaluation mode alone."""
        sides, classes = (
            torch.cat([f(x).flatten(2) for f, x in zip(branch, features, strict=True)], dim=2).transpose(1, 2)
            for branch in self._branches(self.branch)
        )
        strides = self.model.model[-1].stride.tolist()
        levels = [GridLevel.of(x, stride) for x, stride in zip(features, strides, strict=True)]
        if sides.shape[2] == 4:  # no bins, but the distance itself
            return DensePredictions.from_sides(classes, sides, levels)
        return DensePredictions.from_bins(classes, sides.reshape(*sides.shape[:2], 4, -1), levels)

    def parts(self) -> dict[str, nn.Module]:
        """Name the layers of the backbone, as the network's description counts them, of the neck, and the last one."""
        layers, n = self.model.model, len(self.model.yaml["backbone"])
        return {"backbone": layers[:n], "neck": layers[n:-1], "head": layers[-1]}

    def unused_parameters(self) -> Iterable[nn.Parameter]:
        """List the constants of the package's own decoding, and the other head of networks that have two."""
        detect = self.model.model[-1]
        unused = [*detect.dfl.parameters()]
        if hasattr(detect, "one2one_cv2"):
            other: Branch = "one-to-one" if self.branch == "one-to-many" else "one-to-many"
            unused += [parameter for branch in self._branches(other) for parameter in branch.parameters()]
        return unused

    def _branches(self, branch: Branch) -> tuple[nn.ModuleList, nn.ModuleList]:
        """Find box and class branch: one module a level each."""
        prefix = "one2one_" if branch == "one-to-one" else ""
        detect = self.model.model[-1]
        return getattr(detect, f"{prefix}cv2"), getattr(detect, f"{prefix}cv3")


def _chosen(maps: Sequence[Any], layers: int | Sequence[int]) -> list[Any]:
    """Choose outputs of layers, by number; -1 is the last there is."""
    return [maps[-1] if i == -1 else maps[i + 1] for i in ([layers] if isinstance(layers, int) else layers)]


def build(classes: int, *, name: str = "yolov8n", branch: Branch = "one-to-many", size: int = 0) -> YOLOAdapter:
    """Build a fresh network from one of the package's own descriptions, such as "yolov8n", "yolo11n" or "yolo26n"."""
    from ultralytics.nn.tasks import DetectionModel  # noqa: PLC0415  # AGPL; only if you want it

    return YOLOAdapter(DetectionModel(f"{name}.yaml", nc=classes, verbose=False), branch=branch, size=size)


def own_loss(adapter: YOLOAdapter, images: Sequence[Tensor], targets: Sequence[Target]) -> Tensor:
    """Compute the package's own training loss, one-to-many (where there are two heads: of both)."""
    from ultralytics.cfg import get_cfg  # noqa: PLC0415  # AGPL; only if you want it

    batch, moved = adapter.preprocess(images, targets)
    height, width = batch.image_size
    given = [target for target in moved if target]
    boxes = torch.cat([target["boxes"] for target in given])
    centres, extents = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    if not hasattr(adapter.model, "args"):
        adapter.model.args = get_cfg()  # the loss reads its weights there
    losses, _ = adapter.model.loss(
        {
            "img": batch.images,
            "batch_idx": torch.cat([torch.full((len(t["labels"]),), float(i)) for i, t in enumerate(given)]),
            "cls": torch.cat([target["labels"] for target in given])[:, None].float(),
            "bboxes": torch.cat([centres, extents], dim=1) / boxes.new_tensor([width, height, width, height]),
        }
    )
    total: Tensor = losses.sum()
    return total
