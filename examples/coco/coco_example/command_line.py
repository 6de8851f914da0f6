"""The command line of `train.py`: an argument for every option, and what is refused before anything is read."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from coco_example.commands import CommandParser
from coco_example.errors import RunError
from coco_example.files import read_json
from coco_example.models.saved_model import check_finished
from coco_example.options import GROUPS, TIMM, Arm, Backbone, ModelOptions, Options, TrainingOptions, is_reference
from coco_example.together import incompatible

__all__ = ["parse_options"]

# Conversions, see docs/results.md: a trained detector loses at the rate it was trained with, the branch alone does not;
# and a usual warm-up would be most of a short schedule.
RATE = 0.3  # times the run's
FOREIGN_RATE = 1e-4  # of a detector that is no run's
WARMUP_STEPS = 10


def parse_options(arguments: Sequence[str] | None = None) -> Options:
    """Read options from the command line."""
    # 1. An argument for every option, in the groups of `Options`.
    parser = CommandParser(
        description="Train a detector on a COCO folder, one arm a run. With torchrun it runs on several processes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    _add_arguments(parser.add_argument, Options)
    for name, kind in GROUPS.items():
        _add_arguments(parser.add_argument_group(name, kind.__doc__).add_argument, kind)

    # 2. A conversion has defaults of its own.
    try:
        parser.set_defaults(**_conversion(arguments))
    except RunError as error:
        parser.refuse(f"{error}", error.page)

    # 3. Parse, and refuse what means nothing.
    options = Options.from_flat(vars(parser.parse_args(arguments)))
    conflict = _conflict(options)
    if conflict is not None:
        parser.error(conflict)
    return options


def _conversion(arguments: Sequence[str] | None) -> dict[str, Any]:
    """List the defaults of ``--convert``, none without it.

    Raises:
        RunError: It names no finished run.
    """
    # 1. Is it asked for?
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--convert")
    parser.add_argument("--freeze")
    parser.add_argument("--size")
    given, _ = parser.parse_known_args(arguments)
    if not given.convert:
        return {}

    # 2. The detector, and how it was trained. Of one that is no run's, nobody knows how; it resizes as it does.
    if is_reference(given.convert):
        full = given.convert.startswith("torchvision:") and given.size is None
        kept: dict[str, Any] = {"size": 1333, "short_side": 800} if full else {"size": 0}
        rate = FOREIGN_RATE
    else:
        check_finished(Path(given.convert), "--convert")
        model, run = (read_json(Path(given.convert) / name) for name in ("model.json", "config.json"))
        names = {option.name for option in fields(TrainingOptions)} | {"augmentation", "mosaic", "cache"}
        kept = {name: value for name, value in run.items() if name in names}
        kept |= {option.name: model[option.name] for option in fields(ModelOptions) if option.name in model}
        kept["epochs"] = max(1, round(int(kept["epochs"]) / 4))
        rate = RATE * kept["lr"]

    # 3. The way without NMS. What is frozen has nothing to distil into.
    arm: Arm = "one-to-one" if given.freeze in ("all", "backbone-neck") else "cross-head"
    kept |= {} if given.freeze == "all" else {"lr": rate}
    return kept | {"arm": arm, "metric": "balanced", "selection": True, "warmup_steps": WARMUP_STEPS}


def _add_arguments(add: Callable[..., Any], kind: type[Any]) -> None:
    types = get_type_hints(kind, include_extras=True)
    for option in fields(kind):
        if option.name in GROUPS:
            continue
        value, text = get_args(types[option.name])
        flag = _flag(option.name)
        if value is bool:
            add(flag, action=argparse.BooleanOptionalAction, default=option.default, help=text)
        elif get_origin(value) is tuple:
            add(flag, action="append", default=[], help=text)
        elif get_origin(value) is Literal:
            add(flag, choices=get_args(value), default=option.default, help=text)
        else:
            add(flag, type=value, default=option.default, help=text, required=option.name == "output")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _conflict(options: Options) -> str | None:
    """Describe the first option that is out of range or does not go with another."""
    dataset, method, flat = options.dataset, options.method, options.as_flat()
    resizes = options.teachers.convert.startswith("python:")
    untrained = options.teachers.convert and options.model.selection  # the branch does something from the start
    least = {
        "epochs": 0 if untrained else 1,
        "batch_size": 1,
        "size": 0 if resizes else 1,
        "log_every": 1,
        "seed": 0,
        "top_k": 1,
    }
    least |= {"accumulate": 1, "val_losses": 0}
    conflicts = [
        (flat[name] < low, f"expected {_flag(name)} of at least {low}, but got {flat[name]}")
        for name, low in least.items()
    ]
    backbone, backbones = options.model.backbone, get_args(Backbone)
    near = difflib.get_close_matches(backbone, backbones, n=1)
    conflicts += [
        (
            backbone not in backbones and not backbone.startswith(TIMM),
            f"expected --backbone {', '.join(backbones)} or timm:NAME, but got {backbone}"
            + (f"; did you mean {near[0]}?" if near else ""),
        ),
        (
            not 0 <= method.distill_warmup <= 1,
            f"expected --distill-warmup in 0…1, but got {method.distill_warmup}",
        ),
        (
            options.model.short_side > 0 and dataset.augmentation not in ("none", "flip"),
            "expected --augmentation none or flip with --short-side: the others make squares of --size",
        ),
        (
            dataset.multi_scale and dataset.augmentation not in ("none", "flip"),
            "expected --augmentation none or flip with --multi-scale: the others draw a scale themselves",
        ),
        (
            dataset.multi_scale and is_reference(options.teachers.convert),
            "expected --multi-scale with a detector of the options: one of a file or of torchvision resizes itself",
        ),
        (
            dataset.data != "demo" and not Path(dataset.data_path).exists(),
            f"expected a data set, but got no folder at --data-path {dataset.data_path}",
        ),
    ]
    return next((sentence for wrong, sentence in conflicts if wrong), None) or incompatible(options)
