"""Score a detector by COCO's protocol, without and with NMS, and count its duplicates.

python examples/coco/evaluate.py --run runs/demo/student --data-path data/demo
python examples/coco/evaluate.py --model student.onnx --data-path data/demo
python examples/coco/evaluate.py --detector python:my_detector.py:trained --data-path coco
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from coco_example.commands import CommandParser, run_command, warn
from coco_example.data.annotations import Category
from coco_example.data.dataset import CocoDataset
from coco_example.data.layouts import locate_split
from coco_example.data.preflight import judge_boxes, judge_pictures
from coco_example.data.reader import read_coco
from coco_example.data.values import Identifier, key_of
from coco_example.errors import DataError, printable
from coco_example.evaluation.coco_metrics import coco_results
from coco_example.evaluation.evaluation import NMS_THRESHOLD, Detector, Ranking, detect, score, table
from coco_example.evaluation.onnx_detector import OnnxDetector
from coco_example.evaluation.operating_point import describe_thresholds, threshold_table
from coco_example.files import write_json, write_whole
from coco_example.models.foreign import python_detector
from coco_example.models.saved_model import load_model
from coco_example.models.score_thresholds import CUTS_PAGE, ScoreThresholds

from crosskd_assign import adapt
from crosskd_assign.structures import Detection

__all__ = ["main"]

CHOSEN_ON = {"train": "training images", "val": "validation images", "test": "test images"}


def load_detector(
    options: argparse.Namespace,
) -> tuple[Detector | OnnxDetector, dict[int, Identifier], list[Category] | None, Any]:
    """Load a run's detector, an exported file or a user's own.

    Returns:
        The detector, the category id of each of its labels, its classes if all have names, and what describes it.
    """
    ranking: Ranking = "class" if options.class_score else "class_quality"
    given = options.top_k
    if options.model is not None:
        exported = OnnxDetector(options.model, top_k=given)
        described = {"model": str(options.model), **exported.metadata}
        return exported, exported.category_ids, exported.classes, described
    if options.run is None:
        own, labels = python_detector(options.detector)
        top_k = Detector.top_k if given is None else given
        detector = Detector(own.to(options.device), ranking, top_k, bool(options.one_class_per_point))
        return detector, labels, None, options.detector
    model, spec = load_model(options.run)
    adapter, top_k = adapt(model.to(options.device)), spec.model.top_k if given is None else given
    one_class = spec.model.one_class_per_point if options.one_class_per_point is None else options.one_class_per_point
    detector = Detector(adapter, ranking if spec.one_to_many else "class", top_k, one_class)
    classes = None if spec.detector else [Category(*category) for category in spec.categories]
    return detector, spec.label_to_category, classes, spec.as_flat()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, help="folder of a finished run")
    which.add_argument("--model", type=Path, help="ONNX file that export.py wrote; runs on the CPU, image by image")
    which.add_argument("--detector", help="python:FILE:FUNCTION, one-to-many detector of your own")
    parser.add_argument("--data-path", type=Path, default=Path("data/demo"), help="data set, as for train.py")
    parser.add_argument("--split", choices=("train", "val", "test"), default="val", help="images to score")
    parser.add_argument("--annotations", default=None, help="annotation file instead of the usual one")
    parser.add_argument("--images", default=None, help="folder of the pictures instead of the usual one")
    parser.add_argument("--class-score", action="store_true", help="rank a one-to-many detector by class score alone")
    parser.add_argument("--limit", type=int, default=None, help="number of images to score; none: all")
    parser.add_argument("--batch-size", type=int, default=16, help="images at a time")
    parser.add_argument("--workers", type=int, default=-1, help="processes that load images; -1: spare cores")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device to run on")
    parser.add_argument("--nms-threshold", type=float, default=NMS_THRESHOLD, help="IoU threshold of NMS")
    parser.add_argument("--top-k", type=int, default=None, help="detections of an image that count; none: the run's")
    parser.add_argument(
        "--one-class-per-point",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="let each point report its best class only; none: as the run",
    )
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write the scores to")
    parser.add_argument(
        "--results", type=Path, default=None, help="JSON file to write the detections to, as COCO's tools read them"
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Score a detector and print its scores."""
    # 1. The detector, and images in its classes.
    detector, labels, classes, described = load_detector(options)
    folder, file = locate_split(options.data_path, options.split, options.annotations, options.images)
    index = read_coco(folder, file, classes, progress=True)
    categories = index.label_to_category if classes else labels
    warn(judge_boxes(index, options.split, top_k=detector.top_k), DataError.page)
    judge_pictures(index, limit=options.limit)

    # 2. Score.
    found = detect(
        detector,
        CocoDataset(index),
        limit=options.limit,
        batch_size=options.batch_size,
        workers=options.workers,
        nms_threshold=options.nms_threshold,
    )
    result = score(found, index, label_to_category=categories, top_k=detector.top_k)

    # 3. Report.
    print(index.report)
    print(table([("without NMS", result.plain, result.duplicates), ("with NMS", result.nms, result.duplicates_nms)]))
    many = detector.ranking == "class_quality" if isinstance(detector, Detector) else detector.one_to_many
    chosen, where = result.usable(with_nms=many), CHOSEN_ON[options.split]
    known = {key_of(category.id): category.name for category in index.categories}
    names = {label: known.get(key_of(category), str(category)) for label, category in categories.items()}
    print("\n" + printable(threshold_table(chosen, names, chosen_on=where, with_nms=many)))
    used = found.suppressed if many else found.plain
    _report_cuts(used, detector.top_k, ScoreThresholds.of_best_f1(chosen, where), categories)
    if options.output is not None:
        thresholds = describe_thresholds(chosen, names, chosen_on=where, with_nms=many)
        write_json(options.output, {"spec": described, "scores": result.as_dict(), "thresholds": thresholds})
        print(json.dumps({"written": str(options.output)}))
    if options.results is not None:
        rows = coco_results(used, found.image_ids(index), categories)
        write_whole(options.results, json.dumps(rows).encode())  # on one line: there may be millions
        print(json.dumps({"written": str(options.results)}))


def _report_cuts(
    detections: Sequence[Detection], top_k: int, thresholds: ScoreThresholds | None, labels: Iterable[int]
) -> None:
    """Say in how many images top-k may have dropped what a threshold would have kept."""
    if thresholds is None:
        return
    cut = sum(thresholds.cuts(detection, top_k, labels) for detection in detections)
    if cut:
        warn([thresholds.warn_of_cuts(cut, len(detections), top_k)], CUTS_PAGE)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run_command(lambda: run(options))


if __name__ == "__main__":
    raise SystemExit(main())
