"""A detector that is trained with one positive per object and detects without non-maximum suppression."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast, overload

from torch import Tensor, nn
from typing_extensions import override

from .assignment import TaskAwareOneToOneAssigner
from .auxiliary import AuxiliaryHead
from .detectors import DetectorAdapter, HeadEntry, PyramidEntry, adapt
from .errors import DetectorError
from .losses import OneToOneLoss
from .postprocessing import top_detections
from .structures import Assignment, Batch, DensePredictions, Detection, ForwardPass, Target
from .symptoms import FirstLook, worst_symptom
from .validation import validate_images, validate_option, validate_predictions, validate_targets

__all__ = ["EndToEndDetector"]


class EndToEndDetector(nn.Module):
    """Wraps a dense detector so that it needs no NMS; behaves like a torchvision detection model.

    In training mode ``detector(images, targets)`` returns a dict of weighted losses to be summed; in evaluation mode
    ``detector(images)`` returns ``[{"boxes", "scores", "labels"}]``, best first, in the coordinates of the images that
    came in. The score is the sigmoid of the class logit.

    Parameters that one-to-one training leaves without a gradient (FCOS's centerness) are frozen, so that
    ``DistributedDataParallel`` works without ``find_unused_parameters``.

    Args:
        model: torchvision's FCOS or RetinaNet, or a `DetectorAdapter`. It is wrapped, not copied: ``detector.model``.
        assigner: Picks the one positive point of each object: `TaskAwareOneToOneAssigner` () by default, or any
            callable of predictions and targets that returns an `Assignment`.
        loss: `OneToOneLoss` () by default, or any callable of predictions, targets and assignment that returns a dict.
        auxiliary: A second, one-to-many head on the same features, in training only.
        top_k: Detections returned for an image.
        score_threshold: Detections below this score are left out; 0 returns ``top_k`` for every image.

    Raises:
        OptionError: A number is out of range.
        UnknownDetectorError: No built-in adapter fits the model.
        DetectorError: The auxiliary head is another detector's.

    Example:
        >>> import torch
        >>> from torchvision.models.detection import fcos_resnet50_fpn
        >>> model = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=64)
        >>> detector = EndToEndDetector(model, top_k=7)
        >>> target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])}
        >>> sorted(detector([torch.rand(3, 64, 64)], [target]))
        ['bbox_regression', 'classification']
        >>> len(detector.eval()([torch.rand(3, 64, 64)])[0]["scores"])
        7
    """

    def __init__(
        self,
        model: nn.Module | DetectorAdapter,
        *,
        assigner: Callable[[DensePredictions, Sequence[Target]], Assignment] | None = None,
        loss: Callable[[DensePredictions, Sequence[Target], Assignment], dict[str, Tensor]] | None = None,
        auxiliary: AuxiliaryHead | None = None,
        top_k: int = 100,
        score_threshold: float = 0.0,
    ) -> None:
        super().__init__()
        validate_option("top_k", top_k, low=1)
        validate_option("score_threshold", score_threshold, low=0, high=1)
        self.adapter = adapt(model)
        self.assigner = TaskAwareOneToOneAssigner() if assigner is None else assigner
        self.loss = OneToOneLoss() if loss is None else loss
        if auxiliary is not None and auxiliary.model is not self.model:
            raise DetectorError(
                expected="an auxiliary head of the same detector",
                got=f"one of another {type(auxiliary.model).__name__}",
                where="auxiliary",
                fix="build both of one model: EndToEndDetector(model, auxiliary=AuxiliaryHead(model))",
            )
        self.auxiliary = auxiliary
        self.top_k = top_k
        self.score_threshold = score_threshold
        self.first_look = FirstLook()
        # Only the auxiliary head needs the features after the detector's own head has run on them.
        self._entry = PyramidEntry.unmeasured(edits_maps=auxiliary is not None and auxiliary.edits_features)
        for parameter in self.adapter.unused_parameters():
            parameter.requires_grad_(False)

    @property
    def model(self) -> nn.Module:
        """The network itself, e.g. to save its weights."""
        return self.adapter.model

    @property
    def stops_gradient(self) -> bool:
        """Whether one-to-one losses stop at the features, which then learn from the auxiliary head alone."""
        return self.auxiliary is not None and self.auxiliary.detach

    @overload
    def forward(self, images: Sequence[Tensor] | Tensor) -> list[Detection]: ...

    @overload
    def forward(
        self, images: Sequence[Tensor] | Tensor, targets: Sequence[Target] | None
    ) -> dict[str, Tensor] | list[Detection]: ...

    def forward(
        self, images: Sequence[Tensor] | Tensor, targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[Detection]:
        """Compute losses in training mode, detections in evaluation mode.

        Args:
            images: N tensors ``(3, H, W)`` in 0…1, of any sizes.
            targets: In training mode, N targets.

        Raises:
            ImageError: Images are not float ``(3, H, W)`` tensors.
            TargetError: Targets cannot be trained on.
            PredictionError: The adapter's predictions break their contract.
        """
        if self.training:
            return self.losses(self.run(images, targets))
        run = self.run(images)
        return self.detect(run.predictions, run.batch)

    def run(
        self,
        images: Sequence[Tensor] | Tensor,
        targets: Sequence[Target] | None = (),
        entry: HeadEntry | None = None,
    ) -> ForwardPass:
        """Run the detector on images, and keep what losses may look at.

        Args:
            images: N tensors ``(3, H, W)`` in 0…1, of any sizes.
            targets: In training mode, N targets.
            entry: The point of the head whose maps are kept in `ForwardPass.maps`; its beginning by default.

        Raises:
            ImageError: Images are not float ``(3, H, W)`` tensors.
            TargetError: In training mode: targets cannot be trained on.
            PredictionError: The adapter's predictions break their contract.
        """
        # 1. Images of one shape.
        validate_images(images)
        if self.training:
            validate_targets(targets, images)
        batch, moved = self.adapter.preprocess(images, targets or ())

        # 2. Features, and the maps at the entry of the head.
        entry = self._entry if entry is None else entry
        features = self.adapter.features(batch)
        maps = entry.maps(self.adapter, features)

        # 3. The rest of the head.
        own = [x.detach() for x in maps] if self.training and self.stops_gradient else maps
        predictions = entry.predict(self.adapter, own, batch.image_size)
        validate_predictions(predictions, where=f"{type(self.adapter).__name__}.head()", images=len(batch.images))
        return ForwardPass(batch, moved, features, maps, predictions)

    def losses(self, run: ForwardPass) -> dict[str, Tensor]:
        """Compute the weighted losses of one pass; the first time, warn of what looks wrong in it.

        Returns:
            Those of ``loss`` and, where there is an auxiliary head, its own with the prefix ``auxiliary_``.
        """
        self.first_look(worst_symptom, run)
        targets = cast("list[Target]", run.targets)  # validated: none is missing
        losses = self.loss(run.predictions, targets, self.assigner(run.predictions, targets))
        if self.auxiliary is None:
            return losses
        return losses | {f"auxiliary_{name}": loss for name, loss in self.auxiliary(run).items()}

    def detect(self, predictions: DensePredictions, batch: Batch) -> list[Detection]:
        """Select the ``top_k`` best detections of every image, in the coordinates of the images that came in."""
        scores, boxes, labels = top_detections(predictions, self.top_k)
        detections: list[Detection] = []
        for s, b, label in zip(scores, boxes, labels, strict=True):
            keep = slice(None) if self.score_threshold == 0 else s >= self.score_threshold
            detections.append({"boxes": b[keep], "scores": s[keep], "labels": label[keep]})
        return self.adapter.restore(detections, batch)

    @override
    def extra_repr(self) -> str:
        return f"assigner={self.assigner}, loss={self.loss}, top_k={self.top_k}, score_threshold={self.score_threshold}"
