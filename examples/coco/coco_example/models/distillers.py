"""Other ways of distilling, to compare cross-head distillation with: features, and the student's own head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crosskd_assign import (
    CrossHeadLoss,
    DetectorAdapter,
    Distiller,
    EndToEndDetector,
    functional,
)
from crosskd_assign.distillation import FeatureAligner
from crosskd_assign.errors import IncompatibleDetectorsError
from crosskd_assign.structures import ForwardPass

__all__ = ["OwnHeadImitation", "StandardisedImitation", "WeightedImitation"]


class _FeatureImitation(Distiller):
    """Distils feature pyramids, the student's brought to the teacher's channels; subclasses compare them.

    Args:
        student: The detector to train.
        teacher: A trained one-to-many detector.
        weight: Weight of the loss.
    """

    def __init__(self, student: EndToEndDetector, teacher: nn.Module | DetectorAdapter, *, weight: float = 1.0) -> None:
        super().__init__(student, teacher)
        self.weight = weight
        self.aligner = FeatureAligner(self.levels, alignment="none")


class StandardisedImitation(_FeatureImitation):
    """Half the squared difference of standardised feature maps: PKD (Cao et al., NeurIPS 2022), no head involved."""

    def distill(self, run: ForwardPass) -> dict[str, Tensor]:
        """Compute `functional.feature_imitation_loss`, a sum over levels."""
        teacher = self.teacher_maps(run.batch)
        return {"features": self.weight * functional.feature_imitation_loss(self.aligner(run.maps, teacher), teacher)}


class WeightedImitation(_FeatureImitation):
    """Squared difference of feature maps, weighted by the teacher's best class score: the idea of Ultralytics' (2026).

    Theirs is multiplied by the batch size, as its other losses are; ours, like the others here, is not.
    """

    def distill(self, run: ForwardPass) -> dict[str, Tensor]:
        """Compute the sum over levels of Σ w (s − t)² / (C · Σ w)."""
        # 1. How sure the teacher is of each point, level by level.
        teacher, predictions = self.teacher_pass(run.batch)
        confidence = functional.teacher_confidence(predictions.logits)  # (N, A)
        per_level = torch.split(confidence, [len(level) for level in predictions.levels or ()], dim=1)

        # 2. A mean of squared differences in which sure points count more.
        losses = []
        for s, t, w in zip(self.aligner(run.maps, teacher), teacher, per_level, strict=True):
            n, channels, height, width = t.shape
            weight = w.view(n, 1, height, width, -1).amax(dim=-1)  # of several anchors, the surest
            losses.append(((s.float() - t.float()) ** 2 * weight).sum() / (weight.sum() * channels + 1e-9))
        return {"features": self.weight * torch.stack(losses).sum()}


class OwnHeadImitation(Distiller):
    """Dense prediction mimicking: the student's own head imitates the one-to-many teacher's.

    Args:
        student: The detector to train.
        teacher: A trained one-to-many detector with as many points and classes.
        loss: How both predictions are compared.
    """

    def __init__(self, student: EndToEndDetector, teacher: nn.Module | DetectorAdapter, *, loss: CrossHeadLoss) -> None:
        super().__init__(student, teacher, branches=loss.branches)
        self.loss = loss

    def distill(self, run: ForwardPass) -> dict[str, Tensor]:
        """Compute the cross-head losses on the student's own predictions."""
        _, teacher = self.teacher_pass(run.batch)
        if run.predictions.logits.shape != teacher.logits.shape:
            own, other = (tuple(p.logits.shape[1:]) for p in (run.predictions, teacher))
            raise IncompatibleDetectorsError(
                expected="a student with the points and classes of its teacher",
                got=f"{own} and {other}",
                where="own-head-imitation",
                fix="give both one architecture, or train with cross-head, which needs neither",
            )
        return self.loss(run.predictions, teacher)
