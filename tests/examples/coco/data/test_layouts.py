"""Where pictures and annotations lie in the folders that other programs export, and what their file names mean."""

from __future__ import annotations

import shutil
import unicodedata

import pytest
import torch
from coco_example.data.dataset import CocoDataset
from coco_example.data.layouts import locate_split
from coco_example.data.reader import CocoIndex, read_coco
from coco_example.errors import DataError
from PIL import Image

from tests.makers.coco_files import document, image, write_dataset
from tests.makers.exports import SPLITS, cvat, cvat_apart, export, fiftyone, label_studio, roboflow


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
    def test_roboflows_third_split_is_scored_by_its_name_and_by_its_file(self, scenes_folder, tmp_path):
        export(roboflow, scenes_folder, tmp_path)
        shutil.copytree(tmp_path / "valid", tmp_path / "test")
        expected = tmp_path / "test", tmp_path / "test" / "_annotations.coco.json"
        assert locate_split(tmp_path, "test") == expected
        assert locate_split(tmp_path, "val", "test/_annotations.coco.json") == expected
        shutil.copy(expected[1], tmp_path / "valid" / "mine.json")
        assert locate_split(tmp_path, "train", "valid/mine.json")[0] == tmp_path / "valid"

    def test_a_file_that_lies_elsewhere_is_of_the_pictures_of_its_split(self, scenes_folder, tmp_path):
        file = shutil.copy(scenes_folder / "annotations" / "instances_val.json", tmp_path / "corrected.json")
        assert locate_split(scenes_folder, "val", str(file)) == (scenes_folder / "val", file)

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
        ("..\\..\\label-studio\\media\\upload\\4\\1.png", "1.png"),  # Label Studio on Windows, from 1.16 on
        ("/home/alice/pictures/1.png", "1.png"),  # absolute, as FiftyOne and labelme2coco write on demand
        ("train\\1/1.png", "1.png"),  # Label Studio before, with the number of the project
        (unicodedata.normalize("NFC", "fußgänger.png"), unicodedata.normalize("NFD", "fußgänger.png")),
    ],
)
def test_file_names_of_other_systems_are_understood(tmp_path, name, file):
    images, annotations = write_dataset(tmp_path, document([{**image(1), "file_name": name}]), files=False)
    (images / file).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (160, 120)).save(images / file)
    assert read_coco(images, annotations).records[0].path == images / file


def test_two_names_of_other_folders_are_not_one_picture(tmp_path):
    entries = [{**image(n), "file_name": f"{n}/a.png"} for n in (1, 2)]
    images, annotations = write_dataset(tmp_path, document(entries), files=False)
    Image.new("RGB", (160, 120)).save(images / "a.png")
    with pytest.raises(DataError, match=r"2 missing: 1/a\.png, 2/a\.png"):
        read_coco(images, annotations)
    (images / "2").mkdir()
    Image.new("RGB", (160, 120)).save(images / "2" / "a.png")
    assert [record.path for record in read_coco(images, annotations).records] == [images / "a.png", images / "2/a.png"]


def test_a_name_that_could_be_two_files_is_missing(tmp_path):
    images, annotations = write_dataset(tmp_path, document([{**image(1), "file_name": "A.png"}]), files=False)
    for name in ("a.png", "a.PNG"):
        Image.new("RGB", (160, 120)).save(images / name)
    with pytest.raises(DataError, match=r"1 missing: A\.png"):
        read_coco(images, annotations)
