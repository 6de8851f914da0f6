"""A detector that is trained with one positive per object and detects without non-maximum suppression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor, nn

from . import functional
from .assigner import TaskAwareOneToOneAssigner
from .detectors import DetectorAdapter, adapt
from .functional import mean_over_ranks
from .geometry import at_least_float32
from .structures import Assignment, Batch, DensePredictions, Detection, Target
from .validation import check_images, check_option, check_predictions, check_targets

__all__ = ["EndToEndDetector", "top_detections"]


class EndToEndDetector(nn.Module):
    """Wraps a dense detector so that it needs no NMS; behaves like a torchvision detection model.

    In training mode ``detector(images, targets)`` returns a dict of weighted losses to be summed; in evaluation mode
    ``detector(images)`` returns ``[{"boxes", "scores", "labels"}]``, best first, in the coordinates of the images that
    came in. The score is the sigmoid of the class logit.

    Parameters that one-to-one training leaves without a gradient (FCOS's centerness) are frozen, so that
    ``DistributedDataParallel`` works without ``find_unused_parameters``.

    Args:
        model: torchvision's FCOS or RetinaNet, or a `DetectorAdapter`. It is wrapped, not copied: ``detector.model``.
        assigner: Picks the one positive point of each object; default `TaskAwareOneToOneAssigner` ().
        classification_weight: Weight of the focal loss, at least 0.
        box_weight: Weight of the GIoU loss, at least 0. 2 as in POTO (Wang et al., CVPR 2021).
        ranking_weight: Weight of `functional.one_to_one_ranking_loss`, at least 0; off by default.
        focal_alpha: α of the focal loss, 0…1.
        focal_gamma: γ of the focal loss, at least 0.
        top_k: Detections returned for an image.
        score_threshold: Detections below this score are left out; 0 returns ``top_k`` for every image.
    """

    def __init__(
        self,
        model: nn.Module | DetectorAdapter,
        *,
        assigner: TaskAwareOneToOneAssigner | None = None,
        classification_weight: float = 1.0,
        box_weight: float = 2.0,
        ranking_weight: float = 0.0,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        top_k: int = 100,
        score_threshold: float = 0.0,
    ) -> None:
        super().__init__()
        check_option("classification_weight", classification_weight, low=0)
        check_option("box_weight", box_weight, low=0)
        check_option("ranking_weight", ranking_weight, low=0)
        check_option("focal_alpha", focal_alpha, low=0, high=1)
        check_option("focal_gamma", focal_gamma, low=0)
        check_option("top_k", top_k, low=1)
        check_option("score_threshold", score_threshold, low=0, high=1)
        self.adapter = adapt(model)
        self.assigner = TaskAwareOneToOneAssigner() if assigner is None else assigner
        self.classification_weight = classification_weight
        self.box_weight = box_weight
        self.ranking_weight = ranking_weight
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma
        self.top_k = top_k
        self.score_threshold = score_threshold
        self.assignment: Assignment | None = None
        for parameter in self.adapter.unused_parameters():
            parameter.requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The network itself, e.g. to save its weights."""
        return self.adapter.model

    @overload
    def forward(self, images: Sequence[Tensor] | Tensor) -> list[Detection]: ...

    @overload
    def forward(
        self, images: Sequence[Tensor] | Tensor, targets: Sequence[Target] | None
    ) -> dict[str, Tensor] | list[Detection]: ...

    def forward(
        self, images: Sequence[Tensor] | Tensor, targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[Detection]:
        """Losses in training mode, detections in evaluation mode.

        Args:
            images: N tensors ``(3, H, W)`` in 0…1, of any sizes.
            targets: In training mode, N targets.

        Raises:
            ImageError: Images are not float ``(3, H, W)`` tensors.
            TargetError: Targets cannot be trained on.
            PredictionError: The adapter's predictions break their contract.
        """
        check_images(images)
        if not self.training:
            batch, _ = self.adapter.preprocess(images)
            return self.detect(self.predict(self.adapter.features(batch), batch), batch)
        check_targets(targets, images)
        batch, moved = self.adapter.preprocess(images, targets)
        return self.losses(self.predict(self.adapter.features(batch), batch), moved or [])

    def predict(self, features: list[Tensor], batch: Batch) -> DensePredictions:
        """The head's predictions on a feature pyramid, checked."""
        predictions = self.adapter.head(features, batch)
        check_predictions(predictions, where=f"{type(self.adapter).__name__}.head()", images=len(batch.images))
        return predictions

    def losses(self, predictions: DensePredictions, targets: Sequence[Target]) -> dict[str, Tensor]:
        """One-to-one losses of predictions; keeps the `Assignment` in ``self.assignment`` for inspection.

        Args:
            predictions: Of N images.
            targets: N targets in pixels of the batch image.

        Returns:
            ``"classification"``, ``"bbox_regression"`` and, if weighted, ``"ranking"``, divided by the matched boxes
            averaged over ranks.
        """
        assignment = self.assigner(predictions, targets)
        self.assignment = assignment
        labels, boxes = matched_targets(assignment, targets)
        count = mean_over_ranks(predictions.boxes.new_tensor(float(len(assignment)), dtype=torch.float32))
        normalizer = count.clamp(min=1)
        classification = functional.one_to_one_classification_loss(
            predictions.logits,
            assignment,
            labels,
            normalizer=normalizer,
            alpha=self.focal_alpha,
            gamma=self.focal_gamma,
        )
        box = functional.one_to_one_box_loss(predictions.boxes, assignment, boxes, normalizer=normalizer)
        losses = {
            "classification": self.classification_weight * classification,
            "bbox_regression": self.box_weight * box,
        }
        if self.ranking_weight > 0:
            losses["ranking"] = self.ranking_weight * functional.one_to_one_ranking_loss(
                predictions.logits, predictions.boxes, assignment, labels, boxes, normalizer=normalizer
            )
        return losses

    def detect(self, predictions: DensePredictions, batch: Batch) -> list[Detection]:
        """The ``top_k`` best detections of every image, in the coordinates of the images that came in."""
        scores, boxes, labels = top_detections(predictions, self.top_k)
        detections: list[Detection] = []
        for s, b, label in zip(scores, boxes, labels, strict=True):
            keep = slice(None) if self.score_threshold == 0 else s >= self.score_threshold
            detections.append({"boxes": b[keep], "scores": s[keep], "labels": label[keep]})
        return self.adapter.restore(detections, batch)

    def extra_repr(self) -> str:
        """Shown by ``repr``."""
        return f"assigner={self.assigner}, top_k={self.top_k}, score_threshold={self.score_threshold}"


def matched_targets(assignment: Assignment, targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
    """Labels ``(M,)`` and boxes ``(M, 4)`` of the matched pairs of a batch."""
    device = assignment.image.device
    counts = torch.tensor([0, *(len(target["boxes"]) for target in targets)], device=device)
    index = counts.cumsum(0)[assignment.image] + assignment.target
    return (
        torch.cat([target["labels"] for target in targets])[index],
        torch.cat([target["boxes"] for target in targets])[index],
    )


def top_detections(predictions: DensePredictions, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``k`` best (point, class) pairs of every image; all there is to do instead of NMS.

    Args:
        predictions: Of N images.
        k: Pairs to keep; fewer if there are fewer.

    Returns:
        ``scores (N, k)`` descending, ``boxes (N, k, 4)`` in pixels of the batch image, ``labels (N, k)``.
    """
    _, a, c = predictions.logits.shape
    # A pair among the k best has a point among the k best points: a full sort of A · C values is never needed.
    points = predictions.logits.amax(dim=-1).topk(_at_most(k, a), dim=1).indices  # (N, p)
    candidates = predictions.logits.gather(1, points[..., None].expand(-1, -1, c)).flatten(1)  # (N, p · C)
    logits, index = candidates.topk(_at_most(k, candidates.shape[1]), dim=1)
    point = points.gather(1, torch.div(index, c, rounding_mode="floor"))  # (N, k)
    boxes = predictions.boxes.gather(1, point[..., None].expand(-1, -1, 4))
    return at_least_float32(logits).sigmoid(), boxes, index % c


def _at_most(k: int, size: int) -> int:
    """``min``, which leaves a size open that a tracer has left open."""
    return min(k, size) if isinstance(size, int) else torch.sym_min(k, size)
