"""Build training methods: modules that take images and targets and return weighted losses, to be summed."""

from __future__ import annotations

from torch import nn

from coco_example.errors import RunError
from coco_example.models.detectors import selection_of
from coco_example.models.distillers import OwnHeadImitation, StandardisedImitation, WeightedImitation
from coco_example.options import Arm, Freeze, MethodOptions, Metric
from crosskd_assign import (
    AuxiliaryHead,
    CrossHeadDistiller,
    CrossHeadLoss,
    DetectorAdapter,
    Distiller,
    EndToEndDetector,
    OneToOneLoss,
    TaskAwareOneToOneAssigner,
    adapt,
)

__all__ = ["METRICS", "build_method", "freeze", "needs_teacher"]

METRICS: dict[Metric, TaskAwareOneToOneAssigner] = {
    "poto": TaskAwareOneToOneAssigner.poto(),
    "balanced": TaskAwareOneToOneAssigner.balanced(),
    "task-aligned": TaskAwareOneToOneAssigner.task_aligned(),
    "yolo": TaskAwareOneToOneAssigner.yolo(),
}


def needs_teacher(arm: Arm) -> bool:
    """Say whether an arm distils from a teacher."""
    return arm not in ("one-to-many", "one-to-one")


def build_method(options: MethodOptions, model: nn.Module, teacher: nn.Module | None = None) -> nn.Module:
    """Build a training method around a detector.

    Args:
        options: Which one.
        model: The detector to train.
        teacher: A trained one-to-many detector, for the arms that distil.

    Raises:
        RunError: The arm needs a teacher and has none.
        IncompatibleDetectorsError: The student cannot learn from this teacher.
    """
    # 1. Many positives an object: torchvision's own losses.
    if options.arm == "one-to-many":
        return model

    # 2. One positive an object.
    student = adapt(model)
    detector = EndToEndDetector(
        student,
        assigner=METRICS[options.metric],
        loss=OneToOneLoss(ranking=options.ranking),
        auxiliary=AuxiliaryHead(student, detach=options.detach) if options.auxiliary_head else None,
        selection=selection_of(model),
    )
    if options.arm == "one-to-one":
        return detector

    # 3. The same, and a teacher.
    if teacher is None:
        raise RunError(
            expected=f"a teacher for the arm {options.arm!r}", got="none", where="--teacher", fix="train one first"
        )
    return _distiller(options, detector, teacher)


def freeze(model: nn.Module, choice: Freeze) -> list[nn.Module]:
    """Freeze parts of a detector, and return them: their batch norm has to stay in evaluation mode, too."""
    names = {"none": (), "backbone": ("backbone",), "backbone-neck": ("backbone", "neck")}
    adapter = adapt(model)
    parts = [adapter.part(name) for name in names.get(choice, ("backbone", "neck", "head"))]
    for part in parts:
        part.requires_grad_(False)
    return parts


def _distiller(options: MethodOptions, student: EndToEndDetector, teacher: nn.Module | DetectorAdapter) -> Distiller:
    if options.arm == "feature-imitation":
        return StandardisedImitation(student, teacher, weight=options.imitation)
    if options.arm == "weighted-imitation":
        return WeightedImitation(student, teacher, weight=options.imitation)
    if options.arm == "own-head-imitation":
        loss = CrossHeadLoss(classification=options.distill_classification, box=options.distill_box)
        return OwnHeadImitation(student, teacher, loss=loss)
    return CrossHeadDistiller(
        student,
        teacher,
        loss=CrossHeadLoss(
            classification=options.distill_classification,
            box=options.distill_box,
            quality=options.distill_quality,
        ),
        feature_weight=options.distill_features,
        alignment=options.alignment,
        entry=options.entry,
    )
