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
from coco_example.commands import CommandParser, run_command
from coco_example.data.reader import locate_split, read_coco
from coco_example.evaluation.evaluation import NMS_THRESHOLD, Detector, Ranking, evaluate, table
from coco_example.files import write_json
from coco_example.models.saved_model import load_model
from coco_example.models.teachers import python_detector

from crosskd_assign import adapt

__all__ = ["main"]


def load_detector(options: argparse.Namespace) -> tuple[Detector, dict[int, int], Any]:
    """Load a run's detector or a user's own, the COCO category of each of its labels, and what describes it."""
    ranking: Ranking = "class" if options.class_score else "class_quality"
    if options.run is None:
        own, labels = python_detector(options.detector)
        return Detector(own.to(options.device), ranking), labels, options.detector
    model, spec = load_model(options.run)
    detector = Detector(adapt(model.to(options.device)), ranking if spec.one_to_many else "class")
    return detector, spec.label_to_category, spec.as_flat()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, help="folder of a finished run")
    which.add_argument("--detector", help="python:FILE:FUNCTION, one-to-many detector of your own")
    parser.add_argument("--data-path", type=Path, default=Path("data/demo"), help="COCO folder")
    parser.add_argument("--split", choices=("train", "val"), default="val", help="images to score")
    parser.add_argument("--annotations", default=None, help="file in annotations/ instead of the usual one")
    parser.add_argument("--class-score", action="store_true", help="rank a one-to-many detector by class score alone")
    parser.add_argument("--limit", type=int, default=None, help="number of images to score; none: all")
    parser.add_argument("--batch-size", type=int, default=16, help="images at a time")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device to run on")
    parser.add_argument("--nms-threshold", type=float, default=NMS_THRESHOLD, help="IoU threshold of NMS")
    parser.add_argument("--output", type=Path, default=None, help="JSON file to write the scores to")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Score a detector and print its scores."""
    # 1. Score.
    detector, categories, described = load_detector(options)
    index = read_coco(*locate_split(options.data_path, options.split, options.annotations))
    result = evaluate(
        detector,
        index,
        label_to_category=categories,
        limit=options.limit,
        batch_size=options.batch_size,
        workers=options.workers,
        nms_threshold=options.nms_threshold,
    )

    # 2. Report.
    print(index.report)
    print(table([("without NMS", result.plain, result.duplicates), ("with NMS", result.nms, result.duplicates_nms)]))
    if options.output is not None:
        write_json(options.output, {"spec": described, "scores": result.as_dict()})
        print(json.dumps({"written": str(options.output)}))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    return run_command(lambda: run(options))


if __name__ == "__main__":
    raise SystemExit(main())
