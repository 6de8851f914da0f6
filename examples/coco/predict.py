"""Detect objects in pictures with a finished run or an exported file, and draw what was found.

python examples/coco/predict.py --run runs/demo/student --output runs/demo/pictures data/demo/val
python examples/coco/predict.py --model student.onnx --output runs/demo/pictures data/demo/val
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from coco_example.commands import CommandParser, run_command, say, warn
from coco_example.data.pictures import is_picture, read_picture
from coco_example.errors import DataError, RunError
from coco_example.evaluation.evaluation import NMS_THRESHOLD, Detector, Ranking, on_cpu
from coco_example.evaluation.onnx_detector import OnnxDetector
from coco_example.figures.draw import draw_predictions
from coco_example.models.class_filter import labels_of
from coco_example.models.saved_model import load_model
from coco_example.models.score_thresholds import CUTS_PAGE, USUAL, ScoreThresholds
from torch import Tensor
from torchvision.transforms import v2

from crosskd_assign import adapt
from crosskd_assign.errors import CrossKDError
from crosskd_assign.structures import Detection
from crosskd_assign.validation import validate_option

__all__ = ["find_images", "main", "picture_paths", "read_image"]

Detect: TypeAlias = Callable[[Sequence[Tensor]], list[Detection]]


def find_images(paths: Sequence[Path]) -> list[Path]:
    """List image files among ``paths``, and those in the folders among them that are not hidden, sorted in each.

    Raises:
        RunError: A path does not exist, or there is no image at all.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise RunError(expected="pictures or folders", got="nothing there", where=f"{path}", fix="check the path")
        found += [path] if path.is_file() else sorted(p for p in path.iterdir() if is_picture(p) and not p.is_dir())
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
        DataError: It is no readable image.
    """
    scaled: Tensor = v2.functional.to_dtype(read_picture(path), torch.float32, scale=True)
    return scaled


@dataclass(frozen=True)
class Loaded:
    """A detector, and how it is used.

    Attributes:
        detect: Returns the detections of images.
        class_names: Name of each label.
        thresholds: Least scores of what is shown.
        top_k: Detections of an image among which that is; None where an exported file does not tell.
        classes: Labels that are shown; None for all.
    """

    detect: Detect
    class_names: dict[int, str]
    thresholds: ScoreThresholds
    top_k: int | None
    classes: tuple[int, ...] | None

    @property
    def labels(self) -> Sequence[int]:
        """The labels that are shown."""
        return [*self.class_names] if self.classes is None else self.classes


def load_detector(options: argparse.Namespace) -> Loaded:
    """Load the detector of a run or an exported file.

    Raises:
        RunError: There is no finished run or readable file, it lacks a class of ``--classes``, or a file is asked for
            what is fixed in it.
        OptionError: ``--top-k`` is below 1.
    """
    # 1. The options.
    if options.top_k is not None:
        validate_option("top_k", options.top_k, low=1)
    given = None if options.score_threshold is None else ScoreThresholds(options.score_threshold)

    # 2. A file, which has selected the best already.
    if options.model is not None:
        if options.one_class_per_point is not None:
            raise RunError(
                expected="--one-class-per-point with --run",
                got="it with --model",
                where="--one-class-per-point",
                fix="give it to export.py: it is part of the file",
            )
        exported = OnnxDetector(options.model)
        classes = labels_of(options.classes, exported.class_names, exported.category_ids or None)
        thresholds = given or exported.thresholds or USUAL
        return Loaded(exported, exported.class_names, thresholds, exported.top_k, classes)

    # 3. A run.
    model, spec = load_model(options.run)
    classes = labels_of(options.classes, spec.label_to_name, spec.label_to_category)
    ranking: Ranking = "class_quality" if spec.one_to_many else "class"
    top_k = spec.model.top_k if options.top_k is None else options.top_k
    one_class = spec.model.one_class_per_point if options.one_class_per_point is None else options.one_class_per_point
    detector = Detector(adapt(model.to(options.device)), ranking, top_k, one_class, classes)
    nms_threshold = NMS_THRESHOLD if spec.one_to_many else None  # only a one-to-many detector needs it
    detect = partial(detector.detect, nms_threshold=nms_threshold)
    return Loaded(detect, spec.label_to_name, given or spec.thresholds or USUAL, top_k, classes)


def detect_each(detect: Detect, images: Sequence[Tensor]) -> list[Detection | CrossKDError]:
    """Detect in images together, or else in each alone, with what is wrong in the place of its detections."""
    try:
        return [*detect(images)] if images else []
    except CrossKDError as error:
        return [error] if len(images) == 1 else [found for image in images for found in detect_each(detect, [image])]


class RowFile:
    """A JSON array in a file, which is complete after every row that is added.

    Args:
        path: The file, replaced if it is there.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._file.write(b"[\n]\n")
        self.rows = 0

    def add(self, row: dict[str, Any]) -> None:
        """Write one more row."""
        self._file.seek(-2 if self.rows == 0 else -3, os.SEEK_END)
        # A file name that is no text has half a surrogate pair, which JSON has an escape for.
        text = json.dumps(row, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")
        self._file.write((b"" if self.rows == 0 else b",\n") + text + b"\n]\n")
        self._file.flush()
        self.rows += 1

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def strongest(
    detection: Detection, thresholds: ScoreThresholds, top_k: int | None, classes: Sequence[int] | None = None
) -> Detection:
    """Leave out detections that score less than a threshold, are of other classes, not finite, or beyond ``top_k``."""
    labels = detection["labels"].tolist()
    limits = torch.tensor([thresholds.of(label) for label in labels], dtype=torch.float64)
    wanted = torch.tensor([classes is None or label in classes for label in labels], dtype=torch.bool)
    usable = wanted & (detection["scores"].double() >= limits) & detection["boxes"].isfinite().all(dim=1)
    keep = usable.nonzero().flatten()[:top_k]
    return {"boxes": detection["boxes"][keep], "scores": detection["scores"][keep], "labels": detection["labels"][keep]}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, nargs="+", help="pictures, or folders of them")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="folder of a finished run")
    source.add_argument("--model", type=Path, help="ONNX file that export.py wrote; runs on the CPU")
    parser.add_argument("--output", type=Path, required=True, help="folder for detections.json and pictures")
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=None,
        help="leave out detections that score less (those of the best F1 on validation images, by class, which run and "
        "file have; 0.3 where they have none)",
    )
    parser.add_argument(
        "--classes",
        nargs="+",
        default=None,
        metavar="NAME",
        help="classes to detect, by name or id, before --top-k (all)",
    )
    parser.add_argument(
        "--one-class-per-point",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="let each point report its best class only (as the run)",
    )
    parser.add_argument("--top-k", type=int, default=None, help="detections of a picture (the run's, or the file's)")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures at a time (8)")
    parser.add_argument("--limit", type=int, default=None, help="number of pictures; default all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device to run on")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Detect, draw and write, as far as pictures can be used.

    Returns:
        The number of pictures and of objects in ``detections.json`` and the thresholds that were used, and what is
        wrong with the other pictures.

    Raises:
        RunError: A run or file cannot be read, or a picture would be replaced.
    """
    # 1. Pictures, where they go, and the detector.
    paths = find_images(options.images)[: options.limit]
    pictures = picture_paths(paths, options.output)
    loaded = load_detector(options)

    # 2. A few pictures at a time.
    options.output.mkdir(parents=True, exist_ok=True)
    objects, cut, failures = 0, 0, list[str]()
    with contextlib.closing(RowFile(options.output / "detections.json")) as file:
        for start in range(0, len(paths), options.batch_size):
            # 3. Read them.
            images: dict[int, Tensor] = {}
            for n, path in enumerate(paths[start : start + options.batch_size], start):
                try:
                    images[n] = read_image(path)
                except CrossKDError as error:  # noqa: PERF203  # which must not cost the others
                    failures.append(f"{error}")

            # 4. Detect, write and draw.
            detections = detect_each(loaded.detect, [image.to(options.device) for image in images.values()])
            for (n, image), detection in zip(images.items(), detections, strict=True):
                if isinstance(detection, CrossKDError):
                    failures.append(f"{paths[n]}: {detection}")
                    continue
                cut += loaded.top_k is not None and loaded.thresholds.cuts(detection, loaded.top_k, loaded.labels)
                strong = strongest(on_cpu(detection), loaded.thresholds, options.top_k, loaded.classes)
                names = [loaded.class_names.get(label, str(label)) for label in strong["labels"].tolist()]
                boxes, scores = strong["boxes"].tolist(), strong["scores"].tolist()
                file.add({"image": str(paths[n]), "boxes": boxes, "scores": scores, "names": names})
                objects += len(names)
                name = paths[n].name.encode(errors="replace").decode()  # a file's name need not be text
                title = f"{name}: {len(names)} found"
                draw_predictions(pictures[n], [image], [(title, [strong])], loaded.class_names, 0.0)
        if cut and loaded.top_k is not None:
            warn([loaded.thresholds.warn_of_cuts(cut, file.rows, loaded.top_k)], CUTS_PAGE)
        counts = {"pictures": file.rows, "objects": objects, "in": str(options.output)}
        return {**counts, "score_threshold": str(loaded.thresholds)}, failures


def report(options: argparse.Namespace) -> list[str]:
    """Detect, and print what was found and what is wrong with pictures, which is returned."""
    summary, failures = run(options)
    for failure in failures:
        say(f"error: {failure}")
    if failures:
        say(f"See {DataError.page}.")
    print(json.dumps(summary))
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    failures: list[str] = []
    code = run_command(lambda: failures.extend(report(options)))
    return code or (2 if failures else 0)


if __name__ == "__main__":
    raise SystemExit(main())
