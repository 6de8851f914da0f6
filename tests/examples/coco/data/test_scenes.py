from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_example.data import scenes
from coco_example.data.dataset import CocoDataset
from coco_example.data.layouts import locate_split
from coco_example.data.painting import SHAPES, Layer, Scene, render
from coco_example.data.reader import read_coco
from coco_example.data.scenes import sample_crowd, sample_scene, write_scenes
from coco_example.errors import DataError
from PIL import Image
from torchvision.ops import batched_nms, box_iou

FIRST_VERSION = [[47.1, 53.38, 94.01, 90.48], [82.08, 0.0, 128.0, 56.14], [56.91, 0.0, 90.64, 34.08]]


def draw(k: int, size: int = 128) -> Scene:
    return sample_scene(np.random.default_rng((0, k)), size)


def objects(scene: Scene) -> list[Layer]:
    return [layer for layer in scene.layers if layer.shape is not None]


def without(scene: Scene, *layers: Layer) -> np.ndarray:
    """The same scene, clean of noise and blur, less some layers; (S, S, 3) in 0..255."""
    rest = tuple(layer for layer in scene.layers if not any(layer is other for other in layers))
    clean = dataclasses.replace(scene, layers=rest, blur=0.0, noise=np.zeros_like(scene.noise))
    return np.asarray(render(clean)).astype(int)


def hashes(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("data") / "demo", train=12, val=5, size=96, seed=7)


@pytest.fixture(scope="module")
def drawn():
    return [draw(k) for k in range(120)]


class TestFolder:
    def test_is_a_dataset(self, root):
        for index, count in ((read_coco(*locate_split(root, "train")), 12), (read_coco(*locate_split(root, "val")), 5)):
            report = index.report
            assert report.images == count
            assert report.boxes == sum(len(record.boxes) for record in index.records) >= count
            dropped = report.crowd_dropped, report.degenerate_dropped, report.outside_dropped, report.clipped
            assert dropped == (0, 0, 0, 0)
            assert tuple(category.name for category in index.categories) == SHAPES
            pixels, target = CocoDataset(index)[0]
            assert pixels.shape == (3, 96, 96)
            assert len(target["boxes"]) > 0
        entries = json.loads((root / "annotations" / "instances_train.json").read_text())["annotations"]
        for entry in entries:
            assert entry["area"] == pytest.approx(entry["bbox"][2] * entry["bbox"][3], abs=1e-3)
            assert entry["iscrowd"] == 0
        assert [entry["id"] for entry in entries] == list(range(1, len(entries) + 1))

    def test_holds_the_scenes_it_says(self, root):
        index = read_coco(*locate_split(root, "val"))
        for k, record in enumerate(index.records):
            scene = sample_scene(np.random.default_rng((7, 1, k)), 96)
            assert np.array_equal(np.asarray(Image.open(record.path)), np.asarray(render(scene)))
            expected = torch.tensor([layer.box for layer in objects(scene)], dtype=torch.float32)
            torch.testing.assert_close(record.boxes, expected, atol=0.02, rtol=0)
            assert [SHAPES[label - 1] for label in record.labels.tolist()] == [x.shape for x in objects(scene)]

    def test_is_the_same_every_time(self, root, tmp_path):
        assert hashes(write_scenes(tmp_path / "again", train=12, val=5, size=96, seed=7)) == hashes(root)

    def test_an_image_does_not_depend_on_how_many_there_are(self, root, tmp_path):
        few = hashes(write_scenes(tmp_path / "few", train=3, val=5, size=96, seed=7))
        assert {name: hashes(root)[name] for name in few if name.endswith(".png")} == {
            name: digest for name, digest in few.items() if name.endswith(".png")
        }
        other = hashes(write_scenes(tmp_path / "other", train=3, val=0, size=96, seed=8))
        assert other["train/000000.png"] != few["train/000000.png"] != few["val/000000.png"]

    def test_is_drawn_once(self, root, monkeypatch):
        monkeypatch.setattr(scenes, "render", lambda _: pytest.fail("drew again"))
        before = hashes(root)
        assert write_scenes(root, train=12, val=5, size=96, seed=7) == root
        assert hashes(root) == before

    @pytest.mark.parametrize("change", [{"train": 11}, {"val": 6}, {"size": 64}, {"seed": 8}])
    def test_other_scenes_are_not_overwritten(self, root, change):
        before = hashes(root)
        with pytest.raises(DataError, match=r"but got \{.*\"seed\": 7.*Fix: name another folder"):
            write_scenes(root, **{"train": 12, "val": 5, "size": 96, "seed": 7, **change})
        assert hashes(root) == before

    def test_scenes_of_another_version_are_not_taken_for_these(self, root, monkeypatch):
        monkeypatch.setattr(scenes, "_VERSION", scenes._VERSION + 1)
        with pytest.raises(DataError, match="version"):
            write_scenes(root, train=12, val=5, size=96, seed=7)

    def test_foreign_folders_and_files_are_not_overwritten(self, tmp_path):
        folder, file = tmp_path / "thesis", tmp_path / "file"
        folder.mkdir()
        (folder / "chapter.txt").write_text("years of work")
        file.write_text("more work")
        for place in (folder, file):
            with pytest.raises(DataError, match=r"but got something else \("):
                write_scenes(place, train=1, val=1, size=32)
        assert [path.name for path in folder.iterdir()] == ["chapter.txt"]
        assert file.read_text() == "more work"

    def test_an_empty_folder_is_as_good_as_none(self, tmp_path):
        (tmp_path / "demo").mkdir()
        assert (write_scenes(tmp_path / "demo", train=1, val=1, size=32) / "scenes.json").is_file()

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_what_is_interrupted_leaves_nothing(self, tmp_path, monkeypatch, error):
        calls = []

        def failing(scene):
            calls.append(1)
            if len(calls) == 3:
                raise error
            return render(scene)

        with monkeypatch.context() as patch:
            patch.setattr(scenes, "render", failing)
            with pytest.raises(error):
                write_scenes(tmp_path / "deep" / "demo", train=4, val=2, size=32)
        assert len(calls) == 3
        assert list((tmp_path / "deep").iterdir()) == []
        assert write_scenes(tmp_path / "deep" / "demo", train=4, val=2, size=32).is_dir()

    def test_a_faster_process_wins(self, tmp_path, monkeypatch):
        def overtaken(scene):
            monkeypatch.setattr(scenes, "render", render)
            write_scenes(tmp_path / "demo", train=1, val=1, size=32)
            return render(scene)

        monkeypatch.setattr(scenes, "render", overtaken)
        write_scenes(tmp_path / "demo", train=1, val=1, size=32)
        assert [path.name for path in tmp_path.iterdir()] == ["demo"]
        assert len(hashes(tmp_path / "demo")) == 5

    @pytest.mark.parametrize("wrong", [{"train": -1}, {"val": -1}, {"seed": -1}, {"size": 31}])
    def test_numbers_have_to_make_sense(self, tmp_path, wrong):
        with pytest.raises(DataError, match="Expected nothing below 0"):
            write_scenes(tmp_path / "demo", **wrong)
        assert list(tmp_path.iterdir()) == []

    def test_is_a_script(self, tmp_path, monkeypatch, capsys):
        options = ["--output", str(tmp_path / "demo"), "--train", "2", "--val", "1", "--size", "32", "--seed", "3"]
        monkeypatch.setattr(sys, "argv", ["scenes.py", *options])
        scenes.main()
        assert str(tmp_path / "demo") in capsys.readouterr().out
        assert hashes(tmp_path / "demo") == hashes(write_scenes(tmp_path / "b", train=2, val=1, size=32, seed=3))


class TestScene:
    def test_boxes_are_where_taking_the_object_away_changes_the_picture(self, drawn):
        alone = []
        for scene in drawn[:60]:
            full = without(scene)
            for layer in objects(scene):
                changed = np.abs(full - without(scene, layer)).max(axis=2) > 0
                y, x = np.nonzero(changed)
                extent = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1])
                outward = (extent - layer.box) * [-1, -1, 1, 1]
                assert (outward < 1.3).all()
                if layer.visible > 0.999:
                    alone.append(outward)
                    assert (outward > -2.5).all()  # the tip of a star is faint
        assert len(alone) > 50
        assert np.abs(alone).mean() < 0.7

    def test_objects_can_be_seen(self, drawn):
        for scene in drawn[:40]:
            for layer in objects(scene):
                # In black and white: what the layer covers in the picture, over what it covers alone.
                paint = [
                    dataclasses.replace(x, colour=np.full_like(x.colour, 255 * (x is layer))) for x in scene.layers
                ]
                black = np.zeros_like(scene.background)
                seen = without(dataclasses.replace(scene, layers=tuple(paint), background=black))[..., 0].sum()
                whole = layer.alpha.sum() * 255
                assert seen / whole >= 0.39
                assert layer.visible <= seen / whole + 0.01

    def test_boxes_differ(self, drawn):
        for scene in drawn:
            boxes = torch.tensor([layer.box for layer in objects(scene)])
            assert box_iou(boxes, boxes).fill_diagonal_(0).max() <= 0.7 + 1e-5

    def test_counts_sizes_and_classes_are_spread(self, drawn):
        counts = [len(objects(scene)) for scene in drawn]
        assert (min(counts), max(counts)) == (1, 9)
        everything = [layer for scene in drawn for layer in objects(scene)]
        sides = np.array([max(x.box[2] - x.box[0], x.box[3] - x.box[1]) for x in everything])
        assert 10 <= sides.min() < 18
        assert 60 < sides.max() <= 70.5
        assert 25 < np.median(sides) < 45
        shares = [sum(layer.shape == shape for layer in everything) / len(everything) for shape in SHAPES]
        assert min(shares) > 0.1
        assert any(layer.shape is None for scene in drawn for layer in scene.layers)

    def test_nms_removes_a_few_true_objects(self, drawn):
        kept = total = 0
        for scene in drawn:
            boxes = torch.tensor([layer.box for layer in objects(scene)])
            labels = torch.tensor([SHAPES.index(layer.shape) for layer in objects(scene)])
            kept += len(batched_nms(boxes, torch.ones(len(boxes)), labels, 0.6))
            total += len(boxes)
        assert 0.002 < 1 - kept / total < 0.05

    def test_shapes_look_like_their_names(self):
        """Share of the box that is covered, and whether the middle is: a class is recognised by its outline alone."""
        expected = {"circle": (0.785, 1), "triangle": (0.5, 1), "ring": (0.785 * (1 - 0.55**2), 0)}
        seen: dict[str | None, int] = dict.fromkeys(SHAPES, 0)
        for k in range(150):
            for layer in objects(draw(k)):
                x1, y1, x2, y2 = layer.box
                if layer.visible < 0.999 or max(x2 - x1, y2 - y1) < 25:
                    continue
                seen[layer.shape] += 1
                share = layer.alpha.sum() / ((x2 - x1) * (y2 - y1))
                middle = layer.alpha[layer.alpha.shape[0] // 2, layer.alpha.shape[1] // 2]
                assert middle == (0 if layer.shape == "ring" else 1)
                if layer.shape in expected:
                    assert share == pytest.approx(expected[layer.shape][0], abs=0.1)
                assert share < 0.8 or layer.shape in ("square", "circle")
        assert min(seen.values()) > 5

    def test_edges_are_smooth(self, drawn):
        partial = [((x.alpha > 0.05) & (x.alpha < 0.95)).sum() / x.alpha.sum() for s in drawn for x in objects(s)]
        assert np.mean(partial) > 0.05

    def test_size_scales_the_scene(self):
        large = [max(x.box[2] - x.box[0], x.box[3] - x.box[1]) for k in range(20) for x in objects(draw(k, 256))]
        assert min(large) >= 20
        assert 100 < max(large) < 141
        assert np.asarray(render(draw(0, 256))).shape == (256, 256, 3)


class TestCrowd:
    def test_scenes_without_the_knob_are_what_they_always_were(self):
        """The boxes that the first version drew, from front to back."""
        assert [[round(x, 2) for x in layer.box] for layer in objects(draw(3))] == FIRST_VERSION

    @pytest.mark.parametrize("overlap", [0.3, 0.9])
    def test_members_can_be_told_apart(self, overlap):
        """Taking any object away changes the picture clearly, however much its neighbours cover of its box."""
        changes = []
        for k in range(12):
            scene = sample_crowd(np.random.default_rng((0, k)), 128, (overlap, overlap))
            full = without(scene)
            for layer in objects(scene):
                width, height = layer.box[2] - layer.box[0], layer.box[3] - layer.box[1]
                changed = (np.abs(full - without(scene, layer)).max(axis=2) > 12).sum()
                changes.append(changed / (2 * (width + height)))  # pixels to a pixel of outline
                assert layer.visible > 0.1
        assert np.median(changes) > 1.0

    def test_a_folder_holds_the_overlap_it_was_asked_for(self, tmp_path):
        folder = write_scenes(tmp_path / "crowd", train=2, val=40, size=64, overlap=(0.5, 0.5))
        assert json.loads((folder / "scenes.json").read_text())["overlap"] == [0.5, 0.5]
        largest = []
        for record in read_coco(*locate_split(folder, "val")).records:
            same = record.labels[:, None] == record.labels
            overlaps = (box_iou(record.boxes, record.boxes) * same).fill_diagonal_(0)
            largest += overlaps.amax(dim=1).tolist()
        crowded = [x for x in largest if x > 0]
        assert len(crowded) > 0.7 * len(largest)
        assert crowded == pytest.approx([0.5] * len(crowded), abs=0.01)
        with pytest.raises(DataError, match="Fix: name another folder"):
            write_scenes(folder, train=2, val=40, size=64)
        with pytest.raises(DataError, match="the lower bound first"):
            write_scenes(tmp_path / "wrong", train=2, val=1, size=64, overlap=(0.5, 0.3))

    def test_is_a_knob_of_the_script(self, tmp_path, monkeypatch):
        options = [
            "--output",
            str(tmp_path / "a"),
            "--train",
            "2",
            "--val",
            "1",
            "--size",
            "32",
            "--overlap",
            "0",
            "0.9",
        ]
        monkeypatch.setattr(sys, "argv", ["scenes.py", *options])
        scenes.main()
        assert hashes(tmp_path / "a") == hashes(write_scenes(tmp_path / "b", train=2, val=1, size=32, overlap=(0, 0.9)))
