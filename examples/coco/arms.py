"""The arms of the comparison: every way to train a detector that the example can put side by side.

Each arm is a module that takes images and targets and returns losses, and that has an ``adapter`` to detect with.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.image_list import ImageList

from crosskd_assign import (
    Batch,
    CrossHeadDistiller,
    DensePredictions,
    DetectorAdapter,
    EndToEndDetector,
    Target,
    TaskAwareOneToOneAssigner,
    adapt,
    functional,
)

__all__ = ["ARMS", "Arm", "ArmName", "build_arm", "needs_teacher"]

ArmName = Literal[
    "one-to-many", "one-to-one", "cross-head", "feature-imitation", "weighted-imitation", "own-head-imitation"
]
ARMS: tuple[ArmName, ...] = get_args(ArmName)
METRICS = {
    "poto": TaskAwareOneToOneAssigner.poto(),
    "balanced": TaskAwareOneToOneAssigner.balanced(),
    "task-aligned": TaskAwareOneToOneAssigner.task_aligned(),
    "yolo": TaskAwareOneToOneAssigner.yolo(),
}


def needs_teacher(arm: ArmName) -> bool:
    """Whether an arm learns from a teacher."""
    return arm not in ("one-to-many", "one-to-one")


class Arm(nn.Module):
    """A detector in training.

    Args:
        trainee: Gives losses for images and targets.
        adapter: The detector in it that is evaluated and saved.
        one_to_many: Whether the detector was trained with many positives an object; then its quality branch counts in
            the score, and it needs NMS.
    """

    def __init__(self, trainee: nn.Module, adapter: DetectorAdapter, *, one_to_many: bool) -> None:
        super().__init__()
        self.trainee = trainee
        self.one_to_many = one_to_many
        self._adapter = (adapter,)  # in a tuple, because it is a part of the trainee already

    @property
    def adapter(self) -> DetectorAdapter:
        """The detector."""
        return self._adapter[0]

    def forward(self, images: Sequence[Tensor], targets: Sequence[Target]) -> dict[str, Tensor]:
        """Weighted losses, to be summed."""
        losses: dict[str, Tensor] = self.trainee(images, targets)
        return losses

    def scale_distillation(self, factor: float) -> None:
        """Set the factor on all distillation losses, for warm-up and decay; nothing where nothing is distilled."""
        if isinstance(self.trainee, CrossHeadDistiller):
            self.trainee.distillation_weight = factor

    @torch.no_grad()
    def predict(self, images: Sequence[Tensor]) -> tuple[DensePredictions, Batch]:
        """Dense predictions, with the quality branch only where it is part of the score."""
        batch, _ = self.adapter.preprocess(images)
        predictions = self.adapter.head(self.adapter.features(batch), batch)
        return (predictions if self.one_to_many else replace(predictions, quality=None)), batch


def build_arm(
    name: ArmName,
    student: nn.Module,
    teacher: nn.Module | None = None,
    *,
    metric: str = "poto",
    classification_weight: float = 1.0,
    box_weight: float = 1.0,
    quality_weight: float = 0.0,
    feature_weight: float = 0.0,
    imitation_weight: float = 1.0,
    alignment: Literal["statistics", "none"] = "statistics",
    ranking_weight: float = 0.0,
    auxiliary_head: bool = False,
    detach: bool = False,
    entry: int = 0,
) -> Arm:
    """Build an arm around a torchvision detector.

    Args:
        name: Which.
        student: The detector to train.
        teacher: A trained one-to-many detector, for arms that need one.
        metric: Preset of the task-aware metric: "poto", "balanced", "task-aligned" or "yolo".
        classification_weight: Of the distillation's classification term.
        box_weight: Of the distillation's box term.
        quality_weight: Of the distillation's quality term.
        feature_weight: Of feature imitation beside cross-head distillation.
        imitation_weight: Of feature imitation alone.
        alignment: Of the student's features to the teacher's.
        ranking_weight: Of the one-to-one ranking term.
        auxiliary_head: Train a second head one-to-many beside the student's own.
        detach: Keep the one-to-one losses from the features when there is such a second head.
        entry: Convolutions of the student's head that run before it enters the teacher's (cross-head).

    Raises:
        ValueError: The arm needs a teacher and has none, or ``entry`` is asked for with an auxiliary head.
    """
    if name == "one-to-many":
        return Arm(student, adapt(student), one_to_many=True)
    if auxiliary_head and entry > 0:
        raise ValueError(
            "Expected --entry 0 with --auxiliary-head, which starts from the pyramid as well, but got "
            f"{entry}. Fix: leave out one of the two."
        )
    options: dict[str, Any] = {"assigner": METRICS[metric], "ranking_weight": ranking_weight}
    detector = (
        AuxiliaryHead(student, detach=detach, **options) if auxiliary_head else EndToEndDetector(student, **options)
    )
    if name == "one-to-one":
        return Arm(detector, detector.adapter, one_to_many=False)
    if teacher is None:
        raise ValueError(f"Expected a teacher for the arm {name!r}, but got none (--teacher). Fix: train one first.")
    distiller: CrossHeadDistiller
    if name == "cross-head":
        distiller = CrossHeadDistiller(
            detector,
            teacher,
            classification_weight=classification_weight,
            box_weight=box_weight,
            quality_weight=quality_weight,
            feature_weight=feature_weight,
            alignment=alignment,
            entry=entry,
        )
    elif name == "own-head-imitation":
        distiller = OwnHeadImitation(
            detector, teacher, classification_weight=classification_weight, box_weight=box_weight
        )
    else:
        imitation = StandardisedImitation if name == "feature-imitation" else WeightedImitation
        distiller = imitation(detector, teacher, alignment="none")
        distiller.imitation_weight = imitation_weight
    return Arm(distiller, detector.adapter, one_to_many=False)


class AuxiliaryHead(EndToEndDetector):
    """One-to-one training beside a second head that is trained one-to-many on the same features and then dropped.

    The idea of YOLOv10 and DATE. In DATE the gradient of both heads reaches the features, in YOLOv10 only the second's.

    Args:
        model: torchvision's FCOS or RetinaNet.
        detach: Whether one-to-one losses stop at the features, as in YOLOv10.
        options: Of `EndToEndDetector`.
    """

    def __init__(self, model: nn.Module, *, detach: bool = False, **options: Any) -> None:
        super().__init__(model, **options)
        self.detach = detach
        self.head = copy.deepcopy(self._network.head).requires_grad_(True)
        self._head_edits = self.adapter.edits_features()
        self._seen: tuple[list[Tensor], Batch] | None = None

    @property
    def _network(self) -> Any:
        """The FCOS or RetinaNet whose features both heads share."""
        return self.model

    def predict(self, features: list[Tensor], batch: Batch) -> DensePredictions:
        """The detector's own predictions; in training, the features are kept for the second head."""
        if self.training:
            self._seen = ([x.clone() for x in features] if self._head_edits else features), batch
            features = [x.detach() for x in features] if self.detach else features
        return super().predict(features, batch)

    def losses(self, predictions: DensePredictions, targets: Sequence[Target]) -> dict[str, Tensor]:
        """One-to-one losses, and the one-to-many losses of torchvision under names that begin with ``auxiliary_``."""
        losses = super().losses(predictions, targets)
        if self._seen is None:
            raise RuntimeError("Expected predict() before losses(), but got losses() alone. Fix: call the detector.")
        (features, batch), self._seen = self._seen, None
        anchors = self._network.anchor_generator(ImageList(batch.images, list(batch.sizes)), features)
        points_per_level = [x.shape[-2] * x.shape[-1] for x in features]
        arguments = (anchors, points_per_level) if isinstance(self.model, FCOS) else (anchors,)
        auxiliary = self._network.compute_loss(targets, self.head(features), *arguments)
        return losses | {f"auxiliary_{name}": loss for name, loss in auxiliary.items()}


class _Imitation(CrossHeadDistiller):
    imitation_weight = 1.0

    def imitation(self, loss: Tensor) -> dict[str, Tensor]:
        return {"imitation": self.distillation_weight * self.imitation_weight * loss}


class StandardisedImitation(_Imitation):
    """Half the squared difference of standardised feature maps: PKD (Cao et al., NeurIPS 2022), no head involved."""

    def distillation_losses(
        self, features: list[Tensor], predictions: DensePredictions, batch: Batch
    ) -> dict[str, Tensor]:
        """`functional.feature_imitation_loss`: a sum over levels."""
        teacher = self.teacher_features(batch)
        return self.imitation(functional.feature_imitation_loss(self.align(features, teacher), teacher))


class WeightedImitation(_Imitation):
    """Squared difference of feature maps, weighted by the teacher's best class score: the idea of Ultralytics' (2026).

    Theirs is multiplied by the batch size, as its other losses are; ours, like the others here, is not.
    """

    def distillation_losses(
        self, features: list[Tensor], predictions: DensePredictions, batch: Batch
    ) -> dict[str, Tensor]:
        """Sum over levels of Σ w (s − t)² / (C · Σ w)."""
        teacher = self.teacher_features(batch)
        with torch.no_grad():
            judged = self.teacher.head([x.clone() for x in teacher], batch)  # clones, because heads may edit them
        confidence = functional.teacher_confidence(judged.logits)  # (N, A)
        per_level = torch.split(confidence, [len(level) for level in judged.levels or ()], dim=1)
        losses = []
        for s, t, w in zip(self.align(features, teacher), teacher, per_level, strict=True):
            n, channels, height, width = t.shape
            weight = w.view(n, 1, height, width, -1).amax(dim=-1)  # of several anchors, the surest
            losses.append(((s.float() - t.float()) ** 2 * weight).sum() / (weight.sum() * channels + 1e-9))
        return self.imitation(torch.stack(losses).sum())


class OwnHeadImitation(CrossHeadDistiller):
    """Dense prediction mimicking: the student's own head is told to imitate the one-to-many teacher's."""

    def distillation_losses(
        self, features: list[Tensor], predictions: DensePredictions, batch: Batch
    ) -> dict[str, Tensor]:
        """The cross-head losses, on the student's own predictions."""
        with torch.no_grad():
            teacher = self.teacher.head(self.teacher_features(batch), batch)
        if predictions.logits.shape != teacher.logits.shape:
            own, other = (tuple(p.logits.shape[1:]) for p in (predictions, teacher))
            raise ValueError(
                f"Expected a student with the points and classes of its teacher, but got {own} and {other} "
                "(own-head-imitation). Fix: give both one architecture, or train with cross-head, which needs neither."
            )
        return self.compare(predictions, teacher)
