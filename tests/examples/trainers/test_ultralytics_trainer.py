"""`examples/trainers/ultralytics_trainer.py`: the package trains, averages, validates, saves and exports as ever."""

from __future__ import annotations

import csv
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
pytest.importorskip("ultralytics")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from ultralytics import YOLO
    from ultralytics.nn.tasks import DetectionModel, yaml_model_load
    from ultralytics.utils import YAML

import ultralytics_trainer
from rectangles import write_yolo
from ultralytics_detector import YOLOAdapter
from ultralytics_trainer import DistillationTrainer, targets_of

from crosskd_assign import EndToEndDetector
from crosskd_assign.errors import MissingTeacherError, OptionError
from tests.makers.small_models import snapshot

pytestmark = pytest.mark.filterwarnings("ignore")  # the package's own

TERMS = ["classification", "bbox_regression"]
NAMES = [*TERMS, *(f"distill_{name}" for name in TERMS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A data set, and a narrow network of each generation that is sure of something."""
    root: Path = tmp_path_factory.mktemp("yolo")
    write_yolo(root / "pictures", train=8, val=4)
    for name, width in (("yolo11n", 0.0625), ("yolo26n", 0.0625), ("wide", 0.125)):
        description = yaml_model_load("yolo11n.yaml" if name == "wide" else f"{name}.yaml")
        description["scales"], description["nc"] = {"n": [0.33, width, 1024]}, 3
        YAML.save(root / f"{name}.yaml", description)
        torch.manual_seed(1)
        network = YOLO(root / f"{name}.yaml", task="detect")
        head = network.model.model[-1]
        for branch in [*head.cv3, *getattr(head, "one2one_cv3", [])]:
            branch[-1].weight.data *= 20  # scores that differ, so that they are in an order
            branch[-1].bias.data.fill_(-1.0)
        network.save(root / f"{name}.pt")
    return root


def settings(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    quiet = {"plots": False, "verbose": False, "workers": 0, "device": "cpu"}
    size = {"imgsz": 64, "epochs": 2, "batch": 4, "nbs": 4, "lr0": 0.01, "optimizer": "AdamW", "warmup_epochs": 0}
    data = {"data": str(folder / "pictures" / "rectangles.yaml"), "project": str(folder / "runs"), "name": name}
    return {**quiet, **size, **data, **more}


@pytest.fixture(scope="module", params=["yolo11n", pytest.param("yolo26n", marks=pytest.mark.slow)])
def run(request, folder) -> Any:
    """Two epochs from a network with one head, and from one with two."""
    kept: dict[str, Any] = {}

    def look(trainer: DistillationTrainer) -> None:
        kept["distiller"] = trainer.model.distiller[0]
        kept.setdefault("weights", []).append(kept["distiller"].distillation_weight)

    network = YOLO(folder / f"{request.param}.pt")
    network.add_callback("on_train_batch_end", look)
    network.train(trainer=DistillationTrainer, **settings(folder, request.param))
    network.trainer.kept, network.trainer.first = kept, YOLO(folder / f"{request.param}.pt").model
    return network.trainer


def test_the_student_learns_from_the_network_it_starts_as_which_stays_what_it_was(run):
    first = run.first.float().state_dict()
    teacher = run.kept["distiller"].teacher.model
    assert all(torch.equal(value, first[name]) for name, value in teacher.state_dict().items())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    trained = {
        name for name, value in run.model.named_parameters() if not torch.equal(value.cpu(), first.get(name, value))
    }
    assert any(name.startswith("model.0.") for name in trained)
    assert not [name for name in trained if name.startswith(("model.23.cv2", "model.23.cv3"))]  # the head with NMS
    assert run.kept["weights"] == [1, 1, 0.5, 0.5]


def test_the_average_and_the_checkpoints_are_plain_networks_without_a_teacher(run):
    expected = set(run.model.state_dict())
    for network in (run.ema.ema, YOLO(run.best).model):
        assert type(network) is DetectionModel
        assert set(network.state_dict()) == expected
        assert "distiller" not in vars(network)
    names = zipfile.ZipFile(run.last).read(next(n for n in zipfile.ZipFile(run.last).namelist() if n.endswith(".pkl")))
    assert b"crosskd" not in names
    assert b"ultralytics_trainer" not in names


def test_the_log_has_a_column_for_each_loss_and_those_of_validation_are_the_students(run):
    assert list(run.tloss) == NAMES
    assert all(float(value) > 0 for value in run.tloss.values())
    rows = list(csv.DictReader(run.csv.open()))
    assert len(rows) == 2
    for row in rows:
        assert {f"{split}/{name}" for split in ("train", "val") for name in NAMES} <= set(row)
        assert all(float(row[f"val/{name}"]) > 0 for name in TERMS)
    assert sum(float(rows[1][f"train/{n}"]) for n in TERMS) < sum(float(rows[0][f"train/{n}"]) for n in TERMS)


def test_both_networks_run_in_half_precision_where_the_trainer_asks_for_it(run):
    distiller, seen = run.model.distiller[0], []
    run.model.train()
    hooks = [
        adapter.model.model[0].conv.register_forward_hook(lambda *a: seen.append(a[2].dtype))
        for adapter in (distiller.detector.adapter, distiller.teacher)
    ]
    batch = run.preprocess_batch(next(iter(run.train_loader)))
    with torch.autocast("cpu", torch.bfloat16):  # on a CPU the trainer leaves it out
        loss, terms = run.model(batch)
    for hook in hooks:
        hook.remove()
    assert seen == [torch.bfloat16] * 2
    assert {value.dtype for value in terms.values()} == {torch.float32}
    torch.testing.assert_close(loss, len(batch["img"]) * torch.stack(list(terms.values())).sum())


def test_nothing_is_suppressed_and_predictions_are_those_of_the_student(run, folder, monkeypatch):
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("NMS ran")

    monkeypatch.setattr("torchvision.ops.nms", never)
    monkeypatch.setattr("ultralytics.utils.nms.TorchNMS.nms", never)
    network = YOLO(run.best)
    network.val(nms=False, **{k: v for k, v in settings(folder, "val").items() if k in {"data", "imgsz", "project"}})
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    (result,) = YOLO(run.best).predict(image, nms=False, conf=0.001, imgsz=64, verbose=False, device="cpu")
    adapter = YOLOAdapter(YOLO(run.best).model.float(), branch="one-to-one")
    (mine,) = EndToEndDetector(adapter, top_k=84).eval()(image)
    # Both as rows of four pixels, score and class: those that score the same may come in another order.
    theirs = torch.cat([result.boxes.xyxy.clamp(0, 64), 64 * result.boxes.conf[:, None], result.boxes.cls[:, None]], 1)
    own = torch.cat([mine["boxes"], 64 * mine["scores"][:, None], mine["labels"][:, None]], 1)
    assert len(theirs) > 10
    assert float(torch.cdist(theirs, own, p=torch.inf).amin(dim=1).max()) < 0.05


def test_the_packages_own_export_writes_the_student(run, monkeypatch):
    runtime = pytest.importorskip("onnxruntime")
    file = YOLO(run.best).export(format="onnx", nms=False, imgsz=64, simplify=False, device="cpu", verbose=False)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    (rows,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    adapter = YOLOAdapter(YOLO(run.best).model.float(), branch="one-to-one")
    (mine,) = EndToEndDetector(adapter, top_k=20).eval()(image)
    torch.testing.assert_close(mine["scores"], torch.from_numpy(rows[0, :20, 4]), rtol=1e-3, atol=1e-4)


def test_a_stopped_run_goes_on_with_its_teacher_and_what_aligns_it(folder):
    class FromTheWide(DistillationTrainer):
        teacher = folder / "wide.pt"

    network = YOLO(folder / "yolo11n.pt")
    network.add_callback("on_model_save", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        network.train(trainer=FromTheWide, **settings(folder, "stopped"))
    stopped = network.trainer
    before = snapshot(stopped.model.distiller[0].aligner)
    assert before  # a convolution for each level
    seen: list[Any] = []
    network = YOLO(stopped.last)
    network.add_callback("on_train_start", lambda trainer: seen.append(snapshot(trainer.model.distiller[0].aligner)))
    network.train(resume=True, trainer=FromTheWide)
    distiller = network.trainer.model.distiller[0]
    assert network.trainer.start_epoch == 1
    assert len(list(csv.DictReader(network.trainer.csv.open()))) == 2
    assert all(torch.equal(value, before[name]) for name, value in seen[0].items())
    assert any(not torch.equal(value, before[name]) for name, value in distiller.aligner.state_dict().items())
    wide = YOLO(folder / "wide.pt").model.float().state_dict()
    assert all(torch.equal(value, wide[name]) for name, value in distiller.teacher.model.state_dict().items())


def test_what_it_cannot_do_is_refused_before_training(folder):
    with pytest.raises(MissingTeacherError, match=r'start with YOLO\("yours.pt"\)'):
        YOLO(folder / "yolo11n.yaml").train(trainer=DistillationTrainer, **settings(folder, "fresh"))
    with pytest.raises(OptionError, match="got compile=True"):
        YOLO(folder / "yolo11n.pt").train(trainer=DistillationTrainer, **settings(folder, "compiled", compile=True))


def test_fractions_of_the_image_become_pixels_and_boxes_without_an_extent_are_left_out():
    batch = {
        "img": torch.zeros(2, 3, 40, 80),
        "bboxes": torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.0, 0.1], [0.25, 0.25, 0.5, 0.5]]),
        "cls": torch.tensor([[2.0], [1.0], [0.0]]),
        "batch_idx": torch.tensor([1.0, 1.0, 0.0]),
    }
    first, second = targets_of(batch)
    assert first["boxes"].tolist() == [[0, 0, 40, 20]]
    assert second["boxes"].tolist() == [[20, 10, 60, 30]]
    assert (first["labels"].tolist(), second["labels"].tolist()) == ([0], [2])


@pytest.mark.slow
def test_the_script_runs(tmp_path, capsys):
    ultralytics_trainer.main(["--output", str(tmp_path), "--epochs", "1"])
    assert "AP without NMS: " in capsys.readouterr().out
