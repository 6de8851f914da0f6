"""`--unlabelled FOLDER`: pictures without labels, a share of every step, as resumable and sharded as the others."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_example.data.layouts import locate_split
from coco_example.data.reader import read_coco
from coco_example.data.sampler import Key, ResumableSampler, mixed, parts_of
from coco_example.data.scenes import write_scenes
from coco_example.data.unlabelled import read_unlabelled
from coco_example.engine.distributed import Worker
from coco_example.engine.loading import TrainingData
from coco_example.errors import DataError
from PIL import Image

from tests.makers.training_runs import assert_same_run, stop_in, train_lines

MIXED = {"arm": "cross-head", "batch_size": 8}  # 24 images with labels, 4 a step


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Ten pictures in a tree; not to be written to."""
    folder = tmp_path_factory.mktemp("pictures")
    drawn = write_scenes(folder / "drawn", train=10, val=2, size=64, seed=9)
    (folder / "tree" / "deep").mkdir(parents=True)
    for n, path in enumerate(sorted((drawn / "train").iterdir())):
        shutil.copy(path, folder / "tree" / ("deep" if n % 2 else "") / path.name)
    return folder / "tree"


@pytest.fixture(scope="module")
def whole(workshop, teacher, pictures, tmp_path_factory) -> Path:
    """A finished run; not to be written to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert workshop.train(folder, **MIXED, teacher=teacher, unlabelled=pictures, mosaic=0.3) == 0
    return folder


def dot(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((5, 7, 3), len(path.name), dtype=np.uint8)).save(path, format="PNG")


def test_every_picture_of_the_tree_is_found_once_in_a_fixed_order(tmp_path):
    folder, elsewhere = tmp_path / "tree", tmp_path / "elsewhere"
    for name in ("b/2.PNG", "b/10.png", "a.Jpeg", "b/c/d/1.webp", ".hidden.png", ".cache/x.png", "b/._1.png"):
        dot(folder / name)
    dot(elsewhere / "linked.png")
    (folder / "notes.txt").write_text("no picture")
    (folder / "is_a_folder.png").mkdir()
    (folder / "z").symlink_to(elsewhere)
    (folder / "z2").symlink_to(elsewhere)  # the same once more
    (elsewhere / "up").symlink_to(folder)  # and round in a circle
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    index, warnings = read_unlabelled(folder)
    assert [record.id for record in index.records] == ["a.Jpeg", "b/10.png", "b/2.PNG", "b/c/d/1.webp", "z/linked.png"]
    assert {(record.width, record.height, len(record.boxes)) for record in index.records} == {(7, 5, 0)}
    assert warnings == []


def test_files_that_cannot_be_read_are_left_out_and_named_but_not_all_of_them(tmp_path):
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"that can be read, but got none of 2.*1\.png"):
        read_unlabelled(tmp_path)
    dot(tmp_path / "3.png")
    index, [warning] = read_unlabelled(tmp_path)
    assert [record.id for record in index.records] == ["3.png"]
    assert "2 of 3 files cannot be read" in warning
    assert "1.png" in warning


def take(batches: Iterable[list[Key]], count: int) -> list[list[Key]]:
    return list(itertools.islice(batches, count))


def both(rank: int = 0, count: int = 1, start: int = 0, seed: int = 3, parts: int = 1) -> Iterator[list[Key]]:
    options: Any = {"rank": rank, "world_size": count, "start_batch": start, "seed": seed}
    first = ResumableSampler(24, 4 // count, **options)
    return mixed(parts_of(first, parts), parts_of(ResumableSampler(10, 2 // count, stream=(1,), **options), parts), 24)


def test_each_kind_has_an_order_of_its_own_that_a_resumed_run_and_other_ranks_share():
    batches = take(both(), 20)
    assert [batch[:4] for batch in batches] == list(itertools.islice(ResumableSampler(24, 4, seed=3), 20))
    others = [[(epoch, i - 24) for epoch, i in batch[4:]] for batch in batches]
    passes = [[i for batch in others[n : n + 5] for _, i in batch] for n in (0, 5, 10, 15)]
    assert all(sorted(order) == list(range(10)) for order in passes)
    assert len(set(map(tuple, passes))) == 4
    assert take(both(start=7), 13) == batches[7:]
    assert take(both(seed=4), 1) != take(both(), 1)
    halves = [take(both(rank, 2), 20) for rank in (0, 1)]
    for batch, mine, theirs in zip(batches, *halves, strict=True):
        assert sorted(batch) == sorted(mine + theirs)


def test_batches_that_accumulate_have_both_kinds_each():
    whole, parts = take(both(), 4), take(both(parts=2), 8)
    for n, batch in enumerate(whole):
        first, second = parts[2 * n : 2 * n + 2]
        assert [i >= 24 for _, i in first] == [i >= 24 for _, i in second] == [False, False, True]
        assert sorted(first + second) == sorted(batch)


def test_images_with_labels_are_what_they_are_without_the_others(workshop, pictures, tmp_path):
    index = read_coco(*locate_split(workshop.data, "train"))
    worker = Worker(0, 1, torch.device("cpu"))
    given = {**MIXED, "augmentation": "full", "mosaic": 0.5, "seed": 2}
    alone = TrainingData(workshop.options(tmp_path, **{**given, "batch_size": 4}), index, worker)
    both = TrainingData(
        workshop.options(tmp_path, **given, unlabelled=pictures), index, worker, read_unlabelled(pictures)[0]
    )
    assert both.steps_per_epoch == alone.steps_per_epoch == 6
    assert both.unlabelled_per_batch == 4
    with both.batches(0) as mine, alone.batches(0) as theirs:
        for _ in range(3):
            (images, targets), (expected, labels) = next(mine), next(theirs)
            assert [target is None for target in targets] == [False] * 4 + [True] * 4
            torch.testing.assert_close((images[:4], targets[:4]), (expected, labels), rtol=0, atol=0)
            assert all(image.shape == (3, 64, 64) for image in images[4:])


def test_a_run_that_is_stopped_goes_on_bit_for_bit_wherever_the_pictures_are(
    workshop, teacher, pictures, whole, tmp_path, monkeypatch
):
    stop_in(monkeypatch, 4)
    options = {**MIXED, "teacher": teacher, "mosaic": 0.3, "workers": 1}
    assert workshop.train(tmp_path / "run", **options, unlabelled=pictures) == 143
    moved = shutil.copytree(pictures, tmp_path / "moved")
    assert workshop.train(tmp_path / "run", **options, unlabelled=moved, resume=True) == 0
    assert_same_run(tmp_path / "run", whole)


def test_a_resumed_run_needs_the_same_pictures(workshop, teacher, pictures, tmp_path, monkeypatch, capsys):
    stop_in(monkeypatch, 2)
    options = {**MIXED, "teacher": teacher}
    assert workshop.train(tmp_path / "run", **options, unlabelled=pictures) == 143
    fewer = Path(shutil.copytree(pictures, tmp_path / "fewer"))
    next(fewer.rglob("*.*g")).unlink()
    for other, words in ((fewer, "unlabelled images: 10 then, 9 now"), ("", "unlabelled")):
        capsys.readouterr()
        assert workshop.train(tmp_path / "run", **options, unlabelled=other, resume=True) == 2
        assert words in capsys.readouterr().err


def test_the_run_says_how_many_and_draws_them(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["unlabelled"] == {"images": 10}
    assert summary["budget"]["images"] == 48
    assert summary["budget"]["images_unlabelled"] == 24
    log = (whole / "metrics.jsonl").read_text()
    assert "without labels: 10 images, 4 of 8 in a batch" in log
    assert all(line["losses"]["distill_classification"] > 0 for line in train_lines(whole))
    assert (whole / "batch0.png").exists()


def test_pictures_that_are_in_a_split_too_are_warned_of_by_their_content(
    workshop, teacher, pictures, tmp_path, monkeypatch, capsys
):
    folder = Path(shutil.copytree(pictures, tmp_path / "more"))
    copies = sorted((workshop.data / "val").iterdir())[:3]
    for n, path in enumerate(copies):
        shutil.copy(path, folder / f"other-name-{n}{path.suffix}")
    (folder / "broken.png").write_bytes(b"no picture")
    stop_in(monkeypatch, 1)
    workshop.train(tmp_path / "run", **MIXED, teacher=teacher, unlabelled=folder)
    said = capsys.readouterr().err
    assert "3 are validation pictures, too" in said
    assert "are training pictures" not in said
    assert "1 of 14 files cannot be read" in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"arm": "one-to-one"}, "expected an arm that distils for --unlabelled"),
        ({"arm": "one-to-many"}, "expected an arm that distils for --unlabelled"),
        ({"arm": "one-to-one", "freeze": "all", "selection": True}, "expected an arm that distils for --unlabelled"),
        ({"batch_size": 1}, "expected images of both kinds in a batch"),
        ({"unlabelled_share": 1}, "expected images of both kinds in a batch"),
        ({"unlabelled_share": 0.01}, "expected images of both kinds in a batch"),
        ({"unlabelled_share": "nan"}, "expected images of both kinds in a batch"),
        ({"unlabelled": "nowhere"}, "expected pictures without labels, but got no folder there"),
        ({"unlabelled": "empty"}, "expected pictures without labels, but got none in it"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    workshop, teacher, pictures, tmp_path, monkeypatch, capsys, options, sentence
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    given = {"arm": "cross-head", "teacher": teacher, "unlabelled": pictures, **options}
    try:
        code = workshop.train(tmp_path / "run", **given)
    except SystemExit as ended:  # as argparse ends
        code = int(str(ended.code))
    assert code == 2
    assert sentence in capsys.readouterr().err.replace("error: Expected", "error: expected")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_share_them_and_resume(workshop, teacher, pictures, tmp_path, script):
    def start(folder: Path, *more: str) -> Any:
        module = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        options = {**MIXED, "batch_size": 4, "epochs": 2, "teacher": teacher, "unlabelled": pictures}
        return script("train.py", *workshop.arguments(folder, **options), *more, module=module)

    whole = start(tmp_path / "whole")
    _, errors = whole.communicate()
    assert whole.returncode == 0, errors
    budget = json.loads((tmp_path / "whole" / "summary.json").read_text())["budget"]
    assert (budget["images"], budget["images_unlabelled"]) == (96, 48)
    stopped = start(tmp_path / "run")
    while len(train_lines(tmp_path / "run")) < 3:
        assert stopped.poll() is None, stopped.communicate()
        time.sleep(0.01)
    os.kill(stopped.pid, signal.SIGTERM)
    stopped.communicate()
    resumed = start(tmp_path / "run", "--resume")
    _, errors = resumed.communicate()
    assert resumed.returncode == 0, errors
    assert_same_run(tmp_path / "run", tmp_path / "whole")
