"""Families of loss terms as objects: weights and exponents are their fields, the formulas are those of `functional`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import functional
from .distributed import normalizer_over_ranks
from .errors import IncompatibleDetectorsError, OptionError, TargetError
from .structures import Assignment, DensePredictions, Target
from .transfer import send
from .validation import validate_option

__all__ = ["CrossHeadLoss", "OneToOneLoss"]


@dataclass(frozen=True)
class OneToOneLoss:
    """The loss of a one-to-one detector: ``loss(predictions, targets, assignment) -> dict``.

    Terms are divided by max(1, matched boxes of all ranks) / ranks.

    Attributes:
        classification: Weight of the focal loss, at least 0.
        box: Weight of the GIoU loss, at least 0. 2 as in POTO (Wang et al., CVPR 2021).
        ranking: Weight of `functional.one_to_one_ranking_loss`, at least 0; off by default. 0.1 leaves a third fewer
            duplicates on some sets (docs/results.md).
        focal_alpha: α of the focal loss, 0…1; 0.25 as in Lin et al., ICCV 2017.
        focal_gamma: γ of the focal loss, at least 0; 2 as there.
        classes: The labels that these data have boxes of; None for all. That an image has none of the others tells
            nothing, so that no gradient reaches their logits.

    Raises:
        OptionError: A number is out of range.

    Example:
        >>> from crosskd_assign import EndToEndDetector
        >>> from torchvision.models.detection import fcos_resnet50_fpn
        >>> model = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=64)
        >>> EndToEndDetector(model, loss=OneToOneLoss(ranking=0.1)).loss.ranking
        0.1
    """

    classification: float = 1.0
    box: float = 2.0
    ranking: float = 0.0
    focal_alpha: float = 0.25
    focal_gamma: float = 2.0
    classes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("classification", "box", "ranking", "focal_gamma"):
            validate_option(name, getattr(self, name), low=0)
        validate_option("focal_alpha", self.focal_alpha, low=0, high=1)
        validate_classes(self.classes)

    def __call__(
        self, predictions: DensePredictions, targets: Sequence[Target], assignment: Assignment
    ) -> dict[str, Tensor]:
        """Compute the weighted terms.

        Args:
            predictions: Predictions of N images.
            targets: N targets in pixels of the batch image.
            assignment: Which point learns which of their boxes.

        Returns:
            ``"classification"``, ``"bbox_regression"`` and, if weighted, ``"ranking"``, scalars.
        """
        # 1. What each matched point is to learn, and how many there are.
        labels, boxes = matched_targets(assignment, targets)
        logits, labels = of_classes(predictions.logits, labels, self.classes)
        count = torch.full((), float(len(assignment)), device=predictions.boxes.device)
        normalizer = normalizer_over_ranks(count)

        # 2. The terms.
        classification = functional.one_to_one_classification_loss(
            logits,
            assignment,
            labels,
            normalizer=normalizer,
            alpha=self.focal_alpha,
            gamma=self.focal_gamma,
        )
        box = functional.one_to_one_box_loss(predictions.boxes, assignment, boxes, normalizer=normalizer)
        losses = {"classification": self.classification * classification, "bbox_regression": self.box * box}
        if self.ranking > 0:
            losses["ranking"] = self.ranking * functional.one_to_one_ranking_loss(
                logits, predictions.boxes, assignment, labels, boxes, normalizer=normalizer
            )
        return losses


def box_index(assignment: Assignment, targets: Sequence[Target]) -> Tensor:
    """Number the box of every matched pair through the whole batch, ``(M,)`` int64."""
    device = assignment.image.device
    counts = torch.tensor([0, *(len(target["boxes"]) for target in targets)])
    return send(counts.cumsum(0), device)[assignment.image] + assignment.target


def matched_targets(assignment: Assignment, targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
    """Gather labels ``(M,)`` and boxes ``(M, 4)`` of the matched pairs of a batch."""
    if not targets:  # no image has labels
        return assignment.target, assignment.metric.new_zeros(0, 4)
    index = box_index(assignment, targets)
    return (
        torch.cat([target["labels"] for target in targets])[index],
        torch.cat([target["boxes"] for target in targets])[index],
    )


def validate_classes(classes: Sequence[int] | None) -> None:
    """Raise `OptionError` unless classes are different labels, or None for all."""
    if classes is None:
        return
    sound = all(type(label) is int and label >= 0 for label in classes)
    if not (sound and len(classes) > 0 and len(set(classes)) == len(classes)):
        raise OptionError(
            expected="different labels from 0 up",
            got=f"{tuple(classes)!r:.60}",
            where="classes",
            fix="list each label of the data once, or pass None for all classes",
        )


def of_classes(logits: Tensor, labels: Tensor, classes: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """Keep the logits ``(N, A, C)`` of some classes, and number the labels ``(M,)`` among them.

    Raises:
        OptionError: There is no logit of a class.
        TargetError: A label is of none of them.
    """
    if classes is None:
        return logits, labels
    # 1. The place of every label among the classes, -1 for those left out.
    if max(classes) >= logits.shape[-1]:
        raise OptionError(
            expected=f"labels below {logits.shape[-1]}, the number of class logits",
            got=f"{max(classes)}",
            where="classes",
            fix="list labels as targets have them",
        )
    kept = send(torch.tensor(classes), logits.device)
    places = torch.full((logits.shape[-1],), -1, device=logits.device)
    places[kept] = torch.arange(len(classes), device=logits.device)

    # 2. Objects of other classes would be taken for the last one.
    moved = places[labels]
    if labels.device.type == "cpu" and bool((moved < 0).any()):  # elsewhere it would have to wait
        raise TargetError(
            expected=f"labels among classes={tuple(classes)!r:.60}",
            got=f"{int(labels[moved < 0][0])}",
            where="labels",
            fix="list every label that the data have boxes of",
        )
    return logits[..., kept], moved


@dataclass(frozen=True)
class CrossHeadLoss:
    """The loss that pulls predictions towards a teacher's: ``loss(cross, teacher) -> dict``.

    Terms are divided by N = max(1, Σ w over points of all ranks with w above ``confidence_threshold``) / ranks, where w
    is the teacher's confidence; N does not depend on the student.

    Attributes:
        classification: Weight of `functional.cross_head_classification_loss`, at least 0.
        box: Weight of `functional.cross_head_box_loss`, at least 0.
        quality: Weight of `functional.cross_head_quality_loss` (centerness, objectness), at least 0; off by default.
        distribution: Weight of `functional.cross_head_distribution_loss` on distance bins, for heads that have them, at
            least 0; off by default.
        gamma: Exponent of the classification loss, 0 or at least 1 (in between, the gradient is infinite where both
            agree); 1 as in CrossKD (Wang et al., CVPR 2024).
        confidence_threshold: Teacher confidence from which a point counts in N, 0…1.

    Raises:
        OptionError: A number is out of range.

    Example:
        >>> CrossHeadLoss(quality=0.5).branches
        frozenset({'quality'})
    """

    classification: float = 1.0
    box: float = 1.0
    quality: float = 0.0
    distribution: float = 0.0
    gamma: float = 1.0
    confidence_threshold: float = 0.05

    def __post_init__(self) -> None:
        for name in ("classification", "box", "quality", "distribution"):
            validate_option(name, getattr(self, name), low=0)
        if self.gamma != 0:
            validate_option("gamma", self.gamma, low=1)
        validate_option("confidence_threshold", self.confidence_threshold, low=0, high=1)

    @property
    def branches(self) -> frozenset[str]:
        """The optional branches that both predictions need."""
        return frozenset(name for name in ("quality", "distribution") if getattr(self, name) > 0)

    def __call__(self, cross: DensePredictions, teacher: DensePredictions) -> dict[str, Tensor]:
        """Compute the weighted terms.

        Args:
            cross: What is pulled: the teacher's head on the student's features. Gradients flow here.
            teacher: What it is pulled to: the same head on the teacher's features.

        Returns:
            Those of ``"classification"``, ``"bbox_regression"``, ``"quality"`` and ``"distribution"`` that have a
            weight.

        Raises:
            IncompatibleDetectorsError: A weighted term needs a branch that one of the predictions lacks.
            PredictionError: The two have other shapes.
        """
        # 1. How much each point counts.
        confidence = functional.teacher_confidence(teacher.logits)
        normalizer = functional.distillation_normalizer(confidence, self.confidence_threshold)

        # 2. The terms.
        losses: dict[str, Tensor] = {}
        if self.classification > 0:
            losses["classification"] = self.classification * functional.cross_head_classification_loss(
                cross.logits, teacher.logits, normalizer=normalizer, gamma=self.gamma
            )
        if self.box > 0:
            losses["bbox_regression"] = self.box * functional.cross_head_box_loss(
                cross.boxes, teacher.boxes, confidence, normalizer=normalizer
            )
        if self.quality > 0:
            own, other = _both(cross.quality, teacher.quality, "quality")
            losses["quality"] = self.quality * functional.cross_head_quality_loss(
                own, other, confidence, normalizer=normalizer
            )
        if self.distribution > 0:
            own, other = _both(cross.distribution, teacher.distribution, "distribution")
            losses["distribution"] = self.distribution * functional.cross_head_distribution_loss(
                own, other, confidence, normalizer=normalizer
            )
        return losses


def _both(cross: Tensor | None, teacher: Tensor | None, branch: str) -> tuple[Tensor, Tensor]:
    if cross is None or teacher is None:
        raise IncompatibleDetectorsError(
            expected=f"heads that predict {branch}",
            got="one without",
            where=f"CrossHeadLoss({branch}=…)",
            fix=f"leave {branch} at 0",
        )
    return cross, teacher
