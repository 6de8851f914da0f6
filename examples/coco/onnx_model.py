"""An exported detector, run by onnxruntime, as if it were a detector of the example."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from runs import RunError
from torch import Tensor
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from crosskd_assign import Detection
from crosskd_assign.geometry import clip, scale

__all__ = ["OnnxDetector"]


class OnnxDetector:
    """What ``export.py`` wrote. Called with images of any sizes, it returns their detections, best first.

    Args:
        path: The file.

    Raises:
        RunError: There is no such file, onnxruntime cannot read it, or ``export.py`` did not write it.

    Attributes:
        class_names: Name of each label.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise RunError(f"Expected an ONNX file, but got none ({path}). Fix: write one with export.py.")
        try:
            onnxruntime: Any = importlib.import_module("onnxruntime")
        except ImportError as error:
            fix = 'pip install "crosskd_assign[export]"'
            raise RunError(f"Expected onnxruntime, but got {error} (--model). Fix: {fix}.") from error
        try:
            self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a dozen types
            fix = "write it again with export.py"
            raise RunError(f"Expected a readable ONNX file, but got {error} ({path}). Fix: {fix}.") from error
        metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        missing = {
            "preprocessing",
            "class_names",
            "short_side",
            "long_side",
            "size_divisible",
            "image_mean",
        } - metadata.keys()
        if missing:
            raise RunError(
                f"Expected an ONNX file of export.py, but got one without {', '.join(sorted(missing))} ({path}). Fix: "
                "write one with export.py, or run this one yourself."
            )
        self.class_names = {int(label): str(name) for label, name in json.loads(metadata["class_names"]).items()}
        self._path = path
        self._inside = metadata["preprocessing"] == "inside"
        self._divisible = int(metadata["size_divisible"])
        self._mean = torch.tensor(json.loads(metadata["image_mean"])).view(3, 1, 1)
        sides = int(metadata["short_side"]), int(metadata["long_side"])
        self._transform = GeneralizedRCNNTransform(*sides, [], []).eval()

    def __call__(self, images: Sequence[Tensor]) -> list[Detection]:
        """Detections of images ``(3, H, W)`` in 0…1, in their pixels.

        Raises:
            RunError: The file takes images of another size only.
        """
        return [self._run(image) if self._inside else self._run_prepared(image) for image in images]

    def _run(self, image: Tensor) -> Detection:
        wanted = self._session.get_inputs()[0].shape
        shape = (1, *image.shape)
        if any(isinstance(w, int) and w != s for w, s in zip(wanted, shape, strict=True)):
            raise RunError(
                f"Expected images of shape {wanted}, but got {list(shape)} ({self._path}). Fix: export it without "
                "--size, or for the size of these pictures."
            )
        boxes, scores, labels = self._session.run(["boxes", "scores", "labels"], {"images": image[None].cpu().numpy()})
        return {
            "boxes": torch.from_numpy(boxes[0]),
            "scores": torch.from_numpy(scores[0]),
            "labels": torch.from_numpy(labels[0]),
        }

    def _run_prepared(self, image: Tensor) -> Detection:
        """Resize as the detector's own transform does, pad with the mean, and carry the boxes back."""
        small, _ = self._transform.resize(image.cpu(), None)
        height, width = small.shape[1:]
        *_, rows, columns = self._session.get_inputs()[0].shape
        d = self._divisible
        rows, columns = (w if isinstance(w, int) else -(-s // d) * d for w, s in ((rows, height), (columns, width)))
        if height > rows or width > columns:
            raise RunError(
                f"Expected pictures that fit into {rows} × {columns} px once resized, but got {height} × {width} "
                f"({self._path}). Fix: export it without --size."
            )
        canvas = self._mean.repeat(1, rows, columns)
        canvas[:, :height, :width] = small
        detection = self._run(canvas)
        boxes = clip(detection["boxes"], (height, width))
        return {**detection, "boxes": scale(boxes, (height, width), (image.shape[1], image.shape[2]))}
