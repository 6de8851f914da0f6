"""Every option of `train.py`, once: name, type, default and help."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from arms import ARMS, METRICS
from models import Architecture, Backbone

__all__ = ["FREE_ON_RESUME", "Options", "parse_options"]

# A resumed run may differ in these without becoming another run.
FREE_ON_RESUME = frozenset({"output", "resume", "workers", "log_every", "save_every", "data_path", "teacher"})


def _option(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Options:
    """One training run. Its fields are the command line's options, ``max_grad_norm`` as ``--max-grad-norm``."""

    output: str = _option("", "folder of the run; must be new, empty, or resumed")
    arm: str = _option("cross-head", "how to train; cross-head is the method of this project", ARMS)
    resume: bool = _option(False, "go on with the run in --output, exactly where it stopped")
    seed: int = _option(0, "of weights, order and augmentation")
    deterministic: bool = _option(False, "use deterministic algorithms only")

    data: str = _option("coco", "demo: draw scenes into --data-path first", ("coco", "demo"))
    data_path: str = _option("data/demo", "folder with train[2017]/, val[2017]/ and annotations/")
    train_annotations: str = _option("", "file in annotations/ instead of instances_train[2017].json")
    val_annotations: str = _option("", "file in annotations/ instead of instances_val[2017].json")
    augmentation: str = _option("flip", "how much training images vary", ("none", "flip", "crop", "full"))
    mosaic: float = _option(0.0, "probability of joining four images into one")
    cache: bool = _option(False, "keep decoded images in memory")
    workers: int = _option(0, "processes that load images")

    architecture: str = _option("fcos", "detector", get_args(Architecture))
    backbone: str = _option("small", "its backbone", get_args(Backbone))
    backbone_weights: str = _option("", "imagenet for torchvision's, or a state dict file; empty: none")
    trainable_stages: int = _option(-1, "backbone stages to train, of 5; -1: 3 with weights, all without")
    channels: int = _option(0, "of pyramid and head; 0: 256, or 64 on the small backbone")
    head_convs: int = _option(0, "of each branch of FCOS's head; 0: 4, or 2 on the small backbone")
    size: int = _option(128, "longer side of the images, in pixels")
    short_side: int = _option(0, "what the shorter side must not exceed: 800 with --size 1333 is COCO's usual; 0: none")

    teacher: str = _option(
        "", "a run's folder, torchvision:NAME for its COCO weights, or your own python:FILE:FUNCTION"
    )
    inherit: bool = _option(False, "start with what fits of the teacher's backbone and neck")
    inherit_from: str = _option("", "start with those of this detector, named as a --teacher is, instead")
    teacher_floor: float = _option(0.01, "refuse a teacher whose AP on validation images is below this")
    auxiliary_head: bool = _option(False, "train a second, one-to-many head beside the student's (DATE, YOLOv10)")
    detach: bool = _option(False, "with --auxiliary-head: one-to-one losses stop at the features (YOLOv10)")
    ranking: float = _option(0.0, "weight of the one-to-one ranking term")
    metric: str = _option("poto", "preset of the task-aware metric", tuple(METRICS))
    distill_classification: float = _option(1.0, "weight of the distillation's classification term")
    distill_box: float = _option(1.0, "weight of the distillation's box term")
    distill_quality: float = _option(0.0, "weight of the distillation's quality term")
    distill_features: float = _option(0.0, "weight of feature imitation beside cross-head distillation")
    distill_warmup: float = _option(0.0, "share of the run over which distillation's weight rises from 0")
    distill_decay: str = _option("none", "of distillation's weight, to 1 percent", ("none", "linear", "cosine"))
    imitation: float = _option(1.0, "weight of feature imitation where it is the arm")
    alignment: str = _option("statistics", "of student features to the teacher's", ("statistics", "none"))
    entry: int = _option(0, "convolutions of the student's head that run before it enters the teacher's (cross-head)")

    epochs: int = _option(12, "passes over the training images")
    batch_size: int = _option(16, "images of one step on one process")
    optimizer: str = _option("adamw", "", ("adamw", "sgd"))
    lr: float = _option(1e-3, "peak learning rate")
    weight_decay: float = _option(1e-4, "on weights; norms and biases have none")
    schedule: str = _option("cosine", "step divides by 10 after 2/3 and 8/9 of the run", ("cosine", "step"))
    warmup_steps: int = _option(100, "steps of linear warm-up")
    max_grad_norm: float = _option(10.0, "clip the gradient's norm; 0: do not")
    ema: float = _option(0.0, "decay of an average of the weights, which is then evaluated and saved; 0: none")
    precision: str = _option("float32", "autocast", ("float32", "bfloat16", "float16"))
    channels_last: bool = _option(False, "memory format of images and weights")

    eval_every: int = _option(0, "epochs between evaluations; 0: only at the end")
    save_every: int = _option(0, "steps between checkpoints besides those at the end of each epoch; 0: none")
    log_every: int = _option(20, "steps between lines of the log")

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Options that differ from those of an earlier start and must not when resuming."""
        then = {option.name: option.default for option in fields(self)} | other  # what was unknown then had its default
        return [
            f"{name}: {then[name]!r} then, {value!r} now"
            for name, value in asdict(self).items()
            if name not in FREE_ON_RESUME and then[name] != value
        ]


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Options from the command line."""
    parser = argparse.ArgumentParser(
        description="Train a detector on a COCO folder, one arm a run. With torchrun it runs on several processes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    for option in fields(Options):
        flag = "--" + option.name.replace("_", "-")
        text = option.metadata["help"] or " "
        if option.type == "bool":
            parser.add_argument(flag, action="store_true", help=text)
        else:
            kind = {"str": str, "int": int, "float": float}[str(option.type)]
            required = option.name == "output"
            choices = option.metadata["choices"]
            parser.add_argument(flag, type=kind, default=option.default, choices=choices, help=text, required=required)
    options = Options(**vars(parser.parse_args(arguments)))
    for name in ("epochs", "batch_size", "size", "log_every"):
        if getattr(options, name) < 1:
            parser.error(f"expected --{name.replace('_', '-')} of at least 1, but got {getattr(options, name)}")
    if options.seed < 0:
        parser.error(f"expected --seed of at least 0, but got {options.seed}")
    if options.detach and not options.auxiliary_head:
        parser.error("expected --auxiliary-head for --detach, but got none")
    if options.short_side and options.augmentation not in ("none", "flip"):
        parser.error("expected --augmentation none or flip with --short-side: the others make squares of --size")
    if options.inherit and not options.teacher:
        parser.error("expected a --teacher for --inherit, but got none")
    if options.inherit and options.inherit_from:
        parser.error("expected --inherit or --inherit-from, but got both")
    if not Path(options.data_path).exists() and options.data != "demo":
        parser.error(f"expected a data set, but got no folder at --data-path {options.data_path}")
    return options
