"""A COCO data set in the folders and files that other programs export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

SPLITS = {"train": "train", "val": "valid"}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def roboflow(source: dict[str, Any], pictures: Path, root: Path, split: str) -> None:
    """Splits called train and valid, annotations beside the pictures, a super-category 0, ids from 0, no crowds."""
    names = {entry["id"]: entry["name"] for entry in source["categories"]}
    folder = root / SPLITS[split]
    shutil.copytree(pictures, folder)
    categories = [{"id": 0, "name": "shapes", "supercategory": "none"}]
    categories += [{"id": number, "name": name, "supercategory": "shapes"} for number, name in names.items()]
    images = [
        {**entry, "id": entry["id"] - 1, "license": 1, "date_captured": "2024-01-01", "extra": {"name": "a.png"}}
        for entry in source["images"]
    ]
    boxes = [
        {**entry, "id": n, "image_id": entry["image_id"] - 1, "segmentation": [], "iscrowd": 0}
        for n, entry in enumerate(source["annotations"])
    ]
    info = {"info": {"year": "2024", "description": "Exported from roboflow.com"}, "licenses": []}
    write_json(
        folder / "_annotations.coco.json", {**info, "categories": categories, "images": images, "annotations": boxes}
    )


def cvat(source: dict[str, Any], pictures: Path, root: Path, split: str) -> None:
    """Subsets called Train and Validation, pictures in folders of images."""
    name = {"train": "Train", "val": "Validation"}[split]
    shutil.copytree(pictures, root / "images" / name)
    boxes = [
        {**entry, "segmentation": [], "attributes": {"occluded": False, "rotation": 0.0}}
        for entry in source["annotations"]
    ]
    images = [{**e, "license": 0, "flickr_url": "", "coco_url": "", "date_captured": 0} for e in source["images"]]
    categories = [{**entry, "supercategory": ""} for entry in source["categories"]]
    content = {"licenses": [], "info": {}, "categories": categories, "images": images, "annotations": boxes}
    write_json(root / "annotations" / f"instances_{name}.json", content)


def cvat_apart(source: dict[str, Any], pictures: Path, root: Path, split: str) -> None:
    """One export a split, in folders of their own."""
    shutil.copytree(pictures, root / split / "images" / "default")
    write_json(root / split / "annotations" / "instances_default.json", source)


def label_studio(source: dict[str, Any], pictures: Path, root: Path, split: str) -> None:
    """One export a split; file names begin with the folder's, and have the separators of Windows."""
    shutil.copytree(pictures, root / split / "images")
    images = [{**entry, "file_name": f"images\\{entry['file_name']}"} for entry in source["images"]]
    boxes = [{**entry, "segmentation": [], "ignore": 0} for entry in source["annotations"]]
    write_json(root / split / "result.json", {**source, "images": images, "annotations": boxes})


def fiftyone(source: dict[str, Any], pictures: Path, root: Path, split: str) -> None:
    """One export a split; no segmentations, areas where there are boxes."""
    shutil.copytree(pictures, root / split / "data")
    images = [{**entry, "license": None, "coco_url": None} for entry in source["images"]]
    boxes = [{**entry, "iscrowd": 0, "supercategory": None} for entry in source["annotations"]]
    categories = [{**entry, "supercategory": None} for entry in source["categories"]]
    content = {"info": {}, "licenses": [], "categories": categories, "images": images, "annotations": boxes}
    write_json(root / split / "labels.json", content)


def export(writer: Any, scenes: Path, root: Path) -> None:
    for split in SPLITS:
        source = json.loads((scenes / "annotations" / f"instances_{split}.json").read_text())
        writer(source, scenes / split, root, split)
