"""Where pictures and annotations lie in the folders that other programs export, and what their file names mean."""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from coco_example.data.dataset import CocoDataset
from coco_example.data.layouts import locate_split
from coco_example.data.reader import CocoIndex, read_coco
from coco_example.errors import DataError
from PIL import Image

from tests.makers.coco_files import document, image, write_dataset

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


def assert_same(mine: CocoIndex, theirs: CocoIndex) -> None:
    assert [c.name for c in mine.categories] == [c.name for c in theirs.categories]
    assert len(mine.records) == len(theirs.records)
    for a, b in zip(mine.records, theirs.records, strict=True):
        assert torch.equal(a.boxes, b.boxes)
        assert torch.equal(a.labels, b.labels)
        assert a.path.read_bytes() == b.path.read_bytes()


@pytest.mark.parametrize("writer", [roboflow, cvat, cvat_apart, label_studio, fiftyone])
def test_exports_of_other_programs_are_understood_as_they_are_unzipped(writer, scenes_folder, tmp_path):
    export(writer, scenes_folder, tmp_path)
    train = read_coco(*locate_split(tmp_path, "train"))
    val = read_coco(*locate_split(tmp_path, "val"), train.categories)
    assert_same(train, read_coco(*locate_split(scenes_folder, "train")))
    assert_same(val, read_coco(*locate_split(scenes_folder, "val")))
    assert torch.equal(CocoDataset(val)[3][0], CocoDataset(read_coco(*locate_split(scenes_folder, "val")))[3][0])


@pytest.mark.parametrize(
    ("writer", "name", "pictures"),
    [
        (roboflow, "_annotations.coco.json", "."),
        (cvat_apart, "annotations/instances_default.json", "images/default"),
        (label_studio, "result.json", "images"),
        (fiftyone, "labels.json", "data"),
    ],
)
def test_an_export_without_splits_is_for_training_and_a_sentence_tells_what_to_do_about_the_other(
    writer, name, pictures, scenes_folder, tmp_path
):
    export(writer, scenes_folder, tmp_path)
    root, other = (tmp_path / (split if writer is not roboflow else SPLITS[split]) for split in ("train", "val"))
    assert locate_split(root, "train") == (root / pictures, root / name)
    with pytest.raises(DataError, match=rf"not divided, {name} .*--val-annotations FILE --val-images FOLDER") as caught:
        locate_split(root, "val")
    assert "\n" not in str(caught.value)
    found = locate_split(root, "val", str(other / name))
    assert_same(read_coco(*found), read_coco(*locate_split(scenes_folder, "val")))
    assert locate_split(root, "val", str(other / name), str(other / pictures)) == (other / pictures, other / name)


class TestLocateSplit:
    @pytest.mark.parametrize("year", ["2017", ""])
    def test_knows_both_layouts(self, tmp_path, year):
        for split in ("train", "val"):
            (tmp_path / f"{split}{year}").mkdir()
        (tmp_path / "annotations").mkdir()
        for name in (f"instances_train{year}", f"instances_val{year}", "mine"):
            (tmp_path / "annotations" / f"{name}.json").touch()
        folder = tmp_path / f"val{year}"
        assert locate_split(tmp_path, "val") == (folder, tmp_path / "annotations" / f"instances_val{year}.json")
        assert locate_split(tmp_path, "val", "mine.json") == (folder, tmp_path / "annotations" / "mine.json")
        (tmp_path / "elsewhere").mkdir()
        assert locate_split(tmp_path, "val", images="elsewhere")[0] == tmp_path / "elsewhere"

    def test_lists_what_it_tried(self, tmp_path):
        (tmp_path / "val").mkdir()
        with pytest.raises(DataError) as caught:
            locate_split(tmp_path, "val")
        for path in ("val2017", "annotations/instances_val2017.json", "annotations/instances_val.json"):
            assert f"{tmp_path / path} (missing)" in str(caught.value)
        assert f"{tmp_path / 'val'} with" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("deep/1.png", "deep/1.png"),
        ("deep\\er\\1.png", "deep/er/1.png"),
        (".\\deep\\1.png", "deep/1.png"),
        ("train/1.png", "1.png"),  # repeats the folder's own name
        ("train/1.png", "train/1.png"),  # unless it is one of its folders
        ("a\\b.png", "a\\b.png"),  # on this system, a name like any other
        ("IMG_1.JPG", "img_1.jpg"),
        (unicodedata.normalize("NFC", "fußgänger.png"), unicodedata.normalize("NFD", "fußgänger.png")),
    ],
)
def test_file_names_of_other_systems_are_understood(tmp_path, name, file):
    images, annotations = write_dataset(tmp_path, document([{**image(1), "file_name": name}]), files=False)
    (images / file).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (160, 120)).save(images / file)
    assert read_coco(images, annotations).records[0].path == images / file


def test_a_name_that_could_be_two_files_is_missing(tmp_path):
    images, annotations = write_dataset(tmp_path, document([{**image(1), "file_name": "A.png"}]), files=False)
    for name in ("a.png", "a.PNG"):
        Image.new("RGB", (160, 120)).save(images / name)
    with pytest.raises(DataError, match=r"1 missing: A\.png"):
        read_coco(images, annotations)
