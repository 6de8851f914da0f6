"""The base of all distillation: a student, and a frozen teacher that is no part of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from ..detectors import DetectorAdapter, Probe, adapt, measure_entry, probe_detector
from ..end_to_end import EndToEndDetector
from ..errors import IncompatibleDetectorsError, MissingTeacherError, OptionError, PredictionError
from ..structures import Batch, DensePredictions, Detection, ForwardPass, Target
from ..symptoms import FirstLook, symptom_of_teacher
from ..validation import describe, validate_predictions
from .aligner import MatchedLevel, match_levels

__all__ = ["Distiller"]


class Distiller(nn.Module, ABC):
    """A one-to-one student and a frozen teacher; behaves like a torchvision detection model.

    In training mode ``distiller(images, targets)`` returns a dict of weighted losses to be summed; in evaluation mode
    ``distiller(images)`` returns NMS-free detections of the student. A way of distilling is a subclass with one method,
    `distill`; `CrossHeadDistiller` is the one of this project.

    The teacher is frozen and in evaluation mode from construction on, whatever ``.train()`` does. It follows ``.to()``,
    ``.half()`` and their kin, but is no part of ``parameters()``, ``state_dict()``, copies and pickles: those hold the
    student and what a subclass adds. Save the student alone with ``distiller.detector.model.state_dict()``.

    Args:
        student: torchvision's FCOS or RetinaNet, a `DetectorAdapter`, or an `EndToEndDetector` with options of its own.
        teacher: A trained one-to-many detector, torchvision's or a `DetectorAdapter`. It is frozen in place.
        entry: Convolutions of the student's head that run before its maps are compared with the teacher's, or enter the
            teacher's head; 0 for the feature pyramids.
        branches: Optional branches ("quality", "distribution") that the teacher's head has to have.

    Raises:
        IncompatibleDetectorsError: The two share no level, are one and the same, or share parameters; a head cannot be
            split at ``entry``; the teacher's head lacks a branch.

    Attributes:
        detector: The student as an `EndToEndDetector`: the thing to deploy.
        distillation_weight: Factor on all distillation losses, 1 at first; set it in a training loop, e.g. to `fade`.
        student_entry: The point of the student's head that ``entry`` names.
        teacher_entry: The same of the teacher.
        levels: The maps that both have there.

    Example:
        >>> from crosskd_assign import functional
        >>> class OwnHeadImitation(Distiller):
        ...     def distill(self, run):
        ...         _, expected = self.teacher_pass(run.batch)
        ...         loss = functional.cross_head_classification_loss(
        ...             run.predictions.logits, expected.logits, normalizer=100.0
        ...         )
        ...         return {"classification": loss}
        >>> from torchvision.models.detection import fcos_resnet50_fpn
        >>> options = dict(weights=None, weights_backbone=None, num_classes=3, min_size=64)
        >>> distiller = OwnHeadImitation(fcos_resnet50_fpn(**options), fcos_resnet50_fpn(**options))
        >>> target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])}
        >>> sorted(distiller([torch.rand(3, 64, 64)], [target]))
        ['bbox_regression', 'classification', 'distill_classification']
    """

    def __init__(
        self,
        student: nn.Module | DetectorAdapter | EndToEndDetector,
        teacher: nn.Module | DetectorAdapter,
        *,
        entry: int = 0,
        branches: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self.detector = student if isinstance(student, EndToEndDetector) else EndToEndDetector(student)
        self.distillation_weight = 1.0
        self.branches = tuple(branches)
        adapter = self.detector.adapter
        self.student_entry = measure_entry(adapter, entry, probe_detector(adapter), "student")
        if self.student_entry.convolutions and self.detector.stops_gradient:
            raise OptionError(
                expected="entry of 0 with an auxiliary head that is the only one to reach the features (detach=True)",
                got=f"{entry}",
                where="constructor argument",
                fix="leave out one of the two",
            )
        self.levels: list[MatchedLevel] = []
        self._teacher: tuple[DetectorAdapter] | None = None
        self.attach_teacher(teacher)

    # --- the teacher, present but not a part -------------------------------------------------------------------------

    @property
    def teacher(self) -> DetectorAdapter:
        """The frozen teacher.

        Raises:
            MissingTeacherError: This distiller is a copy or was unpickled.
        """
        if self._teacher is None:
            raise MissingTeacherError(
                expected="a teacher",
                got="none: copies and pickles leave it behind",
                where="teacher",
                fix="call distiller.attach_teacher(teacher), or use distiller.detector, which needs none",
            )
        return self._teacher[0]

    def attach_teacher(self, teacher: nn.Module | DetectorAdapter) -> Self:
        """Freeze ``teacher`` and distil from it; needed after copying or unpickling a distiller.

        Raises:
            IncompatibleDetectorsError: It shares parameters with the student, its maps differ from those of the
                teacher this distiller was built for, or its head lacks a branch.
        """
        # 1. Do the maps fit, and are they those this distiller was built for?
        adapter = adapt(teacher)
        probe = probe_detector(adapter)
        entry = measure_entry(adapter, self.student_entry.convolutions, probe, "teacher")
        levels = match_levels(self.student_entry, entry)
        if self.levels not in ([], levels):
            raise IncompatibleDetectorsError(
                expected=f"levels {self.levels}",
                got=f"{levels}",
                where="teacher",
                fix=f"attach the teacher it was built with, or build a new {type(self).__name__}",
            )

        # 2. Is it another network than the student, with the branches that the loss needs?
        own = {id(parameter) for parameter in self.detector.parameters()}
        shared = [name for name, parameter in adapter.named_parameters() if id(parameter) in own]
        if shared:
            raise IncompatibleDetectorsError(
                expected="a teacher of its own",
                got=f"{len(shared)} shared parameters, the first {shared[0]}",
                where="teacher",
                fix="build teacher and student separately, e.g. with copy.deepcopy",
            )
        _validate_branches(probe, self.branches, f"teacher {type(adapter).__name__}.head()")

        # 3. Freeze it. In a tuple, nn.Module does not register it.
        self.levels, self.teacher_entry, self.first_look = levels, entry, FirstLook()
        self._teacher = (adapter.eval().requires_grad_(False),)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self._teacher is not None:
            self._teacher[0]._apply(fn)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_teacher": None}

    # --- the flow ----------------------------------------------------------------------------------------------------

    @overload
    def forward(self, images: Sequence[Tensor] | Tensor) -> list[Detection]: ...

    @overload
    def forward(
        self, images: Sequence[Tensor] | Tensor, targets: Sequence[Target | None] | None
    ) -> dict[str, Tensor] | list[Detection]: ...

    def forward(
        self, images: Sequence[Tensor] | Tensor, targets: Sequence[Target | None] | None = None
    ) -> dict[str, Tensor] | list[Detection]:
        """Compute losses in training mode, detections of the student in evaluation mode.

        Args:
            images: N tensors ``(3, H, W)`` in 0…1, of any sizes.
            targets: In training mode, N targets. None for an image without labels: it is distilled on, and no
                background for the detector's own losses.

        Returns:
            In training mode the losses of `EndToEndDetector` and, with the prefix ``distill_``, those of `distill`.

        Raises:
            ImageError: Images are not float ``(3, H, W)`` tensors.
            TargetError: Targets cannot be trained on.
            MissingTeacherError: In training mode, without a teacher.
            PredictionError: A head, or a subclass's `distill`, returned something else than it should.
        """
        if not self.training:
            return self.detector(images)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped
        if self.teacher.training:  # asked before the student runs: its batch norm would count a batch that is refused
            self.teacher.eval()
        run = self.detector.run(images, targets, self.student_entry)
        if self.detector.begin(run):  # an accelerator works on the teacher while the host waits and matches
            distilled = self.distill(run)
            losses = self.detector.losses(run)
        else:
            losses = self.detector.losses(run)
            distilled = self.distill(run)
        _validate_losses(distilled, f"{type(self).__name__}.distill()")
        return losses | {f"distill_{name}": self.distillation_weight * loss for name, loss in distilled.items()}

    @abstractmethod
    def distill(self, run: ForwardPass) -> dict[str, Tensor]:
        """Compute the losses of one pass, scalars by name, neither prefixed nor weighted; what a subclass writes."""

    def teacher_maps(self, batch: Batch) -> list[Tensor]:
        """Compute the teacher's maps at its entry, without a graph."""
        if any(module.training for module in self.teacher.modules()):
            self.teacher.eval()  # the caller put the teacher in training mode; batch-norm statistics would drift
        with torch.no_grad():
            return self.teacher_entry.maps(self.teacher, self.teacher.features(batch))

    def run_teacher_head(self, maps: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        """Run the teacher's head from its entry on; with a graph, if ``maps`` have one. They are not modified.

        Args:
            maps: The teacher's own, or the student's in their form.
            image_size: ``(height, width)`` in pixels of the padded images that the maps were made from.

        Raises:
            PredictionError: The predictions break the contract of `DensePredictions`.
        """
        predictions = self.teacher_entry.predict(self.teacher, maps, image_size)
        where = f"teacher {type(self.teacher).__name__}.head()"
        validate_predictions(predictions, where=where, images=len(maps[0]))
        return predictions

    def teacher_pass(self, batch: Batch) -> tuple[list[Tensor], DensePredictions]:
        """Compute the teacher's maps and predictions on a batch, without a graph; the first time, look at them."""
        maps = self.teacher_maps(batch)
        with torch.no_grad():
            predictions = self.run_teacher_head(maps, batch.image_size)
        if self.training:
            self.first_look(symptom_of_teacher, predictions)
        return maps, predictions

    @override
    def extra_repr(self) -> str:
        if self._teacher is None:
            return "teacher=None"
        model = self.teacher.model
        size = sum(parameter.numel() for parameter in model.parameters())
        return f"teacher={type(model).__name__} ({size / 1e6:.1f} M parameters, frozen)"


def _validate_losses(losses: object, where: str) -> None:
    """Raise `PredictionError` unless a subclass returned scalars by name."""
    if isinstance(losses, Mapping):
        wrong = {name: loss for name, loss in losses.items() if not isinstance(loss, Tensor) or loss.dim() > 0}
        if not wrong:
            return
        name, loss = next(iter(wrong.items()))
        got = f"{describe(loss)} under {name!r}"
    else:
        got = describe(losses)
    raise PredictionError(
        expected="a dict of scalar tensors", got=got, where=where, fix='return e.g. {"features": loss.mean()}'
    )


def _validate_branches(probe: Probe, needed: Iterable[str], where: str) -> None:
    """Raise `IncompatibleDetectorsError` if a teacher's head lacks a branch that a loss needs."""
    for name in sorted(set(needed) - probe.branches):
        raise IncompatibleDetectorsError(
            expected=f"a head that predicts {name}", got="none", where=where, fix=f"leave the loss's {name} weight at 0"
        )
