"""Score a detector by COCO's protocol, without and with NMS, and count its duplicates.

python examples/coco/evaluate.py --run runs/demo/student --data-path data/demo
python examples/coco/evaluate.py --detector python:my_detector.py:trained --data-path coco
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from coco_example.commands import CommandParser, run_command, say
from coco_example.data.annotations import Category
from coco_example.data.dataset import CocoDataset
from coco_example.data.layouts import locate_split
from coco_example.data.preflight import judge_boxes, judge_pictures
from coco_example.data.reader import read_coco
from coco_example.data.values import Identifier
from coco_example.evaluation.coco_metrics import coco_results
from coco_example.evaluation.evaluation import NMS_THRESHOLD, Detector, Ranking, detect, score, table
from coco_example.files import write_json, write_whole
from coco_example.models.saved_model import load_model
from coco_example.models.teachers import python_detector

from crosskd_assign import adapt

__all__ = ["main"]


def load_detector(options: argparse.Namespace) -> tuple[Detector, dict[int, Identifier], list[Category] | None, Any]:
    """Load a run's detector or a user's own.

    Returns:
        The detector, the category id of each of its labels, its classes if they have names, and what describes it.
    """
    ranking: Ranking = "class" if options.class_score else "class_quality"
    given = options.top_k
    if options.run is None:
        own, labels = python_detector(options.detector)
        detector = Detector(own.to(options.device), ranking, Detector.top_k if given is None else given)
        return detector, labels, None, options.detector
    model, spec = load_model(options.run)
    adapter, top_k = adapt(model.to(options.device)), spec.model.top_k if given is None else given
    detector = Detector(adapter, ranking if spec.one_to_many else "class", top_k)
    return detector, spec.label_to_category, [Category(*category) for category in spec.categories], spec.as_flat()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, help="folder of a finished run")
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
    for warning in judge_boxes(index, options.split, top_k=detector.top_k):
        say(f"warning: {warning}")
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
    if options.output is not None:
        write_json(options.output, {"spec": described, "scores": result.as_dict()})
        print(json.dumps({"written": str(options.output)}))
    if options.results is not None:
        detections = found.suppressed if detector.ranking == "class_quality" else found.plain
        rows = coco_results(detections, found.image_ids(index), categories)
        write_whole(options.results, json.dumps(rows).encode())  # on one line: there may be millions
        print(json.dumps({"written": str(options.results)}))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run_command(lambda: run(options))


if __name__ == "__main__":
    raise SystemExit(main())
