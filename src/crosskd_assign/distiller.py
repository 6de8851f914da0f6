"""Cross-label-assignment knowledge distillation: a one-to-many teacher's frozen head judges a student's features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from typing_extensions import Self

from . import functional
from .alignment import Alignment, FeatureAligner
from .crossing import Crossing, Entrance, check_branches, cross_levels, missing_branch
from .detectors import DetectorAdapter, adapt
from .end_to_end import EndToEndDetector
from .errors import IncompatibleDetectorsError, MissingTeacherError, problem
from .structures import Batch, DensePredictions, Detection, Target
from .validation import check_images, check_option, check_predictions, check_targets

__all__ = ["CrossHeadDistiller"]


class CrossHeadDistiller(nn.Module):
    """Trains a one-to-one student with the help of a one-to-many teacher; behaves like a torchvision detection model.

    The student's feature pyramid, aligned to the teacher's, goes through the teacher's frozen head. What that head says
    there is pulled towards what it says on the teacher's own features, while the student's own head learns one-to-one
    assignment alone. In training mode ``distiller(images, targets)`` returns a dict of weighted losses to be summed; in
    evaluation mode ``distiller(images)`` returns NMS-free detections of the student.

    The teacher is frozen and in evaluation mode from construction on, whatever ``.train()`` says. It follows ``.to()``,
    ``.half()`` and their kin, but is no part of ``parameters()``, ``state_dict()``, copies and pickles: those hold the
    student and, where channels differ, the 1 × 1 convolutions between the two. Save the student alone with
    ``distiller.detector.model.state_dict()``.

    Args:
        student: torchvision's FCOS or RetinaNet, a `DetectorAdapter`, or an `EndToEndDetector` with options of its own.
        teacher: A trained one-to-many detector, torchvision's or a `DetectorAdapter`. Its class space may differ from
            the student's. It is frozen in place.
        classification_weight: Weight of the cross-head classification loss, at least 0.
        box_weight: Weight of the cross-head box loss, at least 0.
        quality_weight: Weight of the cross-head quality loss (centerness, objectness), at least 0; off by default.
        distribution_weight: Weight of the cross-head loss on distance bins, for heads that have them, at least 0; off
            by default.
        feature_weight: Weight of the imitation of the maps themselves beside what the head says on them, at least 0;
            off by default. Both together were ahead of either alone on the mean of three sets (docs/results.md).
        gamma: Exponent of the classification loss, 0 or at least 1.
        confidence_threshold: Teacher confidence from which a point counts in the normaliser, 0…1.
        alignment: "statistics" or "none"; see `FeatureAligner`.
        entry: Where the student enters the teacher's head. 0, the default: with its feature pyramid, which works for
            any two heads and leaves the student's own alone. k: behind the first k convolutions of its own head, which
            then learn from the teacher, too; for heads that can be split (`DetectorAdapter.max_entry`) and have
            branches of the same names.

    Raises:
        IncompatibleDetectorsError: The two share no level, are one and the same, or share parameters; a head cannot be
            split at ``entry``; a weighted term needs a branch that the teacher's head has not.

    Attributes:
        detector: The student as an `EndToEndDetector`: the thing to deploy.
        distillation_weight: Factor on all distillation losses, 1 at first; set it from a training loop to warm up or
            decay.
    """

    def __init__(
        self,
        student: nn.Module | DetectorAdapter | EndToEndDetector,
        teacher: nn.Module | DetectorAdapter,
        *,
        classification_weight: float = 1.0,
        box_weight: float = 1.0,
        quality_weight: float = 0.0,
        distribution_weight: float = 0.0,
        feature_weight: float = 0.0,
        gamma: float = 1.0,
        confidence_threshold: float = 0.05,
        alignment: Alignment = "statistics",
        entry: int = 0,
    ) -> None:
        super().__init__()
        check_option("classification_weight", classification_weight, low=0)
        check_option("box_weight", box_weight, low=0)
        check_option("quality_weight", quality_weight, low=0)
        check_option("distribution_weight", distribution_weight, low=0)
        check_option("feature_weight", feature_weight, low=0)
        check_option("confidence_threshold", confidence_threshold, low=0, high=1)
        if gamma != 0:
            check_option("gamma", gamma, low=1)  # between 0 and 1 the gradient is infinite where both heads agree
        self.detector = student if isinstance(student, EndToEndDetector) else EndToEndDetector(student)
        self.classification_weight = classification_weight
        self.box_weight = box_weight
        self.quality_weight = quality_weight
        self.distribution_weight = distribution_weight
        self.feature_weight = feature_weight
        self.gamma = gamma
        self.confidence_threshold = confidence_threshold
        self.distillation_weight = 1.0
        adapter = self.detector.adapter
        self._at_student = Entrance.of(adapter, entry, "student").tried(adapter)
        self._crossing: list[Crossing] = []
        self._teacher: tuple[DetectorAdapter] | None = None
        self.attach_teacher(teacher)
        self.aligner = FeatureAligner(
            [c.student_channels for c in self._crossing], [c.teacher_channels for c in self._crossing], alignment
        )
        parameter = next(self.detector.parameters(), None)
        if parameter is not None:
            self.aligner.to(device=parameter.device, dtype=parameter.dtype)

    # --- the teacher, present but not a part -------------------------------------------------------------------------

    @property
    def teacher(self) -> DetectorAdapter:
        """The frozen teacher.

        Raises:
            MissingTeacherError: This distiller is a copy or was unpickled.
        """
        if self._teacher is None:
            fix = "call distiller.attach_teacher(teacher), or use distiller.detector, which needs none"
            raise MissingTeacherError(problem("a teacher", "none: copies and pickles leave it behind", "teacher", fix))
        return self._teacher[0]

    def attach_teacher(self, teacher: nn.Module | DetectorAdapter) -> Self:
        """Freeze ``teacher`` and distil from it; needed after copying or unpickling a distiller.

        Raises:
            IncompatibleDetectorsError: It shares parameters with the student, its maps differ from those of the
                teacher this distiller was built for, or its head lacks a branch that a weighted term needs.
        """
        adapter = adapt(teacher)
        entrance = Entrance.of(adapter, self.entry, "teacher")
        crossing = cross_levels(self._at_student, entrance)
        if self._crossing not in ([], crossing):
            fix = "attach the teacher it was built with, or build a new CrossHeadDistiller"
            raise IncompatibleDetectorsError(problem(f"levels {self._crossing}", f"{crossing}", "teacher", fix))
        own = {id(parameter) for parameter in self.detector.parameters()}
        shared = [name for name, parameter in adapter.named_parameters() if id(parameter) in own]
        if shared:
            fix = "build teacher and student separately, e.g. with copy.deepcopy"
            got = f"{len(shared)} shared parameters, the first {shared[0]}"
            raise IncompatibleDetectorsError(problem("a teacher of its own", got, "teacher", fix))
        check_branches(adapter, {"quality": self.quality_weight, "distribution": self.distribution_weight})
        self._crossing, self._at_teacher = crossing, entrance.tried(adapter)
        # In a tuple, nn.Module does not register it.
        self._teacher = (adapter.eval().requires_grad_(False),)
        return self

    @property
    def entry(self) -> int:
        """How many convolutions of the student's head run before it enters the teacher's."""
        return self._at_student.entry

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self._teacher is not None:
            self._teacher[0]._apply(fn)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_teacher": None}

    # --- calls -------------------------------------------------------------------------------------------------------

    @overload
    def forward(self, images: Sequence[Tensor] | Tensor) -> list[Detection]: ...

    @overload
    def forward(
        self, images: Sequence[Tensor] | Tensor, targets: Sequence[Target] | None
    ) -> dict[str, Tensor] | list[Detection]: ...

    def forward(
        self, images: Sequence[Tensor] | Tensor, targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[Detection]:
        """Losses in training mode, detections of the student in evaluation mode.

        Args:
            images: N tensors ``(3, H, W)`` in 0…1, of any sizes.
            targets: In training mode, N targets.

        Returns:
            In training mode ``"classification"`` and ``"bbox_regression"`` of the student, and
            ``"distill_classification"``, ``"distill_bbox_regression"`` and, if weighted, ``"distill_quality"``,
            ``"distill_distribution"`` and ``"distill_features"``.

        Raises:
            ImageError: Images are not float ``(3, H, W)`` tensors.
            TargetError: Targets cannot be trained on.
            MissingTeacherError: In training mode, without a teacher.
        """
        if not self.training:
            return self.detector(images)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped
        check_images(images)
        check_targets(targets, images)
        student = self.detector.adapter
        batch, moved = student.preprocess(images, targets)
        features = student.features(batch)
        maps = self.entry_maps(features)
        if self.entry == 0:
            predictions = self.detector.predict(self._at_student.guarded(features), batch)
        else:
            predictions = self._at_student.predictions(student, maps, batch)
            check_predictions(predictions, where=f"{type(student).__name__}.head()", images=len(batch.images))
        losses = self.detector.losses(predictions, moved or [])
        return losses | self.distillation_losses(maps, predictions, batch)

    def entry_maps(self, features: list[Tensor]) -> list[Tensor]:
        """What the student brings to the teacher's head: its pyramid, or the maps behind ``entry`` of its convolutions.

        Args:
            features: The student's pyramid.

        Returns:
            The pyramid itself, or a map for every level of every branch, all levels of one branch after those of
            another.
        """
        return self._at_student.maps(self.detector.adapter, features)

    def distillation_losses(
        self, features: list[Tensor], predictions: DensePredictions, batch: Batch
    ) -> dict[str, Tensor]:
        """The weighted distillation losses; what a subclass overrides to distil in another way.

        Args:
            features: The student's `entry_maps`: its pyramid, unless ``entry`` was given.
            predictions: What the student's own head says on it; cross-head distillation leaves that head alone.
            batch: What the pyramid was made from.
        """
        del predictions
        maps = self._teacher_maps(batch)
        aligned = self.align(features, maps)
        teacher, cross = self._judged(aligned, maps, batch)
        losses = self.compare(cross, teacher)
        if self.feature_weight > 0:
            imitation = functional.feature_imitation_loss(aligned, maps)
            losses["distill_features"] = self.distillation_weight * self.feature_weight * imitation
        return losses

    def cross(self, features: list[Tensor], batch: Batch) -> tuple[DensePredictions, DensePredictions]:
        """What the teacher's head says on its own features, and what it says on the student's, with a graph.

        Args:
            features: The student's `entry_maps`.
            batch: What they were made from.
        """
        maps = self._teacher_maps(batch)
        return self._judged(self.align(features, maps), maps, batch)

    def _teacher_maps(self, batch: Batch) -> list[Tensor]:
        """What enters the teacher's head, or passes its ``entry``, without a graph."""
        with torch.no_grad():
            return self._at_teacher.maps(self.teacher, self.teacher_features(batch))

    def _judged(
        self, aligned: list[Tensor], maps: list[Tensor], batch: Batch
    ) -> tuple[DensePredictions, DensePredictions]:
        """What the teacher's head says on its own maps and on the student's; both stay as they are."""
        with torch.no_grad():
            on_teacher = self._at_teacher.predictions(self.teacher, maps, batch)
        where = f"teacher {type(self.teacher).__name__}.head()"
        check_predictions(on_teacher, where=where, images=len(batch.images))
        return on_teacher, self._at_teacher.predictions(self.teacher, aligned, batch)

    def teacher_features(self, batch: Batch) -> list[Tensor]:
        """The teacher's pyramid, without a graph."""
        if any(module.training for module in self.teacher.modules()):
            self.teacher.eval()  # somebody reached in; drifting batch-norm statistics would go unnoticed
        with torch.no_grad():
            return self.teacher.features(batch)

    def align(self, features: list[Tensor], teacher_features: list[Tensor]) -> list[Tensor]:
        """The student's pyramid, or its maps at ``entry``, in the form of the teacher's.

        A level that the student lacks is filled with the teacher's own: predictions agree there, and no gradient comes
        from it.
        """
        aligned = self.aligner(
            [features[c.student] for c in self._crossing], [teacher_features[c.teacher] for c in self._crossing]
        )
        pyramid = list(teacher_features)
        for crossed, x in zip(self._crossing, aligned, strict=True):
            pyramid[crossed.teacher] = x
        return pyramid

    def compare(self, predictions: DensePredictions, teacher: DensePredictions) -> dict[str, Tensor]:
        """The weighted losses that pull predictions towards the teacher's.

        Raises:
            IncompatibleDetectorsError: A weighted term needs a branch that the head has not.
        """
        confidence = functional.teacher_confidence(teacher.logits)
        normalizer = functional.distillation_normalizer(confidence, self.confidence_threshold)
        losses: dict[str, Tensor] = {}
        if self.classification_weight > 0:
            losses["distill_classification"] = self.classification_weight * (
                functional.cross_head_classification_loss(
                    predictions.logits, teacher.logits, normalizer=normalizer, gamma=self.gamma
                )
            )
        if self.box_weight > 0:
            losses["distill_bbox_regression"] = self.box_weight * functional.cross_head_box_loss(
                predictions.boxes, teacher.boxes, confidence, normalizer=normalizer
            )
        if self.quality_weight > 0:
            mine, reference = _had(predictions.quality, teacher.quality, "quality")
            losses["distill_quality"] = self.quality_weight * functional.cross_head_quality_loss(
                mine, reference, confidence, normalizer=normalizer
            )
        if self.distribution_weight > 0:
            mine, reference = _had(predictions.distribution, teacher.distribution, "distribution")
            losses["distill_distribution"] = self.distribution_weight * functional.cross_head_distribution_loss(
                mine, reference, confidence, normalizer=normalizer
            )
        return {name: self.distillation_weight * loss for name, loss in losses.items()}

    def extra_repr(self) -> str:
        """Shown by ``repr``: the teacher, too, although it is no submodule."""
        if self._teacher is None:
            return "teacher=None"
        model = self.teacher.model
        size = sum(parameter.numel() for parameter in model.parameters())
        return f"teacher={type(model).__name__} ({size / 1e6:.1f} M parameters, frozen)"


def _had(mine: Tensor | None, teacher: Tensor | None, branch: str) -> tuple[Tensor, Tensor]:
    """Both predictions of a branch, or an error that says it is missing."""
    if mine is None or teacher is None:
        raise missing_branch(branch, f"{branch}_weight")
    return mine, teacher
