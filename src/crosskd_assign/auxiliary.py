"""An auxiliary head: a second, one-to-many head on the same features, in training only."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from . import functional
from .assignment import TaskAwareOneToManyAssigner
from .detectors import DetectorAdapter, adapt, probe_detector
from .distributed import normalizer_over_ranks
from .losses import box_index, matched_targets, of_classes, validate_classes
from .structures import Assignment, ForwardPass, Target, labelled
from .validation import validate_option, validate_predictions

__all__ = ["AuxiliaryHead"]


class AuxiliaryHead(nn.Module):
    """A copy of a detector's head that is trained one-to-many on the same features, for any adapter.

    One positive an object teaches features poorly; this head gives them more. Its parameters are in ``parameters()``
    and ``state_dict()`` of the `EndToEndDetector` it is given to, and never in the detector's own model, nor in an
    export.

    Each object has the ``positives`` best points inside the prior, by the task-aware metric m; a point that several
    objects want goes to the one with the greatest. Their terms are weighted by m / max m of the object and divided by
    the sum of the weights, averaged over ranks. Quality branches of the copy are left out.

    Source: the idea of two heads is DATE's (Chen et al., 2022) and YOLOv10's (Wang et al., NeurIPS 2024).

    Args:
        model: The detector it is a second head of: torchvision's FCOS or RetinaNet, or a `DetectorAdapter`.
        assigner: Picks the points; `TaskAwareOneToManyAssigner` () by default.
        classification: Weight of the focal loss, at least 0.
        box: Weight of the GIoU loss, at least 0.
        detach: Whether one-to-one losses stop at the features, which then learn from this head alone, as in YOLOv10. In
            DATE both reach them, the default.
        classes: The labels that these data have boxes of, as in `OneToOneLoss`; None for all.

    Raises:
        DetectorError: The adapter's ``parts()`` names no head.
        OptionError: A weight is below 0.

    Example:
        >>> from torchvision.models.detection import fcos_resnet50_fpn
        >>> from crosskd_assign import EndToEndDetector
        >>> model = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=64)
        >>> detector = EndToEndDetector(model, auxiliary=AuxiliaryHead(model))
        >>> target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])}
        >>> sorted(detector([torch.rand(3, 64, 64)], [target]))[:2]
        ['auxiliary_bbox_regression', 'auxiliary_classification']
    """

    def __init__(
        self,
        model: nn.Module | DetectorAdapter,
        *,
        assigner: TaskAwareOneToManyAssigner | None = None,
        classification: float = 1.0,
        box: float = 2.0,
        detach: bool = False,
        classes: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        validate_option("classification", classification, low=0)
        validate_option("box", box, low=0)
        validate_classes(classes)
        adapter = adapt(model)
        twin = _with_a_head_of_its_own(adapter)
        self.head = twin.part("head").requires_grad_(True)
        for parameter in twin.unused_parameters():
            parameter.requires_grad_(False)
        self.assigner = TaskAwareOneToManyAssigner() if assigner is None else assigner
        self.classification = classification
        self.box = box
        self.detach = detach
        self.classes = classes
        self.edits_features = probe_detector(adapter).edits_features
        # In a tuple, nn.Module does not register them: but for the head, the twin is the detector itself.
        self._hidden = (twin, adapter.model)

    @property
    def model(self) -> nn.Module:
        """The network it is a second head of."""
        return self._hidden[1]

    def forward(self, run: ForwardPass) -> dict[str, Tensor]:
        """Compute the one-to-many losses of one pass: ``"classification"`` and ``"bbox_regression"``."""
        # 1. The second head, on the features of the first.
        twin, _ = self._hidden
        features = [x.clone() for x in run.features] if self.edits_features else run.features
        predictions = twin.head(features, run.batch.image_size)
        where = f"auxiliary {type(twin).__name__}.head()"
        validate_predictions(predictions, where=where, images=len(run.batch.images))

        # 2. Its points, and how positive each is.
        predictions, targets = labelled(predictions, run.targets)
        assignment = self.assigner(predictions, targets)
        labels, boxes = matched_targets(assignment, targets)
        logits, labels = of_classes(predictions.logits, labels, self.classes)
        weights = _weights(assignment, targets)
        normalizer = normalizer_over_ranks(weights.sum())

        # 3. The terms.
        classification = functional.one_to_many_classification_loss(
            logits, assignment, labels, weights, normalizer=normalizer
        )
        box = functional.one_to_many_box_loss(predictions.boxes, assignment, boxes, weights, normalizer=normalizer)
        return {"classification": self.classification * classification, "bbox_regression": self.box * box}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._hidden[0]._apply(fn)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @override
    def extra_repr(self) -> str:
        return f"assigner={self.assigner}, detach={self.detach}"


def _with_a_head_of_its_own(adapter: DetectorAdapter) -> DetectorAdapter:
    """Copy an adapter so that the copy shares all modules and parameters with it but those of the head."""
    head = set(adapter.part("head").modules())
    owned = {id(p) for module in head for p in module.parameters()}
    shared: dict[int, Any] = {id(p): p for p in adapter.parameters() if id(p) not in owned}
    for module in adapter.modules():
        if head.isdisjoint(module.modules()):
            shared[id(module)] = module
    return copy.deepcopy(adapter, shared)


def _weights(assignment: Assignment, targets: list[Target]) -> Tensor:
    """M / max m of the object for every pair ``(M,)``; 1 where the object has no point with a metric."""
    box = box_index(assignment, targets)
    best = assignment.metric.new_zeros(sum(len(target["boxes"]) for target in targets))
    best = best.scatter_reduce(0, box, assignment.metric, "amax")[box]
    return torch.where(best > 0, assignment.metric / best.clamp(min=torch.finfo(best.dtype).tiny), 1.0)
