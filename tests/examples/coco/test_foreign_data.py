"""Runs on data as other programs write it: the scores are those of the same data in good order."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import evaluate
import export
import predict
import pytest
import torch
from coco_example.data.reader import CocoIndex, read_coco
from coco_example.evaluation.evaluation import Detector, Evaluation, Found, score
from coco_example.models.detectors import build_detector
from coco_example.models.saved_model import load_model
from coco_example.options import ModelOptions

from crosskd_assign import adapt
from crosskd_assign.structures import Detection
from tests.makers.coco_files import box, document, image, write_dataset
from tests.makers.exports import cvat_apart, roboflow
from tests.makers.exports import export as write_export

pytestmark = pytest.mark.usefixtures("no_pictures")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def call(script: Any, *arguments: object) -> int:
    code: int = script.main([str(argument) for argument in arguments])
    return code


def perfect(index: CocoIndex) -> list[Detection]:
    return [
        {"boxes": record.boxes, "scores": torch.ones(len(record.boxes)), "labels": record.labels}
        for record in index.records
    ]


def scored(index: CocoIndex, detections: list[Detection], **options: Any) -> Evaluation:
    targets: Any = [
        {"boxes": record.boxes, "labels": record.labels, "image_id": torch.tensor(n)}
        for n, record in enumerate(index.records)
    ]
    return score(Found(detections, detections, targets), index, **options)


def scores_by_pycocotools(path: Path, results: list[dict[str, Any]], limit: int = 100) -> list[float]:
    """The twelve numbers; AP itself from the tables, because the summary looks for a limit of 100 alone."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.params.maxDets = [1, 10, limit]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    return [float(precision[precision > -1].mean()), *map(float, evaluation.stats[1:])]


def test_a_run_on_roboflows_folders_scores_by_the_classes_of_training(workshop, scenes_folder, tmp_path, capsys):
    """Validation has three of the six classes, ids beyond 64 bits, numbers as text, and a byte order mark."""
    # 1. Write it, and the same in good order.
    data = tmp_path / "data"
    write_export(roboflow, scenes_folder, data)
    file = data / "valid" / "_annotations.coco.json"
    content = read(file)
    content["categories"] = [entry for entry in content["categories"] if entry["id"] in (0, 2, 3, 6)]
    content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] in (2, 3, 6)]
    (tmp_path / "clean.json").write_text(json.dumps(content))
    big = 10**25
    for entry in content["images"]:
        entry.update(id=entry["id"] + big, width=float(entry["width"]), file_name=f"valid\\{entry['file_name']}")
    for entry in content["annotations"]:
        bbox = [str(value) for value in entry["bbox"]]
        entry.update(image_id=entry["image_id"] + big, category_id=str(entry["category_id"]), iscrowd=None, bbox=bbox)
    file.write_bytes(json.dumps(content).encode("utf-16"))

    # 2. Train, and evaluate again.
    assert workshop.train(tmp_path / "run", arm="one-to-one", data_path=data, lr=2e-3) == 0
    assert "warning" not in capsys.readouterr().err
    assert [name for _, name in read(tmp_path / "run" / "model.json")["categories"]] == [
        *("circle", "square", "triangle", "star", "cross", "ring"),
    ]
    files = ["--output", tmp_path / "scores.json", "--results", tmp_path / "results.json"]
    assert call(evaluate, "--run", tmp_path / "run", "--data-path", data, "--batch-size", 8, *files) == 0
    expected = read(tmp_path / "run" / "summary.json")["scores"]
    assert read(tmp_path / "scores.json")["scores"] == expected

    # 3. The results carry the file's own ids, and pycocotools comes to the same numbers.
    results = read(tmp_path / "results.json")
    assert len(results) > 100
    for entry in results:
        entry.update(image_id=entry["image_id"] - big, category_id=int(entry["category_id"]))
    stats = scores_by_pycocotools(tmp_path / "clean.json", results)
    numbers = [expected[name] for name in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")]
    assert [-1 if value is None else value for value in numbers] == pytest.approx(stats[:6], rel=0, abs=1e-15)

    # 4. Pictures are predicted on as ever.
    assert call(predict, "--run", tmp_path / "run", "--output", tmp_path / "out", data / "valid") == 0


def test_fewer_classes_in_validation_do_not_shift_the_others(tmp_path):
    images, boxes = [image(5), image(3)], [box(5, (10, 10, 40, 50), 7), box(3, (20, 10, 40, 50), 2)]
    train = read_coco(*write_dataset(tmp_path / "t", document(images, boxes, ((2, "a"), (7, "b"), (9, "c")))))
    val = read_coco(*write_dataset(tmp_path / "v", document(images, boxes[:1], [(7, "b")])), train.categories)
    result = scored(val, perfect(val))
    assert (result.plain.ap, result.nms.ap, result.duplicates.found) == (1, 1, 1)
    assert val.records[0].labels.tolist() == [2]
    # A detector of the training's labels, which a file read for itself alone would misunderstand.
    alone = read_coco(*write_dataset(tmp_path / "a", document(images, boxes[:1], [(7, "b")])))
    assert scored(alone, perfect(val)).plain.ap == 0
    assert scored(alone, perfect(val), label_to_category=train.label_to_category).plain.ap == 1


def test_validation_with_other_ids_of_the_same_names_is_refused_before_the_first_step(
    workshop, scenes_folder, student, tmp_path, capsys
):
    write_export(cvat_apart, scenes_folder, tmp_path / "data")
    file = tmp_path / "data" / "val" / "annotations" / "instances_default.json"
    content = read(file)
    for entry in content["categories"]:
        entry["id"] += 100
    for entry in content["annotations"]:
        entry["category_id"] += 100
    file.write_text(json.dumps(content))
    reason = "the classes of the run, 'circle' (id 1), 'square' (id 2), 'triangle' (id 3), but got 'circle' (id 101), "
    assert workshop.train(tmp_path / "run", arm="one-to-one", data_path=tmp_path / "data") == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert call(evaluate, "--run", student, "--data-path", tmp_path / "data") == 2
    assert reason in capsys.readouterr().err


def test_a_broken_validation_picture_and_a_likely_mistake_are_known_before_the_first_step(
    workshop, scenes_folder, tmp_path, capsys
):
    write_export(cvat_apart, scenes_folder, tmp_path / "data")
    file = tmp_path / "data" / "train" / "annotations" / "instances_default.json"
    content = read(file)
    for entry in content["annotations"][::5]:
        entry["bbox"] = [value / 64 for value in entry["bbox"]]
    file.write_text(json.dumps(content))
    picture = tmp_path / "data" / "val" / "images" / "default" / "000007.png"
    picture.write_bytes(picture.read_bytes()[:-200])
    assert workshop.train(tmp_path / "run", arm="one-to-one", data_path=tmp_path / "data") == 2
    first, *lines, last, page = capsys.readouterr().err.splitlines()
    assert page in lines, "the warnings have a page, too"
    assert first.startswith("warning: training data: ")
    assert "are dropped" in first
    assert last.startswith("error: Expected a readable image, but got ")
    assert str(picture) in last
    assert not (tmp_path / "run").exists()


# --- more objects than 100 --------------------------------------------------------------------------------------------


def crowded(root: Path) -> CocoIndex:
    boxes = [box(1, (9 * (n % 15), 9 * (n // 15), 8, 8), 1, iscrowd=0, area=64) for n in range(150)]
    return read_coco(*write_dataset(root, document([image(1)], boxes)))


@pytest.mark.parametrize(("limit", "expected"), [(100, 67 / 101), (120, 81 / 101), (150, 1.0)])
def test_ap_counts_as_many_detections_as_there_may_be(tmp_path, limit, expected):
    index = crowded(tmp_path)
    result = scored(index, perfect(index), top_k=limit)
    assert result.plain.ap == pytest.approx(expected)
    rows = [{"image_id": 1, "category_id": 1, "bbox": [*b[:2], 8, 8], "score": 1.0} for b in index.records[0].boxes]
    rows = [{**row, "bbox": [float(value) for value in row["bbox"]]} for row in rows]
    stats = scores_by_pycocotools(index.annotations.file, rows, limit)
    assert [result.plain.ap, result.plain.ar100] == pytest.approx([stats[0], stats[8]], rel=0, abs=1e-15)
    assert scored(index, perfect(index), top_k=7).plain.ap == pytest.approx(67 / 101)  # those who return 7 are below


def test_the_limit_of_a_run_is_that_of_every_command(workshop, scenes_folder, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    assert workshop.train(run, arm="one-to-one", top_k=4) == 0
    assert "images with more than 4 objects" in capsys.readouterr().err
    assert load_model(run)[1].model.top_k == 4
    folder, threshold = scenes_folder / "val", ["--score-threshold", 0]
    for more, count in (([], 4), (["--top-k", 9], 9)):
        assert call(predict, "--run", run, "--output", tmp_path / "out", *threshold, *more, folder) == 0
        assert {len(row["scores"]) for row in read(tmp_path / "out" / "detections.json")} == {count}
        results = tmp_path / "results.json"
        assert call(evaluate, "--run", run, "--data-path", scenes_folder, "--results", results, *more) == 0
        assert len(read(results)) <= 8 * count  # those of the background are left out
        assert f"images with more than {count} objects" in capsys.readouterr().err or count == 9
        options = export.parse([str(run), *map(str, more)])
        monkeypatch.setattr(export, "export_onnx", lambda detector, *_, **__: detector.top_k)
        assert export.export(run, tmp_path / "a.onnx", top_k=options.top_k) == count


@pytest.mark.parametrize("top_k", [0, -1])
def test_a_limit_below_one_ends_with_a_sentence(student, scenes_folder, tmp_path, capsys, top_k):
    last = ["--top-k", top_k]
    assert call(predict, "--run", student, "--output", tmp_path / "out", scenes_folder / "val", *last) == 2
    assert call(evaluate, "--run", student, "--data-path", scenes_folder, *last) == 2
    assert call(export, student, "--output", tmp_path / "a.onnx", *last) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line.split(" (")[0] for line in errors] == [
        f"error: Expected top_k of at least 1, but got {top_k}",
        "See docs/troubleshooting.md#optionerror.",
    ] * 3


def test_ten_times_as_many_candidates_enter_nms():
    model = build_detector(ModelOptions(size=256), 3).eval()
    for top_k in (100, 300):
        [found] = Detector(adapt(model), "class_quality", top_k).detect([torch.rand(3, 256, 256)], nms_threshold=1.0)
        assert len(found["scores"]) == top_k
