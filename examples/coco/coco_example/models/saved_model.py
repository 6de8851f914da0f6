"""The finished detector of a run: ``model.json`` and ``model.safetensors`` in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import nn
from typing_extensions import Self

from coco_example.data.values import Identifier
from coco_example.errors import MissingPackageError, RunError, first_line
from coco_example.files import digest, read_json, write_json, write_whole
from coco_example.models.detectors import add_selection, build_detector, torchvision_detector
from coco_example.models.foreign import python_detector, python_file
from coco_example.models.score_thresholds import ScoreThresholds
from coco_example.models.weights import load_weights
from coco_example.options import ModelOptions, is_reference

__all__ = ["ModelSpec", "check_finished", "load_model", "read_notes", "save_model", "save_spec"]

_NOTHING: Mapping[str, str] = MappingProxyType({})

# How training starts; a finished detector has its own weights.
_NOT_STORED = {"backbone_weights", "trainable_stages"}


@dataclass(frozen=True)
class ModelSpec:
    """What it takes to build a detector again and to understand its labels.

    Attributes:
        model: The detector.
        one_to_many: Whether it was trained with many positives an object, and needs NMS.
        categories: COCO category id and name of the labels 1, 2, …, or of ``labels``.
        detector: What the detector is built from instead of the options: "torchvision:NAME" or "python:FILE:FUNCTION".
        labels: The labels of such a detector, one a category.
        thresholds: Score thresholds to use it with, once they are chosen.
    """

    model: ModelOptions
    one_to_many: bool
    categories: tuple[tuple[Identifier, str], ...]
    detector: str = ""
    labels: tuple[int, ...] = ()
    thresholds: ScoreThresholds | None = None

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> Self:
        """Read the content of a ``model.json``.

        Raises:
            TypeError: A value is of another type, or missing.
            ValueError: A threshold's label is no number.
        """
        # 1. The detector's options, which have defaults.
        defaults = asdict(ModelOptions())
        given = {name: value for name, value in values.items() if name in defaults}
        wrong = [name for name, value in given.items() if type(value) is not type(defaults[name])]

        # 2. Labels.
        categories, one_to_many = values.get("categories"), values.get("one_to_many")
        if type(one_to_many) is not bool:
            wrong.append("one_to_many")
        if not (isinstance(categories, (list, tuple)) and all(map(_is_category, categories))):
            wrong.append("categories")
        detector, labels = values.get("detector", ""), values.get("labels", [])
        if not (isinstance(detector, str) and (not detector or is_reference(detector))):
            wrong.append("detector")
        count = len(categories) if detector and isinstance(categories, (list, tuple)) else 0
        if not (isinstance(labels, (list, tuple)) and len(labels) == count and all(type(n) is int for n in labels)):
            wrong.append("labels")
        if wrong:
            raise TypeError(", ".join(f"{name} {values.get(name)!r:.40}" for name in wrong))
        pairs = tuple((category, name) for category, name in values["categories"])
        limits = values.get("thresholds")  # which a run of an earlier version lacks
        thresholds = None if limits is None else ScoreThresholds.from_flat(limits)
        return cls(ModelOptions(**given), values["one_to_many"], pairs, detector, tuple(labels), thresholds)

    def as_flat(self) -> dict[str, Any]:
        """List everything by name, without groups, as ``model.json`` has it."""
        model = {name: value for name, value in asdict(self.model).items() if name not in _NOT_STORED}
        flat = {**model, "one_to_many": self.one_to_many, "categories": self.categories}
        foreign = {"detector": self.detector, "labels": self.labels} if self.detector else {}
        thresholds = {} if self.thresholds is None else {"thresholds": self.thresholds.as_flat()}
        return {**flat, **foreign, **thresholds}

    @property
    def num_classes(self) -> int:
        """Count the classes, background included."""
        return len(self.categories) + 1

    @property
    def label_to_category(self) -> dict[int, Identifier]:
        """Map each label to its COCO category id."""
        return {label: category for label, (category, _) in zip(self._labels, self.categories, strict=True)}

    @property
    def label_to_name(self) -> dict[int, str]:
        """Map each label to its name."""
        return {label: name for label, (_, name) in zip(self._labels, self.categories, strict=True)}

    @property
    def _labels(self) -> Sequence[int]:
        return self.labels or range(1, len(self.categories) + 1)


def _is_category(value: Any) -> bool:
    kinds = [type(part) for part in value] if isinstance(value, (list, tuple)) else []
    return kinds in ([int, str], [str, str])  # an `Identifier` and a name


def save_model(folder: Path, model: nn.Module, spec: ModelSpec, notes: Mapping[str, str] = _NOTHING) -> None:
    """Write the finished detector: weights alone, with their digest and any notes, and what they belong to."""
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    metadata = {**notes, "digest": digest(dict(sorted(state.items())))}
    write_whole(folder / "model.safetensors", save(state, metadata=metadata))
    save_spec(folder, spec)


def save_spec(folder: Path, spec: ModelSpec) -> None:
    """Write what belongs to the weights alone, e.g. once thresholds are chosen."""
    write_json(folder / "model.json", spec.as_flat())


def read_notes(folder: Path) -> dict[str, str]:
    """Read what `save_model` noted beside the weights.

    Raises:
        OSError: No such file.
        SafetensorError: Something else in it.
    """
    with safe_open(folder / "model.safetensors", "pt") as file:
        return dict(file.metadata() or {})


def check_finished(folder: Path, option: str = "") -> None:
    """See that a folder holds a finished run.

    Args:
        folder: The folder.
        option: What named it, if that could have named a detector of torchvision or of a Python file as well.

    Raises:
        RunError: It holds none, or is not there.
    """
    if (folder / "model.json").exists():
        return
    there = folder.is_dir()
    raise RunError(
        expected="a finished run" + (", torchvision:NAME or python:FILE:FUNCTION" if option else ""),
        got="a folder without model.json" if there else "no such folder",
        where=f"{option} {folder}".strip(),
        fix="train it to the end first" if there else "check the path, from where the command is run",
        page="docs/how-to/convert.md#on-a-coco-folder" if option == "--convert" else "",
    )


def load_model(folder: Path, option: str = "") -> tuple[nn.Module, ModelSpec]:
    """Build the finished detector of a run, in evaluation mode.

    Args:
        folder: The run's folder.
        option: As of `check_finished`.

    Raises:
        RunError: The folder holds no finished run, or something else under the names of its files.
        ModelError: Its weights do not fit.
        MissingPackageError: Its backbone is a package's that is not installed.
    """
    check_finished(folder, option)
    path = folder / "model.json"
    values = read_json(path)
    try:
        spec = ModelSpec.from_flat(values)
        model = None if spec.detector else build_detector(spec.model, spec.num_classes)
    except MissingPackageError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:  # what torch raises of numbers that cannot be
        raise RunError(
            expected="the description of a detector",
            got=f"another: {first_line(error)}",
            where=f"{path}",
            fix="restore that file, or train again",
        ) from error
    if model is None:  # what a file of the user's own raises is raised
        model = _build_foreign(spec, path)
    load_weights(model, folder / "model.safetensors")
    return model.eval(), spec


def _build_foreign(spec: ModelSpec, path: Path) -> nn.Module:
    """Build a detector that was converted, without its weights where they would have to be fetched."""
    kind, _, name = spec.detector.partition(":")
    model: nn.Module
    if kind == "torchvision":
        model = torchvision_detector(name, size=spec.model.size, short_side=spec.model.short_side, fetch=False)
    else:
        file, _ = python_file(spec.detector)
        if not file.is_file():
            raise RunError(
                expected="the Python file that the detector was converted from",
                got=f"none at {file}",
                where=f"{path}",
                fix='put it back, or write its new place under "detector" there',
            )
        model, _ = python_detector(spec.detector)
    return add_selection(model, spec.model)
