"""A detector that is trained with one positive per object and detects without non-maximum suppression."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn
from typing_extensions import Self, override

from .assignment import Assigner, TaskAwareOneToOneAssigner, how_to_begin
from .auxiliary import AuxiliaryHead
from .detectors import DetectorAdapter, HeadEntry, PyramidEntry, adapt
from .errors import DetectorError
from .losses import OneToOneLoss
from .postprocessing import top_detections
from .selection import SelectionBranch
from .structures import Assignment, Batch, DensePredictions, Detection, ForwardPass, Target, labelled
from .symptoms import FirstLook, worst_symptom
from .transfer import Transfer
from .validation import (
    validate_classes,
    validate_images,
    validate_labels,
    validate_option,
    validate_pixels,
    validate_precision,
    validate_predictions,
    validate_targets,
)

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
            callable of predictions and targets that returns an `Assignment`. If its class defines ``begin`` as well,
            as that one does, an accelerator works on while the host waits and matches.
        loss: `OneToOneLoss` () by default, or any callable of predictions, targets and assignment that returns a dict.
        auxiliary: A second, one-to-many head on the same features, in training only.
        selection: A branch that sees each score beside its neighbours' and multiplies it, for a detector that was
            trained one-to-many. The score is the product then, and its quality branch is trained along if it is a part.
        top_k: Detections returned for an image.
        score_threshold: Detections below this score are left out; 0 returns ``top_k`` for every image.
        one_class_per_point: Let each point report its best class only: one detection at most.
        classes: Labels to detect; the others are left out before the ``top_k`` are selected. None: all.

    Raises:
        OptionError: A number is out of range.
        UnknownDetectorError: No built-in adapter fits the model.
        DetectorError: The auxiliary head or the selection branch is another detector's.

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

    _begun: _Begun | None = None  # the pass whose losses have been started

    def __init__(
        self,
        model: nn.Module | DetectorAdapter,
        *,
        assigner: Assigner | None = None,
        loss: Callable[[DensePredictions, Sequence[Target], Assignment], dict[str, Tensor]] | None = None,
        auxiliary: AuxiliaryHead | None = None,
        selection: SelectionBranch | None = None,
        top_k: int = 100,
        score_threshold: float = 0.0,
        one_class_per_point: bool = False,
        classes: Iterable[int] | None = None,
    ) -> None:
        super().__init__()
        validate_option("top_k", top_k, low=1)
        validate_option("score_threshold", score_threshold, low=0, high=1)
        self.adapter = adapt(model)
        self.assigner = TaskAwareOneToOneAssigner() if assigner is None else assigner
        self.loss = OneToOneLoss() if loss is None else loss
        for name, part in (("auxiliary", auxiliary), ("selection", selection)):
            if part is not None and part.model is not self.model:
                kind = type(part).__name__
                raise DetectorError(
                    expected=f"{name} of the same detector",
                    got=f"one of another {type(part.model).__name__}",
                    where=name,
                    fix=f"build both of one model: EndToEndDetector(model, {name}={kind}(model))",
                )
        self.auxiliary = auxiliary
        self.selection = selection
        self.top_k = top_k
        self.score_threshold = score_threshold
        self.one_class_per_point = one_class_per_point
        self.classes = None if classes is None else validate_classes(classes)
        self.first_look = FirstLook()
        # Only these need the features after the detector's own head has run on them.
        edits_maps = any(part is not None and part.edits_features for part in (auxiliary, selection))
        self._entry = PyramidEntry.unmeasured(edits_maps=edits_maps)
        if selection is None or selection.class_score:  # else the product has a quality branch in it
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
            validate_labels(targets)
            return self.losses(self.run(images, targets))
        run = self.run(images)
        return self.detect(run.predictions, run.batch)

    def run(
        self,
        images: Sequence[Tensor] | Tensor,
        targets: Sequence[Target | None] | None = (),
        entry: HeadEntry | None = None,
    ) -> ForwardPass:
        """Run the detector on images, and keep what losses may look at.

        Args:
            images: N tensors ``(3, H, W)`` in 0…1, of any sizes.
            targets: In training mode, N targets, None for an image without labels.
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
        validate_precision(batch.images, self.adapter.parameters())
        if self.training and batch.images.device.type == "cpu":
            validate_pixels(_pixel_sums(batch))  # before batch norm counts them; elsewhere it would have to wait

        # 2. Features, and the maps at the entry of the head.
        entry = self._entry if entry is None else entry
        features = self.adapter.features(batch)
        maps = entry.maps(self.adapter, features)

        # 3. The rest of the head.
        stops = self.training and self.stops_gradient
        own = [x.detach() for x in maps] if stops else maps
        predictions = entry.predict(self.adapter, own, batch.image_size)
        validate_predictions(predictions, where=f"{type(self.adapter).__name__}.head()", images=len(batch.images))
        predictions = self.select([x.detach() for x in features] if stops else features, predictions)
        return ForwardPass(batch, moved, features, maps, predictions)

    def select(self, features: Sequence[Tensor], predictions: DensePredictions) -> DensePredictions:
        """Multiply the scores by those of the selection branch; without one, return the predictions as they are."""
        return predictions if self.selection is None else self.selection(features, predictions)

    def begin(self, run: ForwardPass) -> bool:
        """Start what `losses` would wait for, on an accelerator and with an assigner that can be begun.

        Returns:
            Whether something is under way now, so that it pays to queue other work before `losses` is asked for.
        """
        waits = run.predictions.boxes.device.type != "cpu" and how_to_begin(self.assigner) is not None
        self._begun = _Begun.of(run, self.assigner) if waits else None
        return waits

    def losses(self, run: ForwardPass) -> dict[str, Tensor]:
        """Compute the weighted losses of one pass, without images that have no labels.

        The first time, warn of what looks wrong in it.

        Returns:
            Those of ``loss`` and, where there is an auxiliary head, its own with the prefix ``auxiliary_``.

        Raises:
            ImageError: Pixels are not finite.
            TargetError: A box or label has an impossible value.
        """
        self.first_look(worst_symptom, run)
        # 1. One positive for each object. By then the sums have arrived with what the assigner waits for.
        begun, self._begun = self._begun, None
        if begun is None or begun.run is not run:
            begun = _Begun.of(run, self.assigner)
        assignment = begun.assignment()
        validate_pixels(begun.sums.wait())

        # 2. The losses.
        losses = self.loss(begun.predictions, begun.targets, assignment)
        others = {} if self.auxiliary is None else self.auxiliary(run)
        return losses | {f"auxiliary_{name}": loss for name, loss in others.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_begun": None}

    def detect(self, predictions: DensePredictions, batch: Batch) -> list[Detection]:
        """Return the ``top_k`` best detections of every image, in the coordinates of the images that came in."""
        scores, boxes, labels = top_detections(
            predictions, self.top_k, one_class_per_point=self.one_class_per_point, classes=self.classes
        )
        detections: list[Detection] = []
        for s, b, label in zip(scores, boxes, labels, strict=True):
            keep = slice(None) if self.score_threshold == 0 else s >= self.score_threshold
            detections.append({"boxes": b[keep], "scores": s[keep], "labels": label[keep]})
        return self.adapter.restore(detections, batch)

    @override
    def extra_repr(self) -> str:
        names = ("assigner", "loss", "top_k", "score_threshold", "one_class_per_point", "classes")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


@dataclass(frozen=True)
class _Begun:
    """What the losses of a pass wait for, under way."""

    run: ForwardPass
    predictions: DensePredictions  # of the images with labels
    targets: list[Target]
    sums: Transfer
    assignment: Callable[[], Assignment]

    @classmethod
    def of(cls, run: ForwardPass, assigner: Assigner) -> Self:
        predictions, targets = labelled(run.predictions, run.targets)
        sums = Transfer(_pixel_sums(run.batch))
        begin = how_to_begin(assigner)
        assignment = begin(predictions, targets) if begin else partial(assigner, predictions, targets)
        return cls(run, predictions, targets, sums, assignment)


def _pixel_sums(batch: Batch) -> Tensor:
    """Sum each image's pixels, ``(N,)`` float32: the cheapest look at all of them."""
    return batch.images.detach().flatten(1).sum(dim=1, dtype=torch.float32)
