"""Detect objects in pictures with a finished run or an exported file, and draw what was found.

python examples/coco/predict.py --run runs/demo/student --output runs/demo/pictures data/demo/val
python examples/coco/predict.py --model student.onnx --output runs/demo/pictures data/demo/val
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from arms import Arm
from onnx_model import OnnxDetector
from pictures import draw_predictions
from PIL import Image
from runs import RunError, load_model, write_json
from torch import Tensor
from torchvision.transforms import v2

from crosskd_assign import Detection, adapt
from crosskd_assign.diagnostics import one_to_many_detections

__all__ = ["find_images", "load_run", "main", "picture_paths", "predict", "read_image"]

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Image files among ``paths`` and in the folders among them, sorted within each folder.

    Raises:
        RunError: A path does not exist, or there is no image at all.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise RunError(f"Expected pictures or folders, but got nothing there ({path}). Fix: check the path.")
        found += [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
    if not found:
        raise RunError(f"Expected pictures, but got none ({', '.join(map(str, paths))}). Fix: name a folder of images.")
    return found


def picture_paths(images: Sequence[Path], folder: Path) -> list[Path]:
    """A PNG file in ``folder`` for each image, numbered where several have one name.

    Raises:
        RunError: It would replace one of the images.
    """
    paths: dict[Path, None] = {}  # in order
    for image in images:
        numbers = itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
        names = (folder / f"{image.stem}{number}.png" for number in numbers)
        paths[next(path for path in names if path not in paths)] = None
    lost = {path.resolve() for path in paths} & {image.resolve() for image in images}
    if lost:
        raise RunError(
            f"Expected a folder of its own for the pictures, but got one where they would replace images "
            f"({min(lost)}). Fix: choose another --output."
        )
    return list(paths)


def read_image(path: Path) -> Tensor:
    """Pixels of an image file, ``(3, H, W)`` float32 in 0…1.

    Raises:
        RunError: It is no readable image.
    """
    try:
        with Image.open(path) as image:
            pixels = v2.functional.pil_to_tensor(image.convert("RGB"))
    except Exception as error:  # damaged files raise nearly anything
        raise RunError(f"Expected a readable image, but got {error} ({path}). Fix: replace or remove it.") from error
    scaled: Tensor = v2.functional.to_dtype(pixels, torch.float32, scale=True)
    return scaled


def predict(arm: Arm, images: Sequence[Tensor], *, nms_threshold: float | None = None) -> list[Detection]:
    """Detections of a few images, without NMS unless a threshold is given."""
    predictions, batch = arm.predict(images)
    return one_to_many_detections(arm.adapter, predictions, batch, nms_threshold=nms_threshold)


def load_run(run: Path, device: str) -> tuple[Callable[[Sequence[Tensor]], list[Detection]], dict[int, str]]:
    """The detector of a run, and the name of each of its labels.

    Raises:
        RunError: The folder holds no finished run.
    """
    model, spec = load_model(run)
    arm = Arm(model.to(device), adapt(model), one_to_many=spec.one_to_many).eval()
    nms_threshold = 0.6 if spec.one_to_many else None  # only a one-to-many detector needs it
    return partial(predict, arm, nms_threshold=nms_threshold), spec.label_to_name


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, nargs="+", help="pictures, or folders of them")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="folder of a finished run")
    source.add_argument("--model", type=Path, help="ONNX file that export.py wrote; runs on the CPU")
    parser.add_argument("--output", type=Path, required=True, help="folder for detections.json and pictures")
    parser.add_argument("--score-threshold", type=float, default=0.3, help="leave out weaker detections (0.3)")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures at a time (8)")
    parser.add_argument("--limit", type=int, default=None, help="pictures to look at; default all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    options = parser.parse_args(arguments)
    try:
        paths = find_images(options.images)[: options.limit]
        pictures = picture_paths(paths, options.output)
        if options.model is None:
            detect, class_names = load_run(options.run, options.device)
        else:
            detect = exported = OnnxDetector(options.model)
            class_names = exported.class_names
        options.output.mkdir(parents=True, exist_ok=True)
        rows: list[dict[str, Any]] = []
        for start in range(0, len(paths), options.batch_size):
            chunk = paths[start : start + options.batch_size]
            images = [read_image(path) for path in chunk]
            detections = detect([image.to(options.device) for image in images])
            for n, (path, image, detection) in enumerate(zip(chunk, images, detections, strict=True), start):
                strong = _above(detection, options.score_threshold)
                names = [class_names.get(label, str(label)) for label in strong["labels"].tolist()]
                boxes, scores = strong["boxes"].tolist(), strong["scores"].tolist()
                rows.append({"image": str(path), "boxes": boxes, "scores": scores, "names": names})
                title = f"{path.name}: {len(names)} found"
                draw_predictions(pictures[n], [image], [(title, [strong])], class_names, 0.0)
        write_json(options.output / "detections.json", rows)
    except ValueError as error:  # everything that is the user's to mend
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"pictures": len(rows), "objects": sum(len(r["names"]) for r in rows), "in": str(options.output)}))
    return 0


def _above(detection: Detection, threshold: float) -> Detection:
    keep = (detection["scores"] >= threshold).cpu()
    return {
        "boxes": detection["boxes"].cpu()[keep],
        "scores": detection["scores"].cpu()[keep],
        "labels": detection["labels"].cpu()[keep],
    }


if __name__ == "__main__":
    raise SystemExit(main())
