"""Distillation inside Ultralytics' own trainer: its augmentation, optimizer, EMA, AMP, validation and export stay.

``YOLO("yours.pt").train(trainer=DistillationTrainer, data="yours.yaml")`` takes NMS out of a detector: the student
starts as a copy of ``yours.pt``, and ``yours.pt`` is its teacher. For another teacher, name it in a subclass.
What comes out is a plain YOLO with a one-to-one head. Say ``nms=False`` to its ``predict``, ``val`` and ``export``.

Licence: `ultralytics <https://pypi.org/project/ultralytics/>`_ is AGPL-3.0, or a licence you buy. This file holds none
of it; what you train and ship with that package falls under its licence, not under ours.
"""

from __future__ import annotations

import argparse
import copy
import copyreg
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rectangles import write_yolo
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel, load_checkpoint, yaml_model_load
from ultralytics.utils import DEFAULT_CFG

sys.path.insert(0, str(Path(__file__).parents[1] / "third_party"))

from ultralytics_detector import YOLOAdapter

from crosskd_assign import CrossHeadDistiller, EndToEndDetector, fade
from crosskd_assign.distillation.schedule import Decay
from crosskd_assign.errors import MissingTeacherError, OptionError
from crosskd_assign.structures import Target

__all__ = ["DistillationTrainer", "DistilledYOLO", "ValidationLoss", "main", "targets_of"]

Losses = tuple[Tensor, dict[str, Tensor]]


def targets_of(batch: dict[str, Any]) -> list[Target]:
    """Make a target of each image out of the package's batch, whose boxes are fractions of the image."""
    height, width = batch["img"].shape[-2:]
    centre, extent = (batch["bboxes"].float() * batch["bboxes"].new_tensor([width, height] * 2)).split(2, dim=1)
    boxes = torch.cat([centre - extent / 2, centre + extent / 2], dim=1)
    labels = batch["cls"].flatten().long()
    real = (extent > 0).all(dim=1)
    owned = [(batch["batch_idx"] == i) & real for i in range(len(batch["img"]))]
    return [Target(boxes=boxes[own], labels=labels[own]) for own in owned]


class DistilledYOLO(DetectionModel):  # type: ignore[misc]  # the package has no types
    """A YOLO whose training loss is a distiller's. Copies and pickles of it, EMA included, are plain YOLOs."""

    criterion: Any = None  # where the package keeps its own loss
    distiller: tuple[CrossHeadDistiller, ...] = ()  # in a tuple, nn.Module does not register it

    def loss(self, batch: dict[str, Any], _: Any = None) -> Losses:
        """Compute the losses of the distiller, times the images of the batch, as the package's own are."""
        losses: dict[str, Tensor] = self.distiller[0](batch["img"], targets_of(batch))
        total = torch.stack(list(losses.values())).sum() * len(batch["img"])
        return total, {name: value.detach() for name, value in losses.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        state = {name: value for name, value in self.__dict__.items() if name not in {"distiller", "criterion"}}
        return copyreg.__newobj__, (DetectionModel,), state  # type: ignore[attr-defined]  # pickle's own, undeclared


class ValidationLoss:
    """The one-to-one losses of a network in evaluation mode, for the package's validator."""

    def __init__(self, model: DetectionModel) -> None:
        self.detector = EndToEndDetector(YOLOAdapter(model, branch="one-to-one")).eval()

    def __call__(self, _: Any, batch: dict[str, Any]) -> Losses:
        """Run the network once more: what the validator holds is decoded already."""
        losses = self.detector.losses(self.detector.run(batch["img"].float(), targets_of(batch)))
        return torch.stack(list(losses.values())).sum(), losses


class DistillationTrainer(DetectionTrainer):  # type: ignore[misc]  # the package has no types
    """Trains the one-to-one head of a YOLO, and all below it, with the help of a one-to-many teacher.

    Attributes:
        teacher: A trained network's file, or None for the network that training starts from.
        decay: How the weight of distillation falls over the run; see `crosskd_assign.fade`.
    """

    teacher: str | Path | None = None
    decay: Decay = "cosine"

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: Any = None) -> None:
        super().__init__(cfg, {**(overrides or {}), "nms": False}, _callbacks)  # validates the one-to-one head
        for name, is_asked_for in (("several devices", self.world_size > 1), ("compile=True", self.args.compile)):
            if is_asked_for:
                raise OptionError(
                    expected="one device, without compile", got=name, where=type(self).__name__, fix="leave it out"
                )
        self.start: nn.Module | None = None
        self.add_callback("on_train_epoch_start", _fade)

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> DistilledYOLO:
        """Build the student with a one-to-one head; where ``weights`` have none, it starts as their only head."""
        description = {**(cfg if isinstance(cfg, dict) else yaml_model_load(cfg)), "end2end": True}
        model = DistilledYOLO(description, nc=self.data["nc"], ch=self.data["channels"], verbose=verbose)
        model.names = self.data["names"]
        if weights is None:
            return model
        self.start = copy.deepcopy(weights)
        model.load(weights)
        if getattr(weights.model[-1], "one2one_cv2", None) is None:
            head = model.model[-1]
            head.one2one_cv2.load_state_dict(head.cv2.state_dict())
            head.one2one_cv3.load_state_dict(head.cv3.state_dict())
        return model

    def _build_train_pipeline(self) -> None:
        """Build the distiller when the model is where it trains, and before there is an optimizer."""
        if not self.model.distiller:
            student = EndToEndDetector(YOLOAdapter(self.model, branch="one-to-one"))
            distiller = CrossHeadDistiller(student, YOLOAdapter(self._teacher())).to(self.device).train()
            if self.resume:
                distiller.aligner.load_state_dict(torch.load(self.wdir / "aligner.pt", weights_only=True))
            self.model.distiller = (distiller,)
        super()._build_train_pipeline()

    def build_optimizer(self, model: DistilledYOLO, *arguments: Any, **options: Any) -> torch.optim.Optimizer:
        """Build the package's optimizer, and add what aligns the student's maps with those of a wider teacher."""
        optimizer: torch.optim.Optimizer = super().build_optimizer(model, *arguments, **options)
        if own := [*model.distiller[0].aligner.parameters()]:
            optimizer.add_param_group({"params": own, "weight_decay": 0.0})
        return optimizer

    def validate(self) -> Any:
        """Validate the averaged weights, with a loss whose terms are named like those of training."""
        if not isinstance(getattr(self.ema.ema, "criterion", None), ValidationLoss):
            self.ema.ema.criterion = ValidationLoss(self.ema.ema)
        return super().validate()

    def save_model(self) -> bool:
        """Save the package's checkpoint, which is a plain YOLO, and beside it what else a resumed run needs."""
        torch.save(self.model.distiller[0].aligner.state_dict(), self.wdir / "aligner.pt")
        return bool(super().save_model())

    def _teacher(self) -> nn.Module:
        """Load the teacher; keep a copy in the run's folder, from where a resumed run takes it."""
        kept = self.wdir / "teacher.pt"
        if self.resume:
            network: nn.Module = load_checkpoint(kept)[0]
            return network
        start = self.start if self.teacher is None else load_checkpoint(self.teacher)[0]
        if start is None:
            raise MissingTeacherError(
                expected="a trained network to start from, or a teacher",
                got="a fresh network alone",
                where=type(self).__name__,
                fix='start with YOLO("yours.pt"), or set teacher = "yours.pt" in a subclass',
            )
        self.wdir.mkdir(parents=True, exist_ok=True)
        torch.save({"model": start}, kept)
        return start.float()


def _fade(trainer: DistillationTrainer) -> None:
    """Set the weight of distillation for an epoch."""
    progress = trainer.epoch / trainer.epochs
    trainer.model.distiller[0].distillation_weight = fade(progress, decay=trainer.decay)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for pictures and runs")
    parser.add_argument("--model", default="yolo11n.yaml", help="network or description (yolo11n.yaml, untrained)")
    parser.add_argument("--epochs", type=int, default=3, help="of each of the two runs, over 64 pictures (3)")
    options = parser.parse_args(arguments)
    settings = {
        "data": str(write_yolo(options.output / "pictures")),
        "project": str(options.output.absolute()),
        "imgsz": 64,
        "epochs": options.epochs,
    }
    teacher = YOLO(options.model)
    teacher.train(name="teacher", **settings)  # as ever
    student = YOLO(teacher.trainer.best)
    student.train(name="student", trainer=DistillationTrainer, **settings)
    found = YOLO(student.trainer.best).val(name="val", nms=False, **settings)
    print(f"AP without NMS: {100 * found.box.map:.1f}")


if __name__ == "__main__":
    main()
