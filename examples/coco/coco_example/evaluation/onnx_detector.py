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

from coco_example.errors import MissingPackageError, RunError, first_line
from coco_example.models.score_thresholds import ScoreThresholds
from crosskd_assign.geometry import clip, scale
from crosskd_assign.structures import Detection

__all__ = ["OnnxDetector"]


# What `export.py` writes into the file.
_METADATA = frozenset({"preprocessing", "class_names", "short_side", "long_side", "size_divisible", "image_mean"})


class OnnxDetector:
    """A file that ``export.py`` wrote. Called with images of any sizes, it returns their detections, best first.

    Args:
        path: The file.

    Raises:
        RunError: There is no such file, onnxruntime cannot read it, or ``export.py`` did not write it.
        MissingPackageError: onnxruntime is not installed.

    Attributes:
        class_names: Name of each label.
        category_ids: Category id of each label; none in a file of an earlier version.
        thresholds: Score thresholds to use it with, if it has any.
        top_k: Detections of an image; None where that depends on its size.
    """

    def __init__(self, path: Path) -> None:
        # 1. Open the file.
        self._path = path
        self._session = _session(path)
        metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        missing = _METADATA - metadata.keys()
        if missing:
            raise RunError(
                expected="an ONNX file of export.py",
                got=f"one without {', '.join(sorted(missing))}",
                where=f"{path}",
                fix="write one with export.py, or run this one yourself",
            )

        # 2. Read how it wants its images.
        self.class_names = {int(label): str(name) for label, name in json.loads(metadata["class_names"]).items()}
        self.category_ids = {int(n): i for n, i in json.loads(metadata.get("category_ids", "{}")).items()}
        try:
            self.thresholds = ScoreThresholds.from_metadata(metadata)
        except (TypeError, ValueError) as error:
            raise RunError(
                expected="score thresholds of export.py",
                got=first_line(error),
                where=f"{path}",
                fix="write it again with export.py",
            ) from error
        outputs = {output.name: output.shape for output in self._session.get_outputs()}
        k = outputs["scores"][1]
        self.top_k: int | None = k if isinstance(k, int) else None
        self._inside = metadata["preprocessing"] == "inside"
        self._divisible = int(metadata["size_divisible"])
        self._mean = torch.tensor(json.loads(metadata["image_mean"])).view(3, 1, 1)
        self._short_side, self._long_side = int(metadata["short_side"]), int(metadata["long_side"])

    def __call__(self, images: Sequence[Tensor]) -> list[Detection]:
        """Detect objects in images ``(3, H, W)`` in 0…1, in their pixels.

        Raises:
            RunError: The file takes images of another size only.
        """
        return [self._run(image) if self._inside else self._run_prepared(image) for image in images]

    def _run(self, image: Tensor) -> Detection:
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
            outputs = self._session.run(["boxes", "scores", "labels"], {"images": image[None].cpu().numpy()})
        except Exception as error:  # onnxruntime has a dozen types
            raise RunError(
                expected="images that the file can be run on",
                got=f"{list(shape)}: {first_line(error)}",
                where=f"{self._path}",
                fix="leave the picture out, or bring it to a usual shape",
            ) from error
        boxes, scores, labels = outputs
        return {
            "boxes": torch.from_numpy(boxes[0]),
            "scores": torch.from_numpy(scores[0]),
            "labels": torch.from_numpy(labels[0]),
        }

    def _run_prepared(self, image: Tensor) -> Detection:
        """Resize as the detector's own transform does, pad with the mean, and carry the boxes back."""
        # 1. Resize.
        sides = image.shape[1:]
        ratio = min(self._short_side / min(sides), self._long_side / max(sides))
        height, width = (max(1, math.floor(side * ratio)) for side in sides)
        small = F.interpolate(image[None].cpu(), size=(height, width), mode="bilinear", align_corners=False)[0]

        # 2. Pad to the file's size, or to a multiple of what it wants.
        *_, rows, columns = self._session.get_inputs()[0].shape
        d = self._divisible
        rows, columns = (w if isinstance(w, int) else -(-s // d) * d for w, s in ((rows, height), (columns, width)))
        if height > rows or width > columns:
            raise RunError(
                expected=f"pictures that fit into {rows} × {columns} px once resized",
                got=f"{height} × {width}",
                where=f"{self._path}",
                fix="export it without --size",
            )
        canvas = self._mean.repeat(1, rows, columns)
        canvas[:, :height, :width] = small

        # 3. Detect, in pixels of the image that came in.
        detection = self._run(canvas)
        boxes = clip(detection["boxes"], (height, width))
        return {**detection, "boxes": scale(boxes, (height, width), (image.shape[1], image.shape[2]))}


def _session(path: Path) -> Any:
    if not path.is_file():
        raise RunError(expected="an ONNX file", got="none", where=f"{path}", fix="write one with export.py")
    try:
        onnxruntime: Any = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingPackageError(
            expected="onnxruntime", got=f"{error}", where="--model", fix='pip install "crosskd_assign[export]"'
        ) from error
    try:
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a dozen types
        raise RunError(
            expected="a readable ONNX file",
            got=first_line(error),
            where=f"{path}",
            fix="write it again with export.py",
        ) from error
