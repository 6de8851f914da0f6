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


def build_method(
    options: MethodOptions,
    model: nn.Module,
    teacher: nn.Module | None = None,
    classes: tuple[int, ...] | None = None,
) -> nn.Module:
    """Build a training method around a detector.

    Args:
        options: Which one.
        model: The detector to train.
        teacher: A trained one-to-many detector, for the arms that distil.
        classes: The labels that the data have, where they are not all of the detector's.

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
        loss=OneToOneLoss(ranking=options.ranking, classes=classes),
        auxiliary=AuxiliaryHead(student, detach=options.detach, classes=classes) if options.auxiliary_head else None,
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
    # 1. Parts that have names.
    names: dict[Freeze, tuple[str, ...]] = {
        "none": (),
        "backbone": ("backbone",),
        "backbone-neck": ("backbone", "neck"),
        "all": ("backbone", "neck", "head"),
    }
    adapter, branch = adapt(model), selection_of(model)
    parts = [adapter.part(name) for name in names[choice] if choice != "all" or name in adapter.parts()]
    for part in parts:
        part.requires_grad_(False)
    if choice != "all":
        return parts

    # 2. All the rest, named or not, but for the branch.
    done = {module for part in (*parts, *(() if branch is None else (branch,))) for module in part.modules()}
    for module in set(adapter.modules()) - done:
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
    leaves = [x for x in adapter.modules() if x not in done and not list(x.children())]
    return parts + [x for x in leaves if [*x.parameters(), *x.buffers()]]


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
