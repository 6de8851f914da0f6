"""Write pictures that were made, not found, into a COCO folder."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from coco_example.errors import DataError

__all__ = ["Picture", "write_coco_folder"]

Picture: TypeAlias = tuple[Image.Image, Sequence[tuple[int, Sequence[float]]]]
"""A picture, with the category id and the box x1, y1, x2, y2 of each of its objects."""


def write_coco_folder(
    root: Path, recipe: str, wanted: str, splits: Mapping[str, Iterable[Picture]], categories: Sequence[str]
) -> Path:
    """Write pictures into a COCO folder, unless they are there already.

    The folder holds ``SPLIT/*.png`` and ``annotations/instances_SPLIT.json``. It appears when it is complete, and not
    before.

    Args:
        root: The folder to make, which is also returned.
        recipe: Name of the file in it that tells how the pictures were made.
        wanted: Content of that file.
        splits: The pictures of each split; they are not asked for if they are there.
        categories: Names of the category ids 1, 2, ….

    Raises:
        DataError: If ``root`` holds something else.
    """
    if _complete(root, recipe, wanted):
        return root
    # Make them beside their place, and move them there in one piece.
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as folder:
        draft = Path(folder, root.name)
        (draft / "annotations").mkdir(parents=True)
        for split, pictures in splits.items():
            (draft / split).mkdir()
            document = _write_split(draft / split, pictures, categories)
            (draft / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
        (draft / recipe).write_text(wanted)
        try:
            draft.rename(root)
        except OSError:  # another process may have been faster, with the same pictures
            if not _complete(root, recipe, wanted):
                raise
    return root


def _complete(root: Path, recipe: str, wanted: str) -> bool:
    """Return True if these pictures are there, False if nothing is; raise if it is anything else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    file = root / recipe
    found = file.read_text(errors="replace") if file.is_file() else "something else"
    if found != wanted:
        raise DataError(
            expected=f"nothing, or pictures drawn with {wanted}",
            got=found,
            where=str(root),
            fix="name another folder, or remove this one",
        )
    return True


def _write_split(folder: Path, pictures: Iterable[Picture], categories: Sequence[str]) -> dict[str, Any]:
    """Write the pictures of a split and return its COCO instances."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for k, (picture, objects) in enumerate(pictures):
        name = f"{k:06d}.png"
        images.append({"id": k + 1, "file_name": name, "width": picture.width, "height": picture.height})
        picture.save(folder / name, compress_level=1)  # noise hardly gets smaller, only slower
        for category, corners in objects:
            x1, y1, x2, y2 = (round(value, 2) for value in corners)
            box = [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)]
            entry = {"id": len(annotations) + 1, "image_id": k + 1, "category_id": category}
            annotations.append({**entry, "bbox": box, "area": round(box[2] * box[3], 4), "iscrowd": 0})
    named = [{"id": number, "name": name} for number, name in enumerate(categories, start=1)]
    return {"images": images, "annotations": annotations, "categories": named}
