"""Take labels away from a data set, and give pseudo-labels to what has none.

A folder with labels on a share of its training images lists only those, and links the pictures of the others in
``unlabelled/``. Which images keep their labels depends on the share alone, and those of a larger share hold those of a
smaller one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coco_example.data.layouts import locate_split
from coco_example.data.reader import read_coco
from coco_example.evaluation.coco_metrics import coco_results
from coco_example.evaluation.evaluation import Detector
from coco_example.models.saved_model import load_model
from found import detected, targets_of

from crosskd_assign import adapt
from crosskd_assign.diagnostics import best_thresholds
from crosskd_assign.postprocessing import suppress

__all__ = ["UNLABELLED", "keep_labels", "pseudo_label"]

UNLABELLED = "unlabelled"
_NMS_THRESHOLD = 0.6


def keep_labels(source: Path, folder: Path, share: float) -> Path:
    """Make a COCO folder with labels on a share of the training images, without copying a picture."""
    if folder.exists():
        return folder
    # 1. Draw the images that keep theirs.
    content = _read(source, "train")
    ids = sorted(image["id"] for image in content["images"])
    random.Random(0).shuffle(ids)  # noqa: S311  # a part that can be made again
    kept = set(ids[: round(share * len(ids))])
    # 2. Link the pictures, those of the others in a folder of their own.
    draft = folder.with_name(folder.name + ".tmp")
    (draft / UNLABELLED).mkdir(parents=True)
    for split in ("train", "val"):
        (draft / split).symlink_to((source / split).resolve())
    for image in content["images"]:
        if image["id"] not in kept:
            link = draft / UNLABELLED / image["file_name"]
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((source / "train" / image["file_name"]).resolve())
    # 3. Write the annotations; the folder appears when it is complete.
    _write(draft, "train", _part(content, kept))
    _write(draft, "val", _read(source, "val"))
    draft.replace(folder)
    return folder


def pseudo_label(part: Path, source: Path, run: Path, folder: Path) -> Path:
    """Make a COCO folder in which a run's detections with NMS are the labels of the images that have none.

    Detections become labels from the score on that has the best F1 of their class on the validation images: the best
    thresholds there are, which nobody who has no other labels could know.

    Args:
        part: The folder with labels on a part of the images.
        source: The folder that it was made of, of which only the images' names and sizes are read.
        run: A finished one-to-many run.
        folder: The folder to make, which is also returned.
    """
    if folder.exists():
        return folder
    # 1. List the images without labels.
    labelled, everything = _read(part, "train"), _read(source, "train")
    with_labels = {image["id"] for image in labelled["images"]}
    others = [image for image in everything["images"] if image["id"] not in with_labels]
    draft = folder.with_name(folder.name + ".tmp")
    for split in ("train", "val"):
        (draft / split).parent.mkdir(parents=True, exist_ok=True)
        (draft / split).symlink_to((source / split).resolve())
    _write(draft, "val", _read(part, "val"))
    _write(draft, UNLABELLED, {**everything, "images": others, "annotations": []})
    # 2. Detect in them, and choose the thresholds.
    model, spec = load_model(run)
    detector = Detector(adapt(model), "class_quality")
    validation = read_coco(*locate_split(part, "val"))
    index = read_coco(draft / "train", draft / "annotations" / f"instances_{UNLABELLED}.json", validation.categories)
    known, new = ([suppress(d, _NMS_THRESHOLD) for d in detected(detector, i)] for i in (validation, index))
    thresholds = best_thresholds(known, targets_of(validation))
    sure = [thresholds.apply(detection) for detection in new]
    results = coco_results(sure, [record.id for record in index.records], spec.label_to_category)
    # 3. Add them to the labels.
    first = max((entry["id"] for entry in labelled["annotations"]), default=0) + 1
    added = [
        {"id": id_, "image_id": r["image_id"], "category_id": r["category_id"], "bbox": r["bbox"], "iscrowd": 0,
         "area": r["bbox"][2] * r["bbox"][3], "score": r["score"]}
        for id_, r in enumerate(results, first)
    ]  # fmt: skip
    both = {"images": labelled["images"] + others, "annotations": labelled["annotations"] + added}
    limits = {name: thresholds.of(label) for label, name in spec.label_to_name.items()}
    _write(draft, "train", {**labelled, **both, "pseudo_label_thresholds": limits})
    draft.replace(folder)
    return folder


def _part(content: dict[str, Any], kept: set[Any]) -> dict[str, Any]:
    def chosen(entries: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
        return [entry for entry in entries if entry[key] in kept]

    images, annotations = chosen(content["images"], "id"), chosen(content["annotations"], "image_id")
    return {**content, "images": images, "annotations": annotations}


def _read(folder: Path, split: str) -> dict[str, Any]:
    file = folder / "annotations" / f"instances_{split}.json"
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _write(folder: Path, split: str, content: dict[str, Any]) -> None:
    file = folder / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")
