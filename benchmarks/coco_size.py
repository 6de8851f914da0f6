"""Write a data set of COCO's size, and rehearse on it what a run does before, between and after its steps.

python benchmarks/coco_size.py --pictures coco_open/train            # writes runs/coco_size once, then measures all
python benchmarks/coco_size.py --only reading --runs 5
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent))

from coco_size_measures import MEASURES  # after the path

SPLITS = {"train2017": (118_287, 860_001), "val2017": (5_000, 36_781)}  # images and boxes, crowds included
LONGER_SIDE = 640  # pixels, COCO's
CROWDS = 0.012  # share of boxes
EMPTY = 0.01  # share of images without a box
# The official ids of the 80 classes: 1 to 90 without these.
GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
LICENSES = [{"url": f"http://creativecommons.org/licenses/by/{n}.0/", "id": n, "name": f"License {n}"} for n in (1, 2)]


def write_pictures(source: Path, folder: Path, count: int) -> list[tuple[Path, int, int]]:
    """Save the first pictures of a folder with COCO's longer side; return each with its width and height."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for path in sorted(source.glob("*.jpg"))[:count]:
        with Image.open(path) as opened:
            factor = LONGER_SIDE / max(opened.size)
            picture = opened.convert("RGB").resize((round(opened.width * factor), round(opened.height * factor)))
        picture.save(folder / path.name, quality=90)
        written.append((folder / path.name, *picture.size))
    if not written:
        raise SystemExit(f"error: expected JPEG pictures in --pictures {source}, but got none")
    return written


def link_pictures(pictures: Sequence[tuple[Path, int, int]], folder: Path, count: int) -> list[dict[str, Any]]:
    """Link the pictures again and again under COCO's names; return an entry of each as COCO's file has it."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for n in range(count):
        path, width, height = pictures[n % len(pictures)]
        number = 9 + 5 * n if folder.name == "train2017" else 139 + 116 * n  # gaps, as COCO's ids have them
        name = f"{number:012d}.jpg"
        try:
            os.link(path, folder / name)
        except OSError:  # another disk, or too many links of one file
            (folder / name).symlink_to(path.resolve())
        entries.append(
            {
                "license": 1 + n % 2,
                "file_name": name,
                "coco_url": f"http://images.cocodataset.org/{folder.name}/{name}",
                "height": height,
                "width": width,
                "date_captured": f"2013-11-{1 + n % 28:02d} 17:02:52",
                "flickr_url": f"http://farm{1 + n % 9}.staticflickr.com/3153/{2970773875 + n}_164f0c0b83_z.jpg",
                "id": number,
            }
        )
    return entries


def draw_boxes(images: Sequence[dict[str, Any]], count: int, rng: Generator) -> Iterator[dict[str, Any]]:
    """Draw the entries of boxes: polygons around ellipses, run lengths of crowds, the usual fields in COCO's order."""
    with_boxes = np.sort(rng.permutation(len(images))[int(EMPTY * len(images)) :])
    owners = np.concatenate([with_boxes, rng.choice(with_boxes, count - len(with_boxes))])
    rng.shuffle(owners)
    categories = [number for number in range(1, 91) if number not in GAPS]
    angles = np.linspace(0, 2 * np.pi, 60)
    for n, owner in enumerate(owners.tolist()):
        width, height = images[owner]["width"], images[owner]["height"]
        share = np.exp(rng.uniform(np.log(0.02), 0, 2))
        w, h = max(2.0, 0.95 * width * share[0]), max(2.0, 0.95 * height * share[1])
        x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
        crowd = bool(rng.random() < CROWDS)
        if crowd:
            segmentation: Any = {"counts": rng.integers(1, 3000, 200).tolist(), "size": [height, width]}
        else:
            turn = angles[: rng.integers(4, 41)]
            points = np.stack([x + w / 2 * (1 + np.cos(turn)), y + h / 2 * (1 + np.sin(turn))], axis=1)
            segmentation = [points.round(2).ravel().tolist()]
        yield {
            "segmentation": segmentation,
            "area": 0.7853 * w * h,
            "iscrowd": int(crowd),
            "image_id": images[owner]["id"],
            "bbox": [round(float(value), 2) for value in (x, y, w, h)],
            "category_id": categories[min(79, int(rng.exponential(16)))],
            "id": 1 + n,
        }


def write_split(root: Path, split: str, pictures: Sequence[tuple[Path, int, int]], images: int, boxes: int) -> None:
    """Write the instances file of a split as COCO's is laid out, entry by entry, and link its pictures."""
    entries = link_pictures(pictures, root / split, images)
    categories = [
        {"supercategory": "person" if n == 1 else "thing", "id": n, "name": "person" if n == 1 else f"class {n}"}
        for n in range(1, 91)
        if n not in GAPS
    ]
    path = root / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")  # a half-written file must not look complete
    with temporary.open("w", encoding="utf-8") as file:
        head = {"info": {"description": "COCO's size", "year": 2017}, "licenses": LICENSES, "images": entries}
        file.write(json.dumps(head)[:-1] + ', "annotations": [')
        for n, box in enumerate(draw_boxes(entries, boxes, np.random.default_rng(images))):
            file.write((", " if n else "") + json.dumps(box))
        file.write('], "categories": ' + json.dumps(categories) + "}")
    temporary.replace(path)


def main() -> None:
    # 1. Read the options.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, default=Path("runs/coco_size"), help="where it is, or will be")
    parser.add_argument("--pictures", type=Path, help="folder of JPEG pictures to link; needed to write it")
    parser.add_argument("--count", type=int, default=300, help="number of pictures to link (300)")
    parser.add_argument("--part", type=float, default=1.0, help="share of COCO's images and boxes to write (1)")
    parser.add_argument("--only", choices=[*sorted(MEASURES), "nothing"], action="append", help="what to measure (all)")
    parser.add_argument("--runs", type=int, default=3, help="repetitions, of which the median counts (3)")
    parser.add_argument("--output", type=Path, help="JSON file to write the figures to")
    options = parser.parse_args()

    # 2. Write what is not there.
    missing = [s for s in SPLITS if not (options.data_path / "annotations" / f"instances_{s}.json").exists()]
    if missing:
        if options.pictures is None:
            parser.error(f"expected --pictures FOLDER to write {options.data_path} from, but got none")
        pictures = write_pictures(options.pictures, options.data_path / "pictures", options.count)
        for split in missing:
            images, boxes = (max(1, round(options.part * number)) for number in SPLITS[split])
            write_split(options.data_path, split, pictures, images, boxes)

    # 3. Measure.
    rows = {n: work(options.data_path, options.runs) for n, work in MEASURES.items() if n in (options.only or MEASURES)}
    if options.output is not None:
        options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
