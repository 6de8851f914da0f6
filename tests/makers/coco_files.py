"""Small data sets in COCO format, written to disk."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_dataset(root: Path, document: dict[str, Any], *, files: bool = True) -> tuple[Path, Path]:
    images = root / "train"
    (root / "annotations").mkdir(parents=True)
    images.mkdir()
    for entry in document["images"] if files else ():
        pixels = np.random.default_rng(entry["id"]).integers(0, 256, (entry["height"], entry["width"], 3), np.uint8)
        Image.fromarray(pixels).save(images / entry["file_name"])
    annotations = root / "annotations" / "instances_train.json"
    annotations.write_text(json.dumps(document))
    return images, annotations


def image(number: int, width: int = 160, height: int = 120) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number}.png", "width": width, "height": height}


def box(image_id: int, xywh: Iterable[float | None], category: int = 1, **more: int) -> dict[str, Any]:
    return {"id": 1, "image_id": image_id, "category_id": category, "bbox": list(xywh), **more}


def document(
    images: Iterable[dict[str, Any]] = (),
    annotations: Iterable[dict[str, Any]] = (),
    categories: Iterable[tuple[int, str]] = ((1, "a"),),
) -> dict[str, Any]:
    numbered = [{**entry, "id": n} for n, entry in enumerate(annotations, start=1)]
    return {
        "images": list(images),
        "annotations": numbered,
        "categories": [{"id": number, "name": name} for number, name in categories],
    }
