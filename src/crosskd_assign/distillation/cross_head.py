"""Cross-head distillation: the frozen head of a one-to-many teacher runs on the features of a one-to-one student."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .. import functional
from ..detectors import DetectorAdapter
from ..end_to_end import EndToEndDetector
from ..losses import CrossHeadLoss
from ..structures import DensePredictions, ForwardPass
from ..validation import validate_option
from .aligner import Alignment, FeatureAligner
from .distiller import Distiller

__all__ = ["CrossHeadDistiller"]


class CrossHeadDistiller(Distiller):
    """Trains a one-to-one student with the help of a one-to-many teacher (CAKD).

    The student's maps, aligned to the teacher's, go through the teacher's frozen head. What that head predicts on them
    is pulled towards what it predicts on the teacher's own maps, while the student's own head learns one-to-one
    assignment alone. See `Distiller` for how it is called and where the teacher lives.

    Source: cross-label-assignment knowledge distillation, J. Computer Research and Development,
    DOI 10.7544/issn1000-1239.202550737.

    Args:
        student: torchvision's FCOS or RetinaNet, a `DetectorAdapter`, or an `EndToEndDetector` with options of its own.
        teacher: A trained one-to-many detector, torchvision's or a `DetectorAdapter`. Its class space may differ from
            the student's. It is frozen in place.
        loss: What is compared, and how: `CrossHeadLoss` () by default, or any callable of the two predictions that
            returns a dict of losses.
        feature_weight: Weight of `functional.feature_imitation_loss` between the aligned maps, at least 0; off by
            default. Both together were ahead of either alone on the mean of three sets (docs/results.md).
        alignment: "statistics" or "none"; see `FeatureAligner`.
        entry: Where the student enters the teacher's head. 0, the default: with its feature pyramid, which works for
            any two heads and leaves the student's own alone. k: behind the first k convolutions of its own head, which
            then learn from the teacher, too; for heads that can be split (`DetectorAdapter.max_entry`) and have
            branches of the same names.

    Raises:
        IncompatibleDetectorsError: The two share no level, are one and the same, or share parameters; a head cannot be
            split at ``entry``; a weighted term of the loss needs a branch that the teacher's head lacks.

    Example:
        >>> import torch
        >>> from torchvision.models.detection import fcos_resnet50_fpn
        >>> options = dict(weights=None, weights_backbone=None, num_classes=3, min_size=64)
        >>> distiller = CrossHeadDistiller(fcos_resnet50_fpn(**options), fcos_resnet50_fpn(**options))
        >>> target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])}
        >>> losses = distiller([torch.rand(3, 64, 64)], [target])
        >>> sorted(losses)
        ['bbox_regression', 'classification', 'distill_bbox_regression', 'distill_classification']
    """

    def __init__(
        self,
        student: nn.Module | DetectorAdapter | EndToEndDetector,
        teacher: nn.Module | DetectorAdapter,
        *,
        loss: Callable[[DensePredictions, DensePredictions], dict[str, Tensor]] | None = None,
        feature_weight: float = 0.0,
        alignment: Alignment = "statistics",
        entry: int = 0,
    ) -> None:
        validate_option("feature_weight", feature_weight, low=0)
        loss = CrossHeadLoss() if loss is None else loss
        super().__init__(student, teacher, entry=entry, branches=getattr(loss, "branches", ()))
        self.loss = loss
        self.feature_weight = feature_weight
        self.aligner = FeatureAligner(self.levels, alignment)
        parameter = next(self.detector.parameters(), None)
        if parameter is not None:
            self.aligner.to(device=parameter.device, dtype=parameter.dtype)

    def distill(self, run: ForwardPass) -> dict[str, Tensor]:
        """Compute the cross-head losses and, if weighted, that of feature imitation."""
        # 1. The teacher on its own maps, without a graph.
        maps, expected = self.teacher_pass(run.batch)

        # 2. Its head on the student's maps, with one.
        aligned = self.aligner(run.maps, maps)
        cross = self.run_teacher_head(aligned, run.batch.image_size)

        # 3. Pull the second towards the first.
        losses = self.loss(cross, expected)
        if self.feature_weight > 0:
            losses = {**losses, "features": self.feature_weight * functional.feature_imitation_loss(aligned, maps)}
        return losses
