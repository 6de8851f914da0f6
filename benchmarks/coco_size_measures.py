"""What `coco_size.py` measures, each contestant in processes of its own, in turn."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "coco"))

from coco_example.data.annotations import read_annotations
from coco_example.data.augmentation import augmentation, scaled_augmentations, short_sides
from coco_example.data.dataset import CocoDataset
from coco_example.data.layouts import locate_split
from coco_example.data.pictures import read_picture
from coco_example.data.reader import CocoIndex, read_coco
from coco_example.engine.loaders import loaded
from coco_example.evaluation.evaluation import Found, score
from PIL import Image

from crosskd_assign.structures import Detection, Target

__all__ = ["MEASURES"]

Figures = dict[str, float]
_SHARE = 256  # records of an item


def _in_turn(names: Sequence[str], root: Path, runs: int) -> dict[str, Figures]:
    """Run contestants A B A B … in fresh processes; return the medians of their figures."""
    rows: dict[str, list[Figures]] = {name: [] for name in names}
    for _ in range(runs):
        for name in names:
            command = [sys.executable, __file__, name, str(root)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows[name].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {n: {key: statistics.median(row[key] for row in rows[n]) for key in rows[n][0]} for n in names}
    for name, figures in medians.items():
        print(f"{name:28}", ", ".join(f"{key} {value:,.2f}" for key, value in figures.items()), flush=True)
    return medians


def _timed(work: Callable[[], object]) -> Figures:
    begun, used = time.perf_counter(), time.process_time()
    work()
    wall, own = time.perf_counter() - begun, time.process_time() - used
    return {"seconds": wall, "cpu_seconds": own, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


# --- reading ----------------------------------------------------------------------------------------------------------


def reading(root: Path) -> Figures:
    """Read the annotations as training does."""
    return _timed(lambda: read_annotations(locate_split(root, "train")[1]))


def reading_pycocotools(root: Path) -> Figures:
    """Read them as pycocotools does."""
    from pycocotools.coco import COCO  # noqa: PLC0415 - only what is measured is imported, and counts

    with contextlib.redirect_stdout(io.StringIO()):
        return _timed(lambda: COCO(str(locate_split(root, "train")[1])))


# --- memory of processes ----------------------------------------------------------------------------------------------


class _Boxes(Dataset[Any]):
    """Items of many records each, that need no picture."""

    def __init__(self, records: Sequence[Any]) -> None:
        self.records = records

    def __getitem__(self, i: int) -> Any:
        boxes = sum(len(record.boxes) for record in self.records[_SHARE * i : _SHARE * (i + 1)])
        return torch.tensor(boxes), {}


def _private(pid: int | None) -> float:
    """Read how many MiB a process shares with no other."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def _sharing(records: Sequence[Any]) -> Figures:
    batches = [[i] for i in range(len(records) // _SHARE)]
    with loaded(_Boxes(records), batches, workers=2) as items:
        children = multiprocessing.active_children()
        first = sum(_private(child.pid) for child in children) / len(children)
        for n, _ in enumerate(items):
            if n == max(0, len(batches) - 16):  # while they live
                last = sum(_private(child.pid) for child in children) / len(children)
    return {"private_mib_at_first": first, "private_mib_at_last": last}


def sharing(root: Path) -> Figures:
    """Measure the memory of one of two loader processes after an epoch over packed records."""
    return _sharing(read_coco(*locate_split(root, "train")).records)


def sharing_objects(root: Path) -> Figures:
    """Measure it where the records are Python objects with tensors."""
    return _sharing(tuple(read_coco(*locate_split(root, "train")).records))


# --- loading ----------------------------------------------------------------------------------------------------------


def _rate(load: Callable[[int], object], count: int = 60) -> Figures:
    torch.set_num_threads(1)
    load(0)
    begun, used = time.perf_counter(), time.process_time()
    for i in range(1, count + 1):
        load(i)
    wall, own = time.perf_counter() - begun, time.process_time() - used
    return {"images_per_second": count / wall, "images_per_cpu_second": count / own}


def _val(root: Path) -> CocoIndex:
    return read_coco(*locate_split(root, "val"))


def loading(root: Path) -> Figures:
    """Load pictures as training on COCO does, at 800 × 1333."""
    return _rate(CocoDataset(_val(root), augmentation(1333, "flip", 800)).__getitem__)


def loading_multi_scale(root: Path) -> Figures:
    """Load pictures as training on several scales does."""
    dataset = CocoDataset(_val(root), scaled=scaled_augmentations(1333, "flip", 800))
    sides = short_sides(1333, 800)
    return _rate(lambda i: dataset[(0, i, sides[i % len(sides)])])


def _reference(root: Path, steps: Sequence[v2.Transform]) -> Figures:
    """Load pictures through the steps of torchvision's reference script: Pillow's image, transforms, a tensor last."""
    records = _val(root).records
    tidy = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.SanitizeBoundingBoxes(), v2.ToPureTensor()]
    transform = v2.Compose([*steps, *tidy])

    def load(i: int) -> object:
        record = records[i]
        image = Image.open(record.path).convert("RGB")
        boxes = tv_tensors.BoundingBoxes(record.boxes, format="XYXY", canvas_size=(record.height, record.width))
        return transform(image, {"boxes": boxes, "labels": record.labels})

    return _rate(load)


def loading_reference(root: Path) -> Figures:
    """Load pictures as the reference does with flips, and resizes in its model: its resizing is timed, too."""
    return _reference(root, [v2.RandomHorizontalFlip(), v2.Resize([800], max_size=1333)])


def loading_reference_multi_scale(root: Path) -> Figures:
    """Load pictures as the reference does on several scales."""
    return _reference(
        root, [v2.RandomShortestSize(list(short_sides(1333, 800)), max_size=1333), v2.RandomHorizontalFlip()]
    )


def decoding(root: Path) -> Figures:
    """Decode pictures and nothing else."""
    records = _val(root).records
    return _rate(lambda i: read_picture(records[i].path))


# --- evaluation -------------------------------------------------------------------------------------------------------


def evaluation(root: Path) -> Figures:
    """Score 5,000 images of 100 detections each, without and with NMS: the objects, moved a little, and noise."""
    # 1. Detections.
    index, rng = _val(root), np.random.default_rng(0)
    found: list[Detection] = []
    targets: list[Target] = []
    for n, record in enumerate(index.records):
        sides = np.array([record.width, record.height] * 2)
        noise = np.sort(rng.uniform(0, 1, (100, 2, 2)), axis=1).reshape(100, 4) * sides
        own = record.boxes.numpy() + rng.normal(0, 3, (len(record.boxes), 4))
        boxes = torch.from_numpy(np.concatenate([own, noise])[:100].astype(np.float32))
        labels = torch.cat([record.labels, torch.from_numpy(rng.integers(1, 81, 100))])[:100]
        found.append({"boxes": boxes, "labels": labels, "scores": torch.from_numpy(rng.random(100)).float()})
        targets.append({"boxes": record.boxes, "labels": record.labels, "image_id": torch.tensor(n)})

    # 2. Scores.
    return _timed(lambda: score(Found(found, found, targets), index))


MEASURES: dict[str, Callable[[Path, int], Any]] = {
    "reading": lambda root, runs: _in_turn(["reading", "reading_pycocotools"], root, runs),
    "sharing": lambda root, runs: _in_turn(["sharing", "sharing_objects"], root, runs),
    "loading": lambda root, runs: _in_turn([n for n in _CONTESTANTS if n.startswith(("load", "deco"))], root, runs),
    "evaluation": lambda root, runs: _in_turn(["evaluation"], root, runs),
}
_CONTESTANTS: dict[str, Callable[[Path], Figures]] = {
    work.__name__: work
    for work in (
        reading,
        reading_pycocotools,
        sharing,
        sharing_objects,
        decoding,
        loading,
        loading_reference,
        loading_multi_scale,
        loading_reference_multi_scale,
        evaluation,
    )
}

if __name__ == "__main__":
    print(json.dumps(_CONTESTANTS[sys.argv[1]](Path(sys.argv[2]))))
