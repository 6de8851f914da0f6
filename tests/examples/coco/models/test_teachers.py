"""`--teacher python:FILE:FUNCTION`: a trained detector of the user's own file teaches, and is scored."""

from __future__ import annotations

import json

import evaluate
import pytest
import torch
from coco_example.data.annotations import Category
from coco_example.models.saved_model import load_model
from coco_example.models.teachers import TeacherInTraining, load_teacher, python_detector
from coco_example.options import ModelOptions
from safetensors.torch import load_file

from crosskd_assign import adapt
from tests.makers.training_runs import SIX_STEPS, assert_same_run, stop_in, train_lines

pytestmark = pytest.mark.usefixtures("no_pictures")

RUN_AGAIN = """
from pathlib import Path
from coco_example.models.saved_model import load_model

def trained():
    model, spec = load_model(Path({run!r}))
    return model, spec.label_to_category
"""

# A network with channels, levels and labels of its own; what lies beside the file can be imported.
FOREIGN = """
from network import network
from crosskd_assign import DensePredictions, DetectorAdapter, GridLevel

class MyAdapter(DetectorAdapter):
    def features(self, batch):
        return [self.model.trunk(self.normalize(batch))]

    def head(self, features, image_size):
        out = self.model.head(features[0]).flatten(2).transpose(1, 2)
        levels = [GridLevel.of(features[0], stride=8)]
        return DensePredictions.from_sides(out[..., :-4], out[..., -4:].exp(), levels)

def trained():
    return MyAdapter(network()), {0: 1, 1: 2}

def adapter_alone():
    return MyAdapter(network())

def names():
    return MyAdapter(network()), {0: "circle"}

def broken():
    raise RuntimeError("the user's own")

class_names = ["a", "b"]
"""

NETWORK = """
import torch
from torch import nn

def network():
    torch.manual_seed(5)
    model = nn.Module()
    model.trunk, model.head = nn.Conv2d(3, 12, 8, stride=8), nn.Conv2d(12, 2 + 4, 3, padding=1)
    return model
"""


# Names that our own modules and commands have, or had; all of them are the user's when the user's file imports them.
NEIGHBOURS = ("models", "data", "evaluate", "options", "train", "predict", "engine", "errors", "training", "runs")
BARE_IMPORTS = """
from pathlib import Path
{imports}

for module in ({names}):
    assert module.MINE == Path(__file__).parent.name, module.__file__

def trained():
    import demo  # only now: long after the file was loaded
    assert demo.MINE == Path(__file__).parent.name, demo.__file__
    return models.detector(), {{0: 1, 1: 2}}
"""
USERS_MODELS = (
    FOREIGN.replace("from network", "from data")
    + """
def detector():
    return MyAdapter(network())
"""
)


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """The reference of a function of a file, but for its name."""
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "detector.py").write_text(FOREIGN)
    (folder / "network.py").write_text(NETWORK)
    return f"python:{folder / 'detector.py'}:"


def test_a_run_that_is_loaded_by_ones_own_file_teaches_as_the_run_itself(workshop, teacher, tmp_path, capsys):
    file = tmp_path / "again.py"
    file.write_text(RUN_AGAIN.format(run=str(teacher)))
    lines = []
    for name, reference in (("run", teacher), ("file", f"python:{file}:trained")):
        assert workshop.train(tmp_path / name, arm="cross-head", teacher=reference) == 0
        lines += [line for line in capsys.readouterr().err.splitlines() if line.startswith("teacher on")]
    assert_same_run(tmp_path / "file", tmp_path / "run")
    assert lines[0] == lines[1]
    assert json.loads((tmp_path / "file" / "config.json").read_text())["teacher"] == f"python:{file}:trained"


def test_the_labels_of_a_runs_teacher_are_the_students_by_name(teacher):
    names = ["circle", "square", "triangle", "star", "cross", "ring"]
    classes = [Category(100 + n, name) for n, name in enumerate(names[1:])]
    _, labels = load_teacher(str(teacher), ModelOptions(size=64), classes)
    assert labels == {2: 100, 3: 101, 4: 102, 5: 103, 6: 104}
    _, labels = load_teacher(str(teacher), ModelOptions(size=64), [Category(1, "square"), Category(2, "square")])
    assert labels == {2: 2}
    assert load_teacher(str(teacher), ModelOptions(size=64))[1] == dict(enumerate(range(1, 7), 1))


def test_a_foreign_detector_teaches_and_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    workshop, foreign, tmp_path, monkeypatch
):
    options = {**SIX_STEPS, "arm": "cross-head", "teacher": foreign + "trained"}
    assert workshop.train(tmp_path / "whole", **options) == 0
    stop_in(monkeypatch, 4)
    codes = [workshop.train(tmp_path / "run", **options, resume=resume) for resume in (False, True)]
    assert codes == [143, 0]
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert all(line["losses"]["distill_classification"] > 0 for line in train_lines(tmp_path / "whole"))
    state = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)["method"]
    assert state["aligner.adapters.0.weight"].shape == (12, 64, 1, 1)  # to channels that the student lacks
    assert not any("trunk" in name for name in state)  # the teacher stays outside
    assert (
        load_file(tmp_path / "whole" / "model.safetensors").keys()
        == load_model(tmp_path / "run")[0].state_dict().keys()
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nothing", "a function nothing in"),
        ("class_names", "a function class_names in"),
        ("adapter_alone", "but got MyAdapter"),
        ("names", "but got (MyAdapter, dict)"),
    ],
)
def test_a_function_that_gives_no_detector_ends_with_a_sentence(workshop, foreign, tmp_path, capsys, name, reason):
    assert workshop.train(tmp_path / "run", arm="cross-head", teacher=foreign + name) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert reason in line
    assert "Fix: " in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("reference", ["python:/none/at/all.py:trained", "python:trained"])
def test_a_file_that_is_not_there_ends_with_a_sentence(workshop, tmp_path, capsys, reference):
    assert workshop.train(tmp_path / "run", arm="cross-head", teacher=reference) == 2
    assert f"got none there ({reference})" in capsys.readouterr().err


def test_an_arm_that_needs_the_teachers_own_shape_says_so(workshop, foreign, tmp_path, capsys):
    assert workshop.train(tmp_path / "run", arm="own-head-imitation", teacher=foreign + "trained") == 2
    assert (
        "a student with the points and classes of its teacher, but got (85, 7) and (64, 2)" in capsys.readouterr().err
    )


def test_what_a_users_own_code_raises_is_not_hidden(foreign):
    with pytest.raises(RuntimeError, match="the user's own"):
        python_detector(foreign + "broken")


def test_a_teacher_is_judged_on_the_batches_of_its_student(teacher, foreign):
    student, own = adapt(load_model(teacher)[0]), python_detector(foreign + "trained")[0]
    image = torch.rand(3, 30, 50)
    predictions, batch = TeacherInTraining(own, ranking="class_quality", student=student).predict([image])
    expected, _ = student.preprocess([image])
    assert batch.sizes == expected.sizes == ((38, 64),)  # its student's size is 64; alone it would take 30 × 50
    assert torch.equal(predictions.boxes, own.head(own.features(expected), expected.image_size).boxes)


def test_a_detector_of_ones_own_file_is_scored(teacher, scenes_folder, tmp_path):
    file = tmp_path / "again.py"
    file.write_text(RUN_AGAIN.format(run=str(teacher)))
    scores = []
    for name, which in (("run", ["--run", str(teacher)]), ("file", ["--detector", f"python:{file}:trained"])):
        output = tmp_path / f"{name}.json"
        assert evaluate.main([*which, "--data-path", str(scenes_folder), "--output", str(output)]) == 0
        scores.append(json.loads(output.read_text()))
    assert scores[0]["scores"] == scores[1]["scores"]
    assert scores[1]["spec"] == f"python:{file}:trained"


def test_the_threshold_of_nms_is_an_option(teacher, scenes_folder, tmp_path):
    arguments = ["--run", str(teacher), "--data-path", str(scenes_folder), "--output", str(tmp_path / "scores.json")]
    assert evaluate.main([*arguments, "--nms-threshold", "1"]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]
    assert scores["ap_nms"] == scores["ap"]  # suppresses nothing


@pytest.mark.slow
def test_a_users_file_imports_its_neighbours_whatever_ours_are_called(workshop, script, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in (*NEIGHBOURS, "demo"):
        content = {"models": USERS_MODELS, "data": NETWORK}.get(name, "")
        (folder / f"{name}.py").write_text(f'{content}\nMINE = "mine"\n')
    imports = "\n".join(f"import {name}" for name in NEIGHBOURS)
    (folder / "detector.py").write_text(BARE_IMPORTS.format(imports=imports, names=", ".join(NEIGHBOURS)))
    reference = f"python:{folder / 'detector.py'}:trained"

    process = script("train.py", *workshop.arguments(tmp_path / "run", arm="cross-head", teacher=reference, workers=1))
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "teacher on 8 validation images" in errors
    assert all(line["losses"]["distill_classification"] > 0 for line in train_lines(tmp_path / "run"))

    process = script("evaluate.py", "--detector", reference, "--data-path", str(workshop.data))
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "with NMS" in output
