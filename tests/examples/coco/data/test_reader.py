from __future__ import annotations

import json
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from coco_example.data.reader import read_coco
from coco_example.errors import DataError
from PIL import Image
from pycocotools.coco import COCO

from tests.makers.coco_files import box, document, image, write_dataset


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
        assert index.annotations.file == paths[1]
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
        assert len(read_coco(*write_dataset(tmp_path / "none", document())).records) == 0

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"images": [image(1), image(2), image(1)]},
                r"unique image ids, but got 1 as in images\[0\] \(images\[2\]",
            ),
            ({"categories": [{"id": 3, "name": "a"}] * 2}, "unique category ids"),
            ({"categories": None}, "a list under 'categories', but got nothing"),
            ({"annotations": {}}, "a list under 'annotations'"),
            ({"images": [image(1), {"id": 2, "file_name": "2.png", "width": 3}]}, r"'height'.*nothing \(images\[1\]"),
            ({"images": [17]}, r"'id' to be a whole number or a text, but got nothing \(images\[0\]"),
            ({"categories": [{"id": 1}]}, r"'name'.*nothing \(categories\[0\]"),
            ({"annotations": [{"image_id": 1, "category_id": 1}]}, r"'bbox'.*nothing \(annotations\[0\]"),
            (
                {"annotations": [box(1, (1, 2, 3, 4)), box(8, (1, 2, 3, 4))]},
                r"under images, but got image_id 8.*annotations\[1\]",
            ),
            ({"annotations": [box(1, (1, 2, 3, 4), 8)]}, r"category_id 8 \(annotations\[0\]"),
            ({"annotations": [box(1, (1, 2, 3))]}, r"\[x, y, width, height\], but got \[1, 2, 3\] \(annotations\[0\]"),
            ({"annotations": [box(1, (1, 2, 3, None))]}, r"but got \[1, 2, 3, None\] \(annotations\[0\]"),
        ],
    )
    def test_names_the_entry_that_is_wrong(self, tmp_path, changes, message):
        images, annotations = write_dataset(tmp_path, document([image(1)]))
        annotations.write_text(json.dumps({**document([image(1)]), **changes}))
        with pytest.raises(DataError, match=message) as caught:
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
        with pytest.raises(DataError, match=message) as caught:
            read_coco(tmp_path, file)
        assert str(file) in str(caught.value)

    def test_rejects_a_missing_annotation_file(self, tmp_path):
        with pytest.raises(DataError, match=r"nowhere\.json"):
            read_coco(tmp_path, tmp_path / "nowhere.json")

    @pytest.mark.parametrize(
        "name", ["../secret.png", "a/../../secret.png", "/etc/passwd", "C:\\secret", "a\\..\\b.png"]
    )
    def test_refuses_file_names_that_leave_the_folder(self, tmp_path, name):
        images, annotations = write_dataset(tmp_path, document([image(1)]))
        Image.new("RGB", (160, 120)).save(tmp_path / "secret.png")
        annotations.write_text(json.dumps(document([image(1), {**image(2), "file_name": name}])))
        with pytest.raises(DataError, match=r"file_name to stay inside .* \(images\[1\] of"):
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
        with pytest.raises(DataError, match=r"7 missing: 2\.png, 3\.png, 4\.png, 5\.png, 6\.png, … \("):
            read_coco(images, annotations)
        with pytest.raises(DataError, match=r"9 missing: 1\.png"):
            read_coco(tmp_path / "elsewhere", annotations)

    def test_does_not_send_tensors_to_other_processes_as_open_files(self, index):
        copy = pickle.loads(bytes(ForkingPickler.dumps(index)))  # noqa: S301 - our own bytes
        assert not any(record.boxes.is_shared() for record in index.records)
        for old, new in zip(index.records, copy.records, strict=True):
            assert torch.equal(old.boxes, new.boxes)
            assert torch.equal(old.labels, new.labels)
            assert (old.id, old.path, old.width, old.height) == (new.id, new.path, new.width, new.height)
