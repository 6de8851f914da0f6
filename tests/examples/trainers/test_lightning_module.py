"""`examples/trainers/lightning_module.py`: Lightning trains the student, and the teacher stays what and where it is."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning
    from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_module import DistillationModule, Pictures, main
from rectangles import new_distiller

from crosskd_assign.errors import MissingTeacherError
from tests.makers.small_models import snapshot

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own: workers, loggers, what it deprecates

EPOCHS = 2


def trainer(folder: Path, epochs: int = EPOCHS, **options: Any) -> Any:
    """A silent trainer."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return lightning.Trainer(default_root_dir=folder, max_epochs=epochs, **quiet, **options)


@pytest.fixture
def pictures() -> Pictures:
    return Pictures(train=12, val=4, batch_size=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> dict[str, Any]:
    """One run of two epochs, with what it looked like at each step and at the end of each epoch."""
    folder = tmp_path_factory.mktemp("run")
    module = DistillationModule(new_distiller())
    kept = snapshot(module.distiller.teacher)
    seen: dict[str, Any] = {"modes": [], "weights": []}

    class Look(lightning.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            modes = {m.training for m in module.distiller.teacher.modules()}
            seen["modes"].append((module.distiller.training, modes))
            seen["weights"].append(module.distiller.distillation_weight)

        def on_train_epoch_end(self, trainer: Any, _: Any) -> None:
            trainer.save_checkpoint(folder / f"{trainer.current_epoch}.ckpt")

    fit = trainer(folder, callbacks=[Look()], enable_checkpointing=False)
    fit.fit(module, datamodule=Pictures(train=12, val=4, batch_size=4))
    return {"module": module, "kept": kept, "folder": folder, "metrics": fit.callback_metrics, **seen}


def test_training_changes_the_student_alone_and_the_teachers_weight_falls(run):
    module = run["module"]
    assert run["modes"] == [(True, {False})] * 6
    assert run["weights"] == sorted(run["weights"], reverse=True)
    assert run["weights"][0] == 1
    assert run["weights"][-1] < 0.1
    assert all(torch.equal(value, run["kept"][name]) for name, value in module.distiller.teacher.state_dict().items())
    fresh = snapshot(new_distiller())
    changed = [not torch.equal(value, fresh[name]) for name, value in module.distiller.state_dict().items()]
    assert sum(changed) > 0.9 * len(changed)
    assert {"found", "duplicates", "distill_classification"} <= set(run["metrics"])


def test_a_checkpoint_holds_the_student_and_no_teacher_and_comes_back_with_one(run):
    file = run["folder"] / "1.ckpt"
    checkpoint = torch.load(file, weights_only=True)  # plain tensors and numbers: no pickled module
    assert dict(checkpoint["hyper_parameters"]) == {"lr": 4e-3}
    assert {name.removeprefix("distiller.") for name in checkpoint["state_dict"]} == set(new_distiller().state_dict())
    teacher = {value.data_ptr() for value in run["module"].distiller.teacher.parameters()}
    assert not teacher & {parameter.data_ptr() for parameter in run["module"].parameters()}
    with pytest.raises(TypeError, match="distiller"):
        DistillationModule.load_from_checkpoint(file)
    loaded = DistillationModule.load_from_checkpoint(file, distiller=new_distiller(seed=5))
    for name, value in run["module"].state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    images, targets = next(iter(Pictures(val=4).val_dataloader()))
    found = loaded.eval()(images)
    for mine, theirs in zip(found, run["module"].eval()(images), strict=True):
        torch.testing.assert_close(mine["boxes"], theirs["boxes"], rtol=0, atol=0)
    assert "distill_classification" in loaded.train().distiller(images, targets)
    with pytest.raises(MissingTeacherError):
        copy.deepcopy(loaded).distiller.teacher  # noqa: B018


def test_a_resumed_run_ends_bit_for_bit_where_the_whole_one_did(run, pictures, tmp_path):
    module = DistillationModule(new_distiller(seed=7))
    trainer(tmp_path, enable_checkpointing=False).fit(
        module, datamodule=pictures, ckpt_path=run["folder"] / "0.ckpt", weights_only=True
    )
    assert module.global_step == 6
    for name, value in run["module"].state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name


def test_the_average_is_validated_and_saved_and_leaves_the_teacher_out(pictures, tmp_path):
    module = DistillationModule(new_distiller())
    fit = trainer(tmp_path, epochs=1, callbacks=[EMAWeightAveraging(decay=0.5)])
    fit.fit(module, datamodule=pictures)
    checkpoint = torch.load(fit.checkpoint_callback.best_model_path, weights_only=True)
    expected = set(module.state_dict())
    assert set(checkpoint["state_dict"]) == set(checkpoint["current_model_state"]) == expected
    name = next(name for name in expected if name.endswith("weight"))
    assert not torch.equal(checkpoint["state_dict"][name], checkpoint["current_model_state"][name])
    assert module.distiller.teacher is not None


def test_bfloat16_reaches_both_networks(pictures, tmp_path):
    module = DistillationModule(new_distiller())
    seen: dict[str, set[torch.dtype]] = {"student": set(), "teacher": set()}
    for name, adapter in (("student", module.distiller.detector.adapter), ("teacher", module.distiller.teacher)):
        adapter.model.head[-1].register_forward_hook(lambda *a, n=name: seen[n].add(a[2].dtype))
    fit = trainer(tmp_path, epochs=1, precision="bf16-mixed", enable_checkpointing=False, limit_train_batches=1)
    fit.fit(module, datamodule=pictures)
    assert seen == {"student": {torch.bfloat16}, "teacher": {torch.bfloat16}}
    assert all(bool(value.isfinite()) for value in fit.callback_metrics.values())


@pytest.mark.slow
def test_the_script_runs_and_resumes_and_the_student_is_exported(tmp_path, capsys):
    main(["--output", str(tmp_path), "--epochs", "1"])
    (file,) = tmp_path.rglob("*.ckpt")
    main(["--output", str(tmp_path), "--epochs", "2", "--resume", str(file)])
    assert "'found':" in capsys.readouterr().out
    pytest.importorskip("onnxruntime")
    from crosskd_assign.export import export_onnx

    module = DistillationModule.load_from_checkpoint(file, distiller=new_distiller())
    report = export_onnx(module.distiller, tmp_path / "student.onnx", image_size=(64, 64), batch_size=1)
    assert report.path.is_file()
