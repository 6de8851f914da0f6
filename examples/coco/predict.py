"""Detect objects in pictures with a finished run or an exported file, and draw what was found.

python examples/coco/predict.py --run runs/demo/student --output runs/demo/pictures data/demo/val
python examples/coco/predict.py --model student.onnx --output runs/demo/pictures data/demo/val
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from coco_example.commands import CommandParser, run_command
from coco_example.errors import RunError
from coco_example.evaluation.evaluation import NMS_THRESHOLD, Detector, on_cpu
from coco_example.evaluation.onnx_detector import OnnxDetector
from coco_example.figures.draw import draw_predictions
from coco_example.files import write_json
from coco_example.models.saved_model import load_model
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from crosskd_assign import adapt
from crosskd_assign.structures import Detection

__all__ = ["find_images", "load_run", "main", "picture_paths", "read_image"]

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def find_images(paths: Sequence[Path]) -> list[Path]:
    """List image files among ``paths`` and in the folders among them, sorted within each folder.

    Raises:
        RunError: A path does not exist, or there is no image at all.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise RunError(expected="pictures or folders", got="nothing there", where=f"{path}", fix="check the path")
        found += [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
    if not found:
        raise RunError(expected="pictures", got="none", where=", ".join(map(str, paths)), fix="name a folder of images")
    return found


def picture_paths(images: Sequence[Path], folder: Path) -> list[Path]:
    """Choose a PNG file in ``folder`` for each image, numbered where several have one name.

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
            expected="a folder of its own for the pictures",
            got="one where they would replace images",
            where=f"{min(lost)}",
            fix="choose another --output",
        )
    return list(paths)


def read_image(path: Path) -> Tensor:
    """Read the pixels of an image file, ``(3, H, W)`` float32 in 0…1.

    Raises:
        RunError: It is no readable image.
    """
    try:
        with Image.open(path) as image:
            pixels = v2.functional.pil_to_tensor(image.convert("RGB"))
    except Exception as error:  # damaged files raise nearly anything
        raise RunError(
            expected="a readable image", got=f"{error}", where=f"{path}", fix="replace or remove it"
        ) from error
    scaled: Tensor = v2.functional.to_dtype(pixels, torch.float32, scale=True)
    return scaled


def load_run(run: Path, device: str) -> tuple[Callable[[Sequence[Tensor]], list[Detection]], dict[int, str]]:
    """Load the detector of a run, and the name of each of its labels.

    Raises:
        RunError: The folder holds no finished run.
    """
    model, spec = load_model(run)
    detector = Detector(adapt(model.to(device)), ranking="class_quality" if spec.one_to_many else "class")
    nms_threshold = NMS_THRESHOLD if spec.one_to_many else None  # only a one-to-many detector needs it
    return partial(detector.detect, nms_threshold=nms_threshold), spec.label_to_name


def above(detection: Detection, threshold: float) -> Detection:
    """Leave out detections that score less than a threshold."""
    keep = detection["scores"] >= threshold
    return {"boxes": detection["boxes"][keep], "scores": detection["scores"][keep], "labels": detection["labels"][keep]}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, nargs="+", help="pictures, or folders of them")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="folder of a finished run")
    source.add_argument("--model", type=Path, help="ONNX file that export.py wrote; runs on the CPU")
    parser.add_argument("--output", type=Path, required=True, help="folder for detections.json and pictures")
    parser.add_argument("--score-threshold", type=float, default=0.3, help="leave out detections that score less (0.3)")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures at a time (8)")
    parser.add_argument("--limit", type=int, default=None, help="number of pictures; default all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device to run on")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Detect, draw and write; return the rows of ``detections.json``.

    Raises:
        RunError: A picture, run or file cannot be read, or a picture would be replaced.
    """
    # 1. Pictures, and where they go.
    paths = find_images(options.images)[: options.limit]
    pictures = picture_paths(paths, options.output)

    # 2. The detector.
    if options.model is None:
        detect, class_names = load_run(options.run, options.device)
    else:
        detect = exported = OnnxDetector(options.model)
        class_names = exported.class_names

    # 3. Detect and draw, a few pictures at a time.
    options.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for start in range(0, len(paths), options.batch_size):
        chunk = paths[start : start + options.batch_size]
        images = [read_image(path) for path in chunk]
        detections = detect([image.to(options.device) for image in images])
        for n, (path, image, detection) in enumerate(zip(chunk, images, detections, strict=True), start):
            strong = above(on_cpu(detection), options.score_threshold)
            names = [class_names.get(label, str(label)) for label in strong["labels"].tolist()]
            boxes, scores = strong["boxes"].tolist(), strong["scores"].tolist()
            rows.append({"image": str(path), "boxes": boxes, "scores": scores, "names": names})
            title = f"{path.name}: {len(names)} found"
            draw_predictions(pictures[n], [image], [(title, [strong])], class_names, 0.0)
    write_json(options.output / "detections.json", rows)
    return rows


def report(rows: list[dict[str, Any]], output: Path) -> None:
    """Print what was found, and where the pictures are."""
    print(json.dumps({"pictures": len(rows), "objects": sum(len(row["names"]) for row in rows), "in": str(output)}))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run_command(lambda: report(run(options), options.output))


if __name__ == "__main__":
    raise SystemExit(main())
