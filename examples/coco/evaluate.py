"""Score a detector by COCO's protocol, without and with NMS, and count its duplicates.

python examples/coco/evaluate.py --run runs/demo/student --data-path data/demo
python examples/coco/evaluate.py --detector python:my_detector.py:trained --data-path coco
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from arms import Arm
from coco_data import CocoDataset, collate
from coco_metrics import CocoScores, coco_evaluate, coco_results
from coco_reader import CocoIndex, locate_split, read_coco
from runs import load_model, write_json
from teachers import python_detector
from torch.utils.data import DataLoader, Subset

from crosskd_assign import Detection, Target, adapt
from crosskd_assign.diagnostics import DuplicateReport, duplicate_report, one_to_many_detections

__all__ = ["Evaluation", "detect", "evaluate", "leave_signals_alone", "on_cpu", "table"]

NMS_THRESHOLD = 0.6  # torchvision's FCOS


@dataclass(frozen=True)
class Evaluation:
    """Scores of one detector."""

    plain: CocoScores
    nms: CocoScores
    duplicates: DuplicateReport
    duplicates_nms: DuplicateReport
    images: int

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers: ``ap`` and its kin without NMS, ``ap_nms`` and its kin with, ``duplicates`` per object."""
        nms = {f"{name}_nms": value for name, value in self.nms.as_dict().items()}
        rates = {"duplicates": self.duplicates.rate, "duplicates_nms": self.duplicates_nms.rate}
        return {**self.plain.as_dict(), **nms, **rates, "margin": self.duplicates.margin, "images": self.images}


@torch.inference_mode()
def detect(
    arm: Arm,
    dataset: CocoDataset,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    workers: int = 0,
    precision: torch.dtype = torch.float32,
    nms_threshold: float = NMS_THRESHOLD,
) -> tuple[list[Detection], list[Detection], list[Target]]:
    """Detections without NMS, with NMS, and the targets of the first ``limit`` images, on the CPU."""
    subset = dataset if limit is None else Subset(dataset, range(min(limit, len(dataset))))
    loader = DataLoader(
        subset,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=leave_signals_alone,
        generator=torch.Generator(),  # without its own it would draw from the generator that training resumes
    )
    device = next(arm.adapter.parameters()).device
    plain: list[Detection] = []
    suppressed: list[Detection] = []
    targets: list[Target] = []
    was_training = arm.training
    arm.eval()
    arm.adapter.eval()
    for images, batch_targets in loader:
        with torch.autocast(device.type, precision) if precision != torch.float32 else nullcontext():
            predictions, batch = arm.predict([image.to(device) for image in images])
        for kept, threshold in ((plain, None), (suppressed, nms_threshold)):
            for detection in one_to_many_detections(arm.adapter, predictions, batch, nms_threshold=threshold):
                kept.append(on_cpu(detection))
        targets += batch_targets
    arm.train(was_training)
    arm.adapter.train(was_training)
    return plain, suppressed, targets


def evaluate(
    arm: Arm,
    index: CocoIndex,
    *,
    label_to_category: Mapping[int, int] | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    workers: int = 0,
    precision: torch.dtype = torch.float32,
    nms_threshold: float = NMS_THRESHOLD,
) -> Evaluation:
    """Score a detector on an index.

    Args:
        arm: The detector.
        index: Images and annotations.
        label_to_category: COCO category of each of the detector's labels, where they are not the index's own.
        limit: Images to score; None for all.
        batch_size: Images at a time.
        workers: Loader processes.
        precision: Autocast dtype.
        nms_threshold: IoU above which NMS drops the weaker box of a class.
    """
    plain, suppressed, targets = detect(
        arm,
        CocoDataset(index),
        limit=limit,
        batch_size=batch_size,
        workers=workers,
        precision=precision,
        nms_threshold=nms_threshold,
    )
    categories = dict(index.label_to_category if label_to_category is None else label_to_category)
    ids = [int(target["image_id"]) for target in targets]
    scores = [
        coco_evaluate(index.annotations, coco_results(detections, ids, categories), image_ids=ids)
        for detections in (plain, suppressed)
    ]
    # Duplicates are counted against targets, whose labels are the index's own.
    own = {category: label for label, category in index.label_to_category.items()}
    translation = {label: own.get(category, -1) for label, category in categories.items()}
    reports = [
        duplicate_report([_relabelled(d, translation) for d in detections], targets)
        for detections in (plain, suppressed)
    ]
    return Evaluation(scores[0], scores[1], reports[0], reports[1], len(ids))


def leave_signals_alone(worker: int) -> None:
    """Make a loader's process outlive a signal to the whole group; the one that it works for decides when to stop."""
    del worker
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def on_cpu(detection: Detection) -> Detection:
    """The same detection on the CPU."""
    return {
        "boxes": detection["boxes"].cpu(),
        "scores": detection["scores"].cpu(),
        "labels": detection["labels"].cpu(),
    }


def _relabelled(detection: Detection, translation: Mapping[int, int]) -> Detection:
    labels = [translation.get(label, -1) for label in detection["labels"].tolist()]
    return {**detection, "labels": torch.tensor(labels, dtype=torch.int64)}


def table(rows: Sequence[tuple[str, CocoScores, DuplicateReport]]) -> str:
    """A table of AP, AP50, AP75, APs, APm, APl (per cent) and duplicates per found object."""
    width = max(len(name) for name, *_ in rows)
    head = f"{'':{width}}     AP   AP50   AP75    APs    APm    APl  duplicates"
    lines = [head]
    for name, s, duplicates in rows:
        numbers = (s.ap, s.ap50, s.ap75, s.ap_small, s.ap_medium, s.ap_large)
        cells = " ".join(f"{100 * value:6.1f}" for value in numbers)
        lines.append(f"{name:{width}} {cells}  {duplicates.rate:10.3f}")
    return "\n".join(lines).replace("   nan", "     –")


def _loaded(options: argparse.Namespace) -> tuple[Arm, dict[int, int], Any]:
    """A run's detector or a user's own, the COCO category of each of its labels, and what it is."""
    if options.run is None:
        own, categories = python_detector(options.detector)
        return Arm(own.to(options.device), own, one_to_many=not options.class_score), categories, options.detector
    model, spec = load_model(options.run)
    model.to(options.device)
    ranked = spec.one_to_many and not options.class_score
    return Arm(model, adapt(model), one_to_many=ranked), spec.label_to_category, asdict(spec)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", type=Path, help="folder of a finished run")
    which.add_argument("--detector", help="python:FILE:FUNCTION, one-to-many detector of your own")
    parser.add_argument("--data-path", type=Path, default=Path("data/demo"), help="COCO folder")
    parser.add_argument("--split", choices=("train", "val"), default="val", help="images to score")
    parser.add_argument("--annotations", default=None, help="file in annotations/ instead of the usual one")
    parser.add_argument("--class-score", action="store_true", help="rank a one-to-many detector by class alone")
    parser.add_argument("--limit", type=int, default=None, help="images to score")
    parser.add_argument("--batch-size", type=int, default=16, help="images at a time")
    parser.add_argument("--workers", type=int, default=0, help="loader processes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where to run")
    parser.add_argument("--nms-threshold", type=float, default=NMS_THRESHOLD, help="IoU of NMS")
    parser.add_argument("--output", type=Path, default=None, help="JSON file for the numbers")
    options = parser.parse_args(arguments)
    try:
        arm, categories, described = _loaded(options)
        index = read_coco(*locate_split(options.data_path, options.split, options.annotations))
        result = evaluate(
            arm,
            index,
            label_to_category=categories,
            limit=options.limit,
            batch_size=options.batch_size,
            workers=options.workers,
            nms_threshold=options.nms_threshold,
        )
    except ValueError as error:  # everything that is the user's to mend
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(index.report)
    print(table([("without NMS", result.plain, result.duplicates), ("with NMS", result.nms, result.duplicates_nms)]))
    if options.output is not None:
        write_json(options.output, {"spec": described, "scores": result.as_dict()})
        print(json.dumps({"written": str(options.output)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
