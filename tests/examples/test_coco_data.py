from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
from collections.abc import Iterable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_data import CocoDataset, Level, ResumableSampler, augmentation, collate
from coco_reader import CocoIndex, DatasetError, locate_split, read_coco
from models import build_detector
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader

from crosskd_assign import adapt

LEVELS = ("none", "flip", "crop", "full")
REAL_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
# Rectangles of image 1, of which pixels and boxes have to agree after every transform: colour, label, xyxy.
RECTANGLES = (((0, 255, 0), 1, (20, 30, 70, 60)), ((255, 0, 0), 2, (100, 10, 120, 80)))

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),  # Python 3.12 on forked workers
    pytest.mark.filterwarnings("ignore:.*suggested max number of worker.*:UserWarning"),
]


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


@pytest.fixture
def index(tmp_path):
    """Nine images with zero, one or two boxes."""
    annotations = [box(n, (10 * n, 5 * n, 30, 20), 1 + n % 2) for n in range(1, 9)] + [box(3, (1, 2, 50, 60))]
    return read_coco(*write_dataset(tmp_path, document(map(image, range(1, 10)), annotations, ((1, "a"), (2, "b")))))


@pytest.fixture
def rectangles(tmp_path):
    """One black image with the coloured rectangles."""
    annotations = [box(1, (x1, y1, x2 - x1, y2 - y1), label) for _, label, (x1, y1, x2, y2) in RECTANGLES]
    paths = write_dataset(tmp_path, document([image(1)], annotations, ((1, "green"), (2, "red"))))
    pixels = np.zeros((120, 160, 3), np.uint8)
    for colour, _, (x1, y1, x2, y2) in RECTANGLES:
        pixels[y1:y2, x1:x2] = colour
    Image.fromarray(pixels).save(paths[0] / "1.png")
    return read_coco(*paths)


class TestReader:
    def test_agrees_with_pycocotools(self, tmp_path):
        annotations = [
            box(7, (1.5, 2.25, 10, 20), 9, iscrowd=0),
            box(5, (3, 4, 30.5, 40), 2, iscrowd=0),
            box(7, (0, 0, 100, 50), 2, iscrowd=1),
            box(7, (60, 70, 12, 13), 4, iscrowd=0),
            box(5, (100, 80, 60, 40), 9, iscrowd=0),
        ]
        paths = write_dataset(
            tmp_path,
            document([image(7), image(6), image(5)], annotations, ((9, "c"), (2, "a"), (4, "b"))),
        )
        index = read_coco(*paths)
        reference = COCO(str(paths[1]))

        assert [record.id for record in index.records] == [7, 6, 5]
        assert [category.name for category in index.categories] == ["a", "b", "c"]
        assert index.label_to_category == {1: 2, 2: 4, 3: 9}
        assert index.num_classes == 4
        assert index.annotations == paths[1]
        for record in index.records:
            expected = reference.loadAnns(reference.getAnnIds(imgIds=[record.id], iscrowd=False))
            xywh = torch.tensor([entry["bbox"] for entry in expected]).reshape(-1, 4)
            assert torch.equal(record.boxes, torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1))
            labels = [index.label_to_category[label] for label in record.labels.tolist()]
            assert labels == [entry["category_id"] for entry in expected]
            assert (record.boxes.dtype, record.labels.dtype) == (torch.float32, torch.int64)
            assert record.path.is_file()

    def test_counts_what_it_drops_and_clips(self, tmp_path):
        annotations = [
            box(1, (10, 10, 20, 20)),
            box(1, (-5, 10, 20, 20)),  # sticks out on the left
            box(1, (150, 110, 20, 20)),  # sticks out at the lower right
            box(1, (10, 10, 20, 110.0000001)),  # rounding is not worth a mention
            box(1, (10, 10, 0, 20)),
            box(1, (10, 10, 20, -3)),
            box(1, (10, 10, 20, 0.3)),
            box(1, (float("nan"), 10, 20, 20)),
            box(1, (10, 10, float("inf"), 20)),
            box(1, (200, 10, 20, 20)),  # outside
            box(1, (10, -20, 20, 20.2)),  # a fifth of a pixel inside
            box(1, (10, 10, 0, 0), iscrowd=1),
        ]
        index = read_coco(*write_dataset(tmp_path, document([image(1), image(2)], annotations)))
        report = index.report
        expected = [[10, 10, 30, 30], [0, 10, 15, 30], [150, 110, 160, 120], [10, 10, 30, 120]]
        torch.testing.assert_close(index.records[0].boxes, torch.tensor(expected, dtype=torch.float32))
        assert (report.images, report.images_without_boxes, report.boxes) == (2, 1, 4)
        assert (report.clipped, report.crowd_dropped) == (2, 1)
        assert (report.degenerate_dropped, report.outside_dropped) == (5, 2)
        assert str(report) == (
            "2 images, 1 images without boxes, 4 boxes, 1 crowd dropped, 5 degenerate dropped, 2 outside dropped, "
            "2 clipped"
        )

    def test_reads_a_file_without_any_annotation(self, tmp_path):
        index = read_coco(*write_dataset(tmp_path, document([image(1), image(2)])))
        assert [record.boxes.shape for record in index.records] == [(0, 4), (0, 4)]
        assert read_coco(*write_dataset(tmp_path / "none", document())).records == ()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"images": [image(1), image(2), image(1)]}, r"unique image ids but got 1 as in images\[0\] \(images\[2\]"),
            ({"categories": [{"id": 3, "name": "a"}] * 2}, "unique category ids"),
            ({"categories": None}, "a list under 'categories' but got None"),
            ({"annotations": {}}, "a list under 'annotations'"),
            ({"images": [image(1), {"id": 2, "file_name": "2.png", "width": 3}]}, r"'height'.*nothing \(images\[1\]"),
            ({"images": [{**image(1), "width": "160"}]}, r"'width' to be of type int but got '160' \(images\[0\]"),
            ({"images": [17]}, r"'id' to be of type int but got nothing \(images\[0\]"),
            ({"categories": [{"id": 1}]}, r"'name'.*nothing \(categories\[0\]"),
            ({"annotations": [{"image_id": 1, "category_id": 1}]}, r"'bbox'.*nothing \(annotations\[0\]"),
            ({"annotations": [box(1, (1, 2, 3, 4)), box(8, (1, 2, 3, 4))]}, r"image_id 8 and.*annotations\[1\]"),
            ({"annotations": [box(1, (1, 2, 3, 4), 8)]}, r"category_id 8 \(annotations\[0\]"),
            ({"annotations": [box(1, (1, 2, 3))]}, r"\[x, y, width, height\] but got \[1, 2, 3\] \(annotations\[0\]"),
            ({"annotations": [box(1, (1, 2, 3, None))]}, r"but got \[1, 2, 3, None\] \(annotations\[0\]"),
        ],
    )
    def test_names_the_entry_that_is_wrong(self, tmp_path, changes, message):
        images, annotations = write_dataset(tmp_path, document([image(1)]))
        annotations.write_text(json.dumps({**document([image(1)]), **changes}))
        with pytest.raises(DatasetError, match=message) as caught:
            read_coco(images, annotations)
        assert str(annotations) in str(caught.value)
        assert "Fix: " in str(caught.value)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (b'{"images": [],\n "oops" 3}', "line 2 column 9"),
            (b"[1, 2]", "'categories'"),
            (b"\xff\xfe\x00\x01", "JSON"),
        ],
    )
    def test_rejects_malformed_json(self, tmp_path, text, message):
        file = tmp_path / "broken.json"
        file.write_bytes(text)
        with pytest.raises(DatasetError, match=message) as caught:
            read_coco(tmp_path, file)
        assert str(file) in str(caught.value)

    def test_rejects_a_missing_annotation_file(self, tmp_path):
        with pytest.raises(DatasetError, match=r"nowhere\.json"):
            read_coco(tmp_path, tmp_path / "nowhere.json")

    @pytest.mark.parametrize(
        "name", ["../secret.png", "a/../../secret.png", "/etc/passwd", "C:\\secret", "a\\..\\b.png"]
    )
    def test_refuses_file_names_that_leave_the_folder(self, tmp_path, name):
        images, annotations = write_dataset(tmp_path, document([image(1)]))
        Image.new("RGB", (160, 120)).save(tmp_path / "secret.png")
        annotations.write_text(json.dumps(document([image(1), {**image(2), "file_name": name}])))
        with pytest.raises(DatasetError, match=r"file_name to stay inside .* \(images\[1\] of"):
            read_coco(images, annotations)

    def test_accepts_folders_in_file_names(self, tmp_path):
        images, annotations = write_dataset(tmp_path, document([image(1)]))
        (images / "deep").mkdir()
        (images / "1.png").rename(images / "deep" / "1.png")
        annotations.write_text(json.dumps(document([{**image(1), "file_name": "deep/1.png"}])))
        assert read_coco(images, annotations).records[0].path == images / "deep" / "1.png"

    def test_names_the_first_five_missing_images(self, tmp_path):
        images, annotations = write_dataset(tmp_path, document(map(image, range(1, 10))))
        for n in range(2, 9):
            (images / f"{n}.png").unlink()
        with pytest.raises(DatasetError, match=r"7 missing: 2\.png, 3\.png, 4\.png, 5\.png, 6\.png, … \("):
            read_coco(images, annotations)
        with pytest.raises(DatasetError, match=r"9 missing: 1\.png"):
            read_coco(tmp_path / "elsewhere", annotations)

    def test_does_not_send_tensors_to_other_processes_as_open_files(self, index):
        copy = pickle.loads(bytes(ForkingPickler.dumps(index)))  # noqa: S301 - our own bytes
        assert not any(record.boxes.is_shared() for record in index.records)
        for old, new in zip(index.records, copy.records, strict=True):
            assert torch.equal(old.boxes, new.boxes)
            assert torch.equal(old.labels, new.labels)
            assert (old.id, old.path, old.width, old.height) == (new.id, new.path, new.width, new.height)


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

    def test_lists_what_it_tried(self, tmp_path):
        (tmp_path / "val").mkdir()
        with pytest.raises(DatasetError) as caught:
            locate_split(tmp_path, "val")
        for path in ("val2017", "annotations/instances_val2017.json", "annotations/instances_val.json"):
            assert f"{tmp_path / path} (missing)" in str(caught.value)
        assert f"{tmp_path / 'val'} with" in str(caught.value)


class TestDecoding:
    def dataset(self, tmp_path: Path, picture: Image.Image, name: str, **options: Any) -> CocoDataset:
        images, annotations = write_dataset(tmp_path, document([{**image(1, 40, 30), "file_name": name}]), files=False)
        picture.save(images / name, **options)
        return CocoDataset(read_coco(images, annotations))

    @pytest.mark.parametrize(
        ("mode", "name"),
        [("L", "a.png"), ("1", "a.png"), ("P", "a.png"), ("RGBA", "a.png"), ("CMYK", "a.jpg"), ("LA", "a.png")],
    )
    def test_every_mode_becomes_rgb(self, tmp_path, mode, name):
        ramp = Image.fromarray(np.linspace(0, 255, 40 * 30 * 3).reshape(30, 40, 3).astype(np.uint8))
        options = {"transparency": bytes(range(256))} if mode == "P" else {}
        pixels, target = self.dataset(tmp_path, ramp.convert(mode), name, **options)[0]
        assert (pixels.shape, pixels.dtype, type(pixels)) == ((3, 30, 40), torch.float32, torch.Tensor)
        expected = np.asarray(ramp.convert(mode).convert("RGB")).transpose(2, 0, 1) / 255
        tolerance = 0.15 if name.endswith("jpg") else 1e-6
        assert np.abs(pixels.numpy() - expected).max() < tolerance
        assert {key: type(value) for key, value in target.items()} == dict.fromkeys(
            ("boxes", "labels", "image_id"), torch.Tensor
        )

    def test_orientation_tags_are_not_obeyed(self, tmp_path):
        picture = Image.new("RGB", (40, 30))
        picture.paste((255, 255, 255), (0, 0, 20, 30))
        exif = Image.Exif()
        exif[0x0112] = 6  # show turned by a quarter
        pixels, _ = self.dataset(tmp_path, picture, "a.jpg", exif=exif)[0]
        assert pixels.shape == (3, 30, 40)
        assert pixels[:, :, :18].min() > 0.9
        assert pixels[:, :, 22:].max() < 0.1

    def test_size_has_to_be_the_annotated_one(self, tmp_path):
        dataset = self.dataset(tmp_path, Image.new("RGB", (30, 40)), "a.png")
        with pytest.raises(DatasetError, match=r"Expected 40×30 pixels but got 30×40 \(.*a\.png\)"):
            dataset[0]

    def test_names_a_file_it_cannot_use(self, tmp_path):
        dataset = self.dataset(tmp_path, Image.effect_noise((40, 30), 90), "a.png")
        path = dataset.index.records[0].path
        path.write_bytes(path.read_bytes()[:400])
        with pytest.raises(DatasetError, match=r"readable image but got .*a\.png"):
            dataset[0]
        Image.fromarray(np.zeros((30, 40), np.uint16)).save(path)
        with pytest.raises(DatasetError, match=r"8 bits per channel but got mode I;16 .*a\.png"):
            dataset[0]

    def test_cache_reads_a_file_once(self, index):
        cached, plain = CocoDataset(index, cache=True), CocoDataset(index)
        first, _ = cached[2]
        first.zero_()  # what the caller does to it is no concern of the cache
        expected, _ = plain[2]
        index.records[2].path.unlink()
        assert torch.equal(cached[2][0], expected)
        with pytest.raises(DatasetError, match=r"3\.png"):
            plain[2]


def assert_boxes_cover_colours(pixels: Tensor, target: dict[str, Tensor], border: int = 0) -> None:
    """Every box is full of its label's colour, and nothing else has that colour."""
    _, height, width = pixels.shape
    strength = {1: pixels[1] - pixels[[0, 2]].amax(0), 2: pixels[0] - pixels[1:].amax(0)}
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    checked = (x > border) & (x < width - border) & (y > border) & (y < height - border)
    for label, amount in strength.items():
        boxes = target["boxes"][target["labels"] == label].reshape(-1, 4, 1, 1)
        depth = torch.stack([x - boxes[:, 0], y - boxes[:, 1], boxes[:, 2] - x, boxes[:, 3] - y]).amin(0)
        depth = depth.amax(0) if len(boxes) else torch.full((height, width), -100.0)
        assert (amount[(depth > 1.5) & checked] > 0.1).all()
        assert (amount[(depth < -1.5) & checked] < 0.1).all()


class TestAugmentation:
    @pytest.mark.parametrize("level", LEVELS)
    @pytest.mark.parametrize("size", [80, 200])
    def test_boxes_and_labels_go_with_the_pixels(self, rectangles, level, size):
        dataset = CocoDataset(rectangles, augmentation(size, level))
        places = set()
        for epoch in range(8):
            pixels, target = dataset[epoch, 0]
            # A strip too thin for a box of its own may be left at the border of a crop.
            assert_boxes_cover_colours(pixels, target, border=2 if level in ("crop", "full") else 0)
            boxes = target["boxes"]
            places.add(tuple(boxes.flatten().tolist()))
            assert len(target["labels"]) == len(boxes)
            assert (boxes >= 0).all()
            assert (boxes[:, 2:] <= torch.tensor(pixels.shape[:0:-1])).all()
            assert (boxes[:, 2:] - boxes[:, :2] >= 2).all()
            assert pixels.min() >= 0
            assert pixels.max() <= 1
        assert len(places) == {"none": 1, "flip": 2, "crop": 8, "full": 8}[level]

    def test_mosaic_shows_four_images(self, rectangles):
        dataset = CocoDataset(rectangles, mosaic=1.0)
        grey = torch.tensor(114 / 255)
        counts = []
        for epoch in range(10):
            pixels, target = dataset[epoch, 0]
            assert pixels.shape == (3, 120, 160)
            assert not torch.isclose(pixels, grey).any()  # images of one size leave no gap
            assert_boxes_cover_colours(pixels, target, border=2)
            counts.append(len(target["boxes"]))
        assert max(counts) > 2

    def test_mosaic_of_different_sizes(self, tmp_path):
        sizes = {1: (60, 90), 2: (120, 40), 3: (50, 50), 4: (33, 77), 5: (90, 20)}
        entries = [image(number, *size) for number, size in sizes.items()]
        annotations = [box(number, (0, 0, *size)) for number, size in sizes.items()]
        dataset = CocoDataset(read_coco(*write_dataset(tmp_path, document(entries, annotations))), mosaic=1.0)
        wrong, total = 0.0, 0
        for i, epoch in itertools.product(range(5), range(6)):
            pixels, target = dataset[epoch, i]
            y, x = torch.meshgrid(*(torch.arange(side) + 0.5 for side in pixels.shape[1:]), indexing="ij")
            covered = torch.zeros(pixels.shape[1:], dtype=torch.bool)
            for x1, y1, x2, y2 in target["boxes"].tolist():
                covered |= (x > x1) & (x < x2) & (y > y1) & (y < y2)
            grey = torch.isclose(pixels, torch.tensor(114 / 255)).all(0)
            meeting = [set.intersection(*({b[n], b[n + 2]} for b in target["boxes"].tolist())) for n in (0, 1)]
            assert all(meeting)  # every image touches the point around which they lie
            wrong += (grey == covered).sum().item()
            total += grey.numel()
            assert target["image_id"] == i + 1
        assert wrong < 0.01 * total  # strips thinner than 2 pixels have no box

    def test_boxes_that_become_too_small_go_with_their_labels(self, tmp_path):
        annotations = [box(1, (10, 10, 3, 50), 1), box(1, (50, 10, 5, 50), 2), box(1, (90, 10, 50, 3), 1)]
        paths = write_dataset(tmp_path, document([image(1)], annotations, ((1, "a"), (2, "b"))))
        _, target = CocoDataset(read_coco(*paths), augmentation(80, "none"))[0]
        assert target["boxes"].tolist() == [[25, 5, 27.5, 30]]
        assert target["labels"].tolist() == [2]

    @pytest.mark.parametrize("level", LEVELS)
    def test_images_without_boxes_survive(self, tmp_path, level):
        index = read_coco(*write_dataset(tmp_path, document([image(1)])))
        for mosaic in (0.0, 1.0):
            pixels, target = CocoDataset(index, augmentation(64, level), mosaic=mosaic)[3, 0]
            assert pixels.shape[0] == 3
            assert (target["boxes"].shape, target["boxes"].dtype) == ((0, 4), torch.float32)
            assert (target["labels"].shape, target["labels"].dtype) == ((0,), torch.int64)
            assert (target["image_id"].item(), target["image_id"].dtype) == (1, torch.int64)

    @pytest.mark.parametrize(
        ("level", "shape"), [("none", (3, 60, 80)), ("flip", (3, 60, 80)), ("crop", (3, 80, 80)), ("full", (3, 80, 80))]
    )
    def test_size_is_the_longer_side(self, index, level, shape):
        assert CocoDataset(index, augmentation(80, level))[0][0].shape == shape

    @pytest.mark.parametrize(
        ("size", "short_side", "shape"), [(80, 60, (3, 60, 80)), (80, 45, (3, 45, 60)), (80, 70, (3, 60, 80))]
    )
    def test_neither_side_exceeds_its_bound(self, index, size, short_side, shape):
        pixels, target = CocoDataset(index, augmentation(size, "flip", short_side))[0]
        assert pixels.shape == shape
        model = build_detector("fcos", "small", 3, size=size, short_side=short_side)
        batch, [moved] = adapt(model).preprocess([pixels], [target])
        assert batch.sizes == (shape[1:],)  # the detector has nothing left to resize
        assert torch.equal(moved["boxes"], target["boxes"])

    def test_an_image_of_the_right_size_is_not_resampled(self, index):
        dataset, original = CocoDataset(index, augmentation(160, "flip")), CocoDataset(index)[4][0]
        seen = {
            flipped
            for epoch in range(8)
            for flipped in (False, True)
            if torch.equal(dataset[epoch, 4][0], original.flip(-1) if flipped else original)
        }
        assert seen == {False, True}

    def test_full_changes_colours_and_crop_does_not(self, tmp_path):
        images, annotations = write_dataset(tmp_path, document([image(1)]))
        Image.new("RGB", (160, 120), (200, 100, 50)).save(images / "1.png")
        index = read_coco(images, annotations)

        def colours(level: Level) -> set[tuple[float, ...]]:
            dataset = CocoDataset(index, augmentation(64, level))
            return {tuple(dataset[epoch, 0][0][:, 0, 32].mul(255).round().tolist()) for epoch in range(20)}

        assert colours("crop") == {(200, 100, 50), (114, 114, 114)}
        assert len(colours("full")) > 10


class TestRepeatability:
    def batches(self, index: CocoIndex, workers: int, *, start: int = 0, count: int = 6) -> list[Any]:
        dataset = CocoDataset(index, augmentation(64, "full"), seed=3, mosaic=0.5)
        sampler = ResumableSampler(len(dataset), 4, seed=3, start_batch=start)
        loader = DataLoader(
            dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0
        )
        return list(itertools.islice(loader, count))

    def assert_same(self, first: list[Any], second: list[Any]) -> None:
        assert len(first) == len(second) > 0
        for (images, targets), (other_images, other_targets) in zip(first, second, strict=True):
            assert all(map(torch.equal, images, other_images))
            assert [t["image_id"].item() for t in targets] == [t["image_id"].item() for t in other_targets]
            assert all(torch.equal(a[k], b[k]) for a, b in zip(targets, other_targets, strict=True) for k in a)

    def test_batches_do_not_depend_on_workers_or_interruptions(self, index):
        expected = self.batches(index, 0)
        self.assert_same(expected, self.batches(index, 2))
        self.assert_same(expected[3:], self.batches(index, 1, start=3, count=3))  # in the midst of the second epoch

    def test_epochs_images_and_seeds_differ(self, index):
        index = dataclasses.replace(index, records=index.records[:1] * 2)
        transform = augmentation(64, "crop")
        keys = [(0, 0), (1, 0), (0, 1)]
        items = [CocoDataset(index, transform, seed=seed)[key][0] for seed in (0, 1) for key in keys]
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(items, 2))
        assert torch.equal(CocoDataset(index, transform)[1][0], CocoDataset(index, transform)[0, 1][0])

    def test_the_random_numbers_of_the_training_are_left_alone(self, index, monkeypatch):
        monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("reseeded the accelerators"))
        dataset = CocoDataset(index, augmentation(64, "full"), mosaic=0.5)
        before = torch.get_rng_state()
        dataset[0]
        assert torch.equal(torch.get_rng_state(), before)

    def test_items_may_be_changed_in_place(self, index):
        dataset = CocoDataset(index)
        dataset[0][1]["boxes"].zero_()
        dataset[0][1]["labels"].zero_()
        assert dataset[0][1]["boxes"].tolist() == [[10, 5, 40, 25]]
        assert dataset[0][1]["labels"].tolist() == [2]


def take(sampler: ResumableSampler, count: int) -> list[list[tuple[int, int]]]:
    return list(itertools.islice(sampler, count))


class TestSampler:
    def test_an_epoch_is_a_permutation_without_the_incomplete_batch(self):
        sampler = ResumableSampler(23, 4, seed=1)
        assert sampler.batches_per_epoch == 5
        batches = take(sampler, 15)
        orders = []
        for epoch in range(3):
            keys = [key for batch in batches[5 * epoch : 5 * epoch + 5] for key in batch]
            assert {e for e, _ in keys} == {epoch}
            orders.append([i for _, i in keys])
            assert len(set(orders[-1])) == 20
            assert set(orders[-1]) <= set(range(23))
        assert len(set(map(tuple, orders))) == 3
        assert set().union(*orders) == set(range(23))  # what one epoch leaves out, another one shows

    @pytest.mark.parametrize("start", [1, 4, 5, 12])
    def test_resuming_gives_the_batches_of_an_uninterrupted_run(self, start):
        whole = take(ResumableSampler(23, 2, seed=5, rank=1, world_size=2), 20)
        rest = take(ResumableSampler(23, 2, seed=5, rank=1, world_size=2, start_batch=start), 20 - start)
        assert rest == whole[start:]

    def test_every_iteration_starts_anew(self):
        sampler = ResumableSampler(23, 4, start_batch=3)
        assert take(sampler, 7) == take(sampler, 7)

    @pytest.mark.parametrize(("batch_size", "world_size"), [(8, 1), (4, 2), (2, 4)])
    def test_ranks_share_a_global_batch(self, batch_size, world_size):
        alone = take(ResumableSampler(50, 8, seed=2), 13)
        ranks = [
            take(ResumableSampler(50, batch_size, seed=2, rank=rank, world_size=world_size), 13)
            for rank in range(world_size)
        ]
        for k in range(13):
            parts = [set(batches[k]) for batches in ranks]
            assert sum(map(len, parts)) == len(set().union(*parts)) == 8
            assert set().union(*parts) == set(alone[k])

    def test_a_small_set_still_fills_a_batch_on_every_rank(self):
        ranks = [take(ResumableSampler(3, 2, rank=rank, world_size=4), 2) for rank in range(4)]
        for k in range(2):
            indices = [i for batches in ranks for _, i in batches[k]]
            assert len(indices) == 8
            assert {indices.count(i) for i in range(3)} == {2, 3}

    def test_seeds_differ(self):
        assert take(ResumableSampler(23, 4, seed=0), 3) != take(ResumableSampler(23, 4, seed=1), 3)

    @pytest.mark.parametrize(
        ("length", "options"),
        [(0, {}), (5, {"rank": 2, "world_size": 2}), (5, {"rank": -1}), (5, {"start_batch": -1})],
    )
    def test_rejects_what_cannot_be_sampled(self, length, options):
        with pytest.raises(DatasetError, match=r"at least one image and a rank below world_size"):
            ResumableSampler(length, 2, **options)


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real data sets are not on this machine")
@pytest.mark.parametrize(
    ("name", "split", "images", "boxes", "crowd", "classes"),
    [
        ("bccd", "train", 284, 3854, 0, 3),
        ("bccd", "val", 80, 1032, 0, 3),
        ("coco_open", "train", 657, 5626, 62, 80),
        ("coco_open", "val", 200, 1997, 31, 80),
    ],
)
def test_real_sets_hold_what_their_readme_says(name, split, images, boxes, crowd, classes):
    index = read_coco(*locate_split(REAL_DATA / name, split))
    assert (index.report.images, index.report.boxes, index.report.crowd_dropped) == (images, boxes, crowd)
    assert (index.report.degenerate_dropped, index.report.outside_dropped) == (0, 0)
    assert index.num_classes == classes + 1
    reference = COCO(str(index.annotations))
    for record in index.records[:20]:
        expected = reference.loadAnns(reference.getAnnIds(imgIds=[record.id], iscrowd=False))
        assert [index.label_to_category[n] for n in record.labels.tolist()] == [a["category_id"] for a in expected]
        xywh = np.array([a["bbox"] for a in expected]).reshape(-1, 4)
        np.testing.assert_allclose(record.boxes[:, 2:] - record.boxes[:, :2], xywh[:, 2:], atol=1e-3)
    if name == "coco_open":
        assert max(index.label_to_category.values()) == 90
    dataset = CocoDataset(index, augmentation(128, "full"), mosaic=0.5)
    for i in range(3):
        pixels, target = dataset[0, i]
        assert pixels.shape == (3, 128, 128)
        assert len(target["boxes"]) == len(target["labels"])
