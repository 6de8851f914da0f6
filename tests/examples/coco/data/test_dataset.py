from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_example.data.augmentation import augmentation
from coco_example.data.dataset import CocoDataset, collate
from coco_example.data.layouts import locate_split
from coco_example.data.reader import CocoIndex, read_coco
from coco_example.data.sampler import ResumableSampler
from coco_example.errors import DataError
from PIL import Image
from pycocotools.coco import COCO
from torch.utils.data import DataLoader

from tests.makers.coco_files import document, image, write_dataset

REAL_DATA = Path(__file__).resolve().parents[4].parent / "shared" / "data"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),  # Python 3.12 on forked workers
    pytest.mark.filterwarnings("ignore:.*suggested max number of worker.*:UserWarning"),
]


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
        with pytest.raises(DataError, match=r"Expected 40×30 pixels, but got 30×40 \(.*a\.png\)"):
            dataset[0]

    def test_names_a_file_it_cannot_use(self, tmp_path):
        dataset = self.dataset(tmp_path, Image.effect_noise((40, 30), 90), "a.png")
        path = dataset.index.records[0].path
        path.write_bytes(path.read_bytes()[:400])
        with pytest.raises(DataError, match=r"readable image, but got .*a\.png"):
            dataset[0]
        Image.fromarray(np.zeros((30, 40), np.uint16)).save(path)
        with pytest.raises(DataError, match=r"8 bits per channel, but got mode I;16 .*a\.png"):
            dataset[0]

    def test_cache_reads_a_file_once(self, index):
        cached, plain = CocoDataset(index, cache=True), CocoDataset(index)
        first, _ = cached[2]
        first.zero_()  # what the caller does to it is no concern of the cache
        expected, _ = plain[2]
        index.records[2].path.unlink()
        assert torch.equal(cached[2][0], expected)
        with pytest.raises(DataError, match=r"3\.png"):
            plain[2]


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
    reference = COCO(str(index.annotations.file))
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
