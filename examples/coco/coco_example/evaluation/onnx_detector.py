"""Run an exported detector with onnxruntime, as if it were a detector of the example."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coco_example.data.annotations import Category
from coco_example.errors import MissingPackageError, RunError, first_line
from coco_example.models.score_thresholds import ScoreThresholds
from crosskd_assign.geometry import clip, scale
from crosskd_assign.postprocessing import suppress
from crosskd_assign.structures import Detection

__all__ = ["NMS_THRESHOLD", "OnnxDetector", "Preparation"]

NMS_THRESHOLD = 0.6  # torchvision's FCOS

# What `export.py` writes into the file.
_METADATA = frozenset({"preprocessing", "class_names", "short_side", "long_side", "size_divisible", "image_mean"})
_TOP_K = 1000  # of files that do not say; more than any has


class Preparation:
    """How images are resized and padded for a file of ``preprocessing="outside"``, as the detector's transform does.

    Args:
        metadata: Of the file.
    """

    def __init__(self, metadata: dict[str, str]) -> None:
        self.inside = metadata["preprocessing"] == "inside"
        self._divisible = int(metadata["size_divisible"])
        self._mean = torch.tensor(json.loads(metadata["image_mean"])).view(3, 1, 1)
        self._short_side, self._long_side = int(metadata["short_side"]), int(metadata["long_side"])

    def __call__(self, image: Tensor, shape: Sequence[Any]) -> tuple[Tensor, tuple[int, int]]:
        """Resize and pad an image; return it and its size without padding.

        Args:
            image: ``(3, H, W)`` in 0…1.
            shape: Of the file's input; open sizes are texts.

        Raises:
            RunError: The image does not fit into the file's size.
        """
        # 1. Resize.
        sides = image.shape[1:]
        ratio = min(self._short_side / min(sides), self._long_side / max(sides))
        height, width = (max(1, math.floor(side * ratio)) for side in sides)
        small = F.interpolate(image[None].cpu(), size=(height, width), mode="bilinear", align_corners=False)[0]

        # 2. Pad to the file's size, or to a multiple of what it wants.
        *_, rows, columns = shape
        d = self._divisible
        rows, columns = (w if isinstance(w, int) else -(-s // d) * d for w, s in ((rows, height), (columns, width)))
        if height > rows or width > columns:
            raise RunError(
                expected=f"pictures that fit into {rows} × {columns} px once resized",
                got=f"{height} × {width}",
                where="a file for prepared images",
                fix="export it without --size",
            )
        canvas = self._mean.repeat(1, rows, columns)
        canvas[:, :height, :width] = small
        return canvas, (height, width)


class OnnxDetector:
    """A file that ``export.py`` wrote. Called with images of any sizes, it returns their detections, best first.

    Args:
        path: The file.
        top_k: Detections of an image; None: the file's.
        threads: Of onnxruntime; 0: as many as it likes.

    Raises:
        RunError: There is no such file, onnxruntime cannot read it, or ``export.py`` did not write it.
        MissingPackageError: onnxruntime is not installed.

    Attributes:
        class_names: Name of each label.
        category_ids: Category id of each label; none in a file of an earlier version.
        thresholds: Score thresholds to use it with, if it has any.
        metadata: What the file says of itself.
        one_to_many: Whether it needs NMS, which is then run here.
        top_k: Detections of an image.
    """

    def __init__(self, path: Path, *, top_k: int | None = None, threads: int = 0) -> None:
        # 1. Open the file.
        self._path = path
        self._session = _session(path, threads)
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        missing = _METADATA - self.metadata.keys()
        if missing:
            raise RunError(
                expected="an ONNX file of export.py",
                got=f"one without {', '.join(sorted(missing))}",
                where=f"{path}",
                fix="write one with export.py, or run this one yourself",
            )

        # 2. Read how it wants its images.
        self.class_names = {int(label): str(name) for label, name in json.loads(self.metadata["class_names"]).items()}
        self.category_ids = {int(n): i for n, i in json.loads(self.metadata.get("category_ids", "{}")).items()}
        self.thresholds = self._thresholds()
        self.one_to_many = self.metadata.get("one_to_many") == "true"
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._prepare = Preparation(self.metadata)
        self._one_class = self.metadata.get("one_class_per_point") == "true"
        self.top_k = int(self.metadata.get("top_k", _TOP_K)) if top_k is None else top_k

    def _thresholds(self) -> ScoreThresholds | None:
        try:
            return ScoreThresholds.from_metadata(self.metadata)
        except (TypeError, ValueError) as error:
            raise RunError(
                expected="score thresholds of export.py",
                got=first_line(error),
                where=f"{self._path}",
                fix="write it again with export.py",
            ) from error

    @property
    def classes(self) -> list[Category] | None:
        """List the classes if labels are 1, 2, …; None of other labels, of which the category ids alone are known.

        Raises:
            RunError: The file does not say which category a label is.
        """
        if not self.category_ids:
            raise RunError(
                expected="an ONNX file with category ids",
                got="one that an older export.py wrote",
                where=f"{self._path}",
                fix="write it again",
            )
        if list(self.category_ids) != list(range(1, len(self.category_ids) + 1)):
            return None
        return [Category(category, self.class_names[label]) for label, category in self.category_ids.items()]

    def __call__(self, images: Sequence[Tensor]) -> list[Detection]:
        """Detect objects in images ``(3, H, W)`` in 0…1, in their pixels; with NMS where the detector needs it.

        Raises:
            RunError: The file takes images of another size only.
        """
        found = [self._detect(image) for image in images]
        return [self._suppressed(d, NMS_THRESHOLD) if self.one_to_many else self._cut(d) for d in found]

    def detect_twice(
        self, images: Sequence[Tensor], *, nms_threshold: float
    ) -> tuple[list[Detection], list[Detection]]:
        """Detect objects without and with NMS; ten times as many enter it where outputs are dense."""
        found = [self._detect(image) for image in images]
        return [self._cut(d) for d in found], [self._suppressed(d, nms_threshold) for d in found]

    def run(self, image: Tensor) -> dict[str, Tensor]:
        """Run the file on one image that is as it wants it; outputs by name, without the axis of images.

        Raises:
            RunError: The file takes images of another size only, or cannot be run on this one.
        """
        wanted = self._session.get_inputs()[0].shape
        shape = (1, *image.shape)
        if any(isinstance(w, int) and w != s for w, s in zip(wanted, shape, strict=True)):
            raise RunError(
                expected=f"images of shape {wanted}",
                got=f"{list(shape)}",
                where=f"{self._path}",
                fix="export it without --size, or for the size of these pictures",
            )
        try:
            outputs = self._session.run(self._outputs, {"images": image[None].cpu().numpy()})
        except Exception as error:  # onnxruntime has a dozen types
            raise RunError(
                expected="images that the file can be run on",
                got=f"{list(shape)}: {first_line(error)}",
                where=f"{self._path}",
                fix="leave the picture out, or bring it to a usual shape",
            ) from error
        return {name: torch.from_numpy(x[0]) for name, x in zip(self._outputs, outputs, strict=True)}

    def prepare(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Bring an image to what the file takes; return it and its size without padding."""
        if self._prepare.inside:
            return image, (image.shape[1], image.shape[2])
        return self._prepare(image, self._session.get_inputs()[0].shape)

    def _cut(self, d: Detection) -> Detection:
        k = slice(self.top_k)
        return {"boxes": d["boxes"][k], "scores": d["scores"][k], "labels": d["labels"][k]}

    def _suppressed(self, d: Detection, nms_threshold: float) -> Detection:
        return suppress(d, nms_threshold, top_k=self.top_k)

    def _detect(self, image: Tensor) -> Detection:
        """Detect objects in pixels of an image that comes in; of dense outputs as many as may enter NMS."""
        canvas, size = self.prepare(image)
        found = self.run(canvas)
        if "labels" in found:
            detection = Detection(boxes=found["boxes"], scores=found["scores"], labels=found["labels"])
        else:
            detection = _best(found, max(1000, 10 * self.top_k), one_class_per_point=self._one_class)
        if self._prepare.inside:
            return detection
        boxes = clip(detection["boxes"], size)
        return {**detection, "boxes": scale(boxes, size, (image.shape[1], image.shape[2]))}


def _best(found: dict[str, Tensor], k: int, *, one_class_per_point: bool) -> Detection:
    """Select the best pairs of point and class of dense outputs, or of each point's best class alone."""
    if one_class_per_point:
        scores, labels = found["scores"].max(dim=1)
        scores, point = scores.topk(min(k, len(scores)))
        return {"boxes": found["boxes"][point], "scores": scores, "labels": labels[point]}
    scores, order = found["scores"].flatten().topk(min(k, found["scores"].numel()))
    classes = found["scores"].shape[1]
    point = torch.div(order, classes, rounding_mode="floor")
    return {"boxes": found["boxes"][point], "scores": scores, "labels": order % classes}


def _session(path: Path, threads: int) -> Any:
    if not path.is_file():
        raise RunError(expected="an ONNX file", got="none", where=f"{path}", fix="write one with export.py")
    try:
        onnxruntime: Any = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingPackageError(
            expected="onnxruntime", got=f"{error}", where="--model", fix='pip install "crosskd_assign[export]"'
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a dozen types
        raise RunError(
            expected="a readable ONNX file",
            got=first_line(error),
            where=f"{path}",
            fix="write it again with export.py",
        ) from error
