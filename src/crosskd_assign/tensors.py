"""A detector as a function of tensors, which compilers and exporters can take."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from .distiller import CrossHeadDistiller
from .end_to_end import EndToEndDetector, top_detections
from .errors import OptionError, problem
from .structures import Batch, Detection

__all__ = ["TensorDetector"]

Preprocessing = Literal["inside", "outside"]


class TensorDetector(nn.Module):
    """A detector as a function of tensors, for ``torch.export``, ``torch.compile`` and `export_onnx`.

    ``forward(images)`` takes ``(N, 3, H, W)`` in 0…1 and returns ``boxes (N, K, 4)``, ``scores (N, K)`` descending and
    ``labels (N, K)``. K is ``top_k``, or all A · C where there are fewer. No threshold is applied: compare the scores
    with one afterwards. Weights and mode are the detector's own; call ``.eval()`` before tracing.

    Args:
        detector: The detector. Of a `CrossHeadDistiller` it is the student; the teacher is no part of it.
        preprocessing: "inside": images as they come, all of one size, which are resized and padded as
            ``detector(images)`` would; boxes are in their pixels. "outside": images already resized and padded to a
            multiple of ``adapter.size_divisible``, not normalised; boxes are in pixels of these. Padding should have
            the colour ``adapter.image_mean``, which normalisation turns into the zeros that the network was trained on.

    Raises:
        OptionError: ``preprocessing`` is neither.
    """

    def __init__(
        self, detector: EndToEndDetector | CrossHeadDistiller, *, preprocessing: Preprocessing = "inside"
    ) -> None:
        super().__init__()
        if preprocessing not in ("inside", "outside"):
            where, fix = "constructor argument", "choose one of the two"
            raise OptionError(problem('preprocessing "inside" or "outside"', repr(preprocessing), where, fix))
        student = detector.detector if isinstance(detector, CrossHeadDistiller) else detector
        self.adapter = student.adapter
        self.top_k = student.top_k
        self.preprocessing = preprocessing
        self.training = student.training

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``boxes``, ``scores`` and ``labels`` of a batch of images."""
        return self.detect(self.prepare(images))

    def prepare(self, images: Tensor) -> Batch:
        """What the network sees of images ``(N, 3, H, W)``; they share one entry of ``sizes``."""
        n, _, height, width = images.shape
        if self.preprocessing == "outside":
            size = ((height, width),)
            return Batch(images, size, size)
        # As one image of N · 3 channels: a loop over images would fix N.
        batch, _ = self.adapter.preprocess([images.flatten(0, 1)])
        return replace(batch, images=batch.images.reshape(n, 3, *batch.images.shape[-2:]))

    def detect(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """``boxes``, ``scores`` and ``labels`` of a prepared batch."""
        predictions = self.adapter.head(self.adapter.features(batch), batch)
        scores, boxes, labels = top_detections(predictions, self.top_k)
        together: Detection = {"boxes": boxes.flatten(0, 1), "scores": scores.flatten(), "labels": labels.flatten()}
        (restored,) = self.adapter.restore([together], batch)
        return restored["boxes"].reshape(boxes.shape), scores, labels

    def extra_repr(self) -> str:
        """Shown by ``repr``."""
        return f"top_k={self.top_k}, preprocessing={self.preprocessing!r}"
