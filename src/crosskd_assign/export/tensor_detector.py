"""A detector as a function of tensors, which compilers and exporters can take."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor, nn
from typing_extensions import override

from ..detectors import adapt
from ..distillation import Distiller
from ..end_to_end import EndToEndDetector
from ..errors import OptionError
from ..geometry import at_least_float32
from ..postprocessing import top_detections
from ..selection import ranking_logits
from ..structures import Batch, DensePredictions, Detection
from ..validation import validate_choice

__all__ = ["OUTPUT_NAMES", "Outputs", "Preprocessing", "TensorDetector"]

Preprocessing = Literal["inside", "outside"]
Outputs = Literal["detections", "dense"]
OUTPUT_NAMES: dict[Outputs, tuple[str, ...]] = {
    "detections": ("boxes", "scores", "labels"),
    "dense": ("boxes", "scores"),
}


class TensorDetector(nn.Module):
    """A detector as a function of tensors, for ``torch.export``, ``torch.compile`` and `export_onnx`.

    ``forward(images)`` takes ``(N, 3, H, W)`` in 0…1 and returns ``boxes (N, K, 4)``, ``scores (N, K)`` descending and
    ``labels (N, K)``. K is ``top_k``, or all A · C where there are fewer. No threshold is applied: compare the scores
    with one afterwards. Weights, mode, ``one_class_per_point`` and ``classes`` are the detector's own; call ``.eval()``
    before tracing.

    With dense outputs it returns everything that is predicted, ``boxes (N, A, 4)`` and ``scores (N, A, C)``, and the
    host selects, one class a point and ``classes`` with it: for runtimes without top-k or gather.

    Args:
        detector: The detector, or a model or adapter that is to be an `EndToEndDetector` with its defaults. Of a
            `Distiller` it is the student; the teacher is no part of it.
        preprocessing: "inside": images as they come, all of one size, which are resized and padded as
            ``detector(images)`` would; boxes are in their pixels. "outside": images already resized and padded to a
            multiple of ``adapter.size_divisible``, not normalised; boxes are in pixels of these. Padding should have
            the colour ``adapter.image_mean``, which normalisation turns into the zeros that the network was trained on.
        outputs: "detections": the best, selected. "dense": all.
        one_to_many: Score as a detector that needs NMS does, by √(class · quality) where it has a quality branch. It
            has dense outputs only, on which the host runs NMS.

    Raises:
        OptionError: ``preprocessing`` or ``outputs`` is neither, or a one-to-many detector has detections for outputs
            or a selection branch.
        UnknownDetectorError: No built-in adapter fits the model.

    Example:
        >>> import torch
        >>> from torchvision.models.detection import fcos_resnet50_fpn
        >>> model = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=64)
        >>> boxes, scores, labels = TensorDetector(EndToEndDetector(model, top_k=7).eval())(torch.rand(2, 3, 64, 64))
        >>> tuple(boxes.shape), tuple(scores.shape)
        ((2, 7, 4), (2, 7))
    """

    def __init__(
        self,
        detector: nn.Module,
        *,
        preprocessing: Preprocessing = "inside",
        outputs: Outputs = "detections",
        one_to_many: bool = False,
    ) -> None:
        super().__init__()
        validate_choice("preprocessing", preprocessing, ("inside", "outside"))
        validate_choice("outputs", outputs, ("detections", "dense"))
        student = detector.detector if isinstance(detector, Distiller) else detector
        self.adapter = adapt(student)
        self.selection, self.top_k = None, 100  # as `EndToEndDetector` has them by default
        self.one_class_per_point, self.classes = False, None
        if isinstance(student, EndToEndDetector):
            self.selection, self.top_k = student.selection, student.top_k
            self.one_class_per_point, self.classes = student.one_class_per_point, student.classes
        if one_to_many and (outputs == "detections" or self.selection is not None):
            raise OptionError(
                expected='outputs "dense" of a one-to-many detector without a selection branch',
                got=f"{outputs}" if self.selection is None else "a selection branch",
                where="one_to_many",
                fix='pass outputs="dense" and run NMS on the host, or convert the detector to one without NMS',
            )
        self.preprocessing = preprocessing
        self.outputs = outputs
        self.one_to_many = one_to_many
        self.training = student.training

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Detect on a batch of images: ``boxes``, ``scores`` and, unless outputs are dense, ``labels``."""
        return self.detect(self.prepare(images))

    def prepare(self, images: Tensor) -> Batch:
        """Bring images ``(N, 3, H, W)`` to the form the network takes; they share one entry of ``sizes``."""
        n, _, height, width = images.shape
        if self.preprocessing == "outside":
            size = ((height, width),)
            return Batch(images, size, size)
        # As one image of N · 3 channels: a loop over images would fix N.
        batch, _ = self.adapter.preprocess([images.flatten(0, 1)])
        return Batch(batch.images.reshape(n, 3, *batch.images.shape[-2:]), batch.sizes, batch.original_sizes)

    def predict(self, batch: Batch) -> DensePredictions:
        """Predict on a prepared batch; scores are those that detections get."""
        features = self.adapter.features(batch)
        if self.selection is None:
            predictions = self.adapter.head(features, batch.image_size)
            if self.one_to_many:
                return replace(predictions, logits=ranking_logits(predictions), quality=None)
            return predictions
        # On copies, because a head may edit the maps, and the branch reads them. A graph leaves needless ones out.
        predictions = self.adapter.head([x.clone() for x in features], batch.image_size)
        return self.selection(features, predictions)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    def detect(self, batch: Batch) -> tuple[Tensor, ...]:
        """Detect on a prepared batch: ``boxes``, ``scores`` and, unless outputs are dense, ``labels``."""
        # 1. Select, or keep all.
        predictions = self.predict(batch)
        if self.outputs == "dense":
            scores, boxes = at_least_float32(predictions.logits).sigmoid(), predictions.boxes
            together: Detection = {"boxes": boxes.flatten(0, 1), "scores": scores, "labels": scores}
        else:
            scores, boxes, labels = top_detections(
                predictions, self.top_k, one_class_per_point=self.one_class_per_point, classes=self.classes
            )
            together = {"boxes": boxes.flatten(0, 1), "scores": scores.flatten(), "labels": labels.flatten()}

        # 2. Boxes in the images' pixels.
        (restored,) = self.adapter.restore([together], batch)
        outputs = restored["boxes"].reshape(boxes.shape), scores
        return outputs if self.outputs == "dense" else (*outputs, labels)

    def count(self, points: int, classes: int) -> int:
        """Count the detections of an image with so many points and classes."""
        competing = 1 if self.one_class_per_point else classes if self.classes is None else len(self.classes)
        return min(self.top_k, points * competing)

    @override
    def extra_repr(self) -> str:
        text = f"top_k={self.top_k}, one_class_per_point={self.one_class_per_point}, classes={self.classes}"
        return f"{text}, preprocessing={self.preprocessing!r}, outputs={self.outputs!r}"
