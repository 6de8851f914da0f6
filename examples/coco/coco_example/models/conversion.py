"""Detectors that NMS is taken out of: how a run starts as one, whose labels it has, and which classes it learns."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from coco_example.data.annotations import Category
from coco_example.data.reader import CocoIndex
from coco_example.data.values import Identifier, key_of
from coco_example.errors import DataError, RunError
from coco_example.models.detectors import add_selection, torchvision_classes
from coco_example.models.foreign import python_file
from coco_example.models.saved_model import ModelSpec, load_model
from coco_example.models.teachers import load_teacher
from coco_example.options import ModelOptions, Options, is_reference
from crosskd_assign import ResizingAdapter, adapt

__all__ = ["Source", "classes_of_run", "in_labels_of", "load_source", "refuse_unknown", "trained_labels"]


@dataclass(frozen=True)
class Source:
    """A trained detector that is no run's, to be converted.

    Attributes:
        reference: "torchvision:NAME", or "python:FILE:FUNCTION" with the whole path of the file.
        model: The detector.
        labels: Category id of each of its labels.
        names: Names of its labels, where they are known.
    """

    reference: str
    model: nn.Module
    labels: dict[int, Identifier]
    names: dict[int, str]

    def at_own_size(self, options: ModelOptions) -> ModelOptions:
        """Take the size to which the detector itself resizes, where none is asked for.

        Raises:
            RunError: It resizes nothing.
        """
        if options.size > 0:
            return options
        adapter = adapt(self.model)
        transform = getattr(adapter.model, "transform", None)  # torchvision's
        if isinstance(adapter, ResizingAdapter) and adapter.size:
            size = adapter.size if isinstance(adapter.size, int) else max(adapter.size)
            return replace(options, size=size)
        if transform is not None:
            long, short = transform.max_size, transform.min_size[-1]
            return replace(options, size=long, short_side=short if short < long else 0)
        raise RunError(
            expected="--size, for a detector that does not resize",
            got="none",
            where=f"--convert {self.reference}",
            fix="name the longer side, in pixels, of the images that it should learn from",
        )

    def student(self, options: ModelOptions) -> nn.Module:
        """Copy the detector, with a selection branch if there is to be one; draws random numbers for it."""
        return add_selection(copy.deepcopy(self.model), options)

    def spec(self, options: ModelOptions, index: CocoIndex) -> ModelSpec:
        """Describe what comes of it, with names from a data set where the detector has none.

        Raises:
            DataError: The data set has classes that the detector lacks.
        """
        # 1. Each class of the data set is one of the detector's, of the same name if that is known.
        own = {key_of(category): label for label, category in self.labels.items()}
        given = {key_of(category.id): category for category in index.categories}
        odd = [
            category
            for key, category in given.items()
            if key not in own or not _same(self.names.get(own[key], category.name), category.name)
        ]
        refuse_unknown(odd, index)

        # 2. The labels, and what they are called.
        categories = []
        for label, identifier in self.labels.items():
            category = given.get(key_of(identifier), Category(identifier, self.names.get(label, f"{identifier}")))
            categories.append((category.id, category.name))
        return ModelSpec(options, False, tuple(categories), self.reference, tuple(self.labels))


def _same(name: str, other: str) -> bool:
    return name.strip().casefold() == other.strip().casefold()


def load_source(options: Options) -> Source | None:
    """Load the detector that is converted, unless it is a run's.

    Raises:
        RunError: It needs options that it does not have, or there is none.
        ModelError: torchvision does not have it.
    """
    reference = options.teachers.convert
    if not is_reference(reference):
        return None
    kind, _, name = reference.partition(":")
    names = torchvision_classes(name) if kind == "torchvision" else {}
    model, labels = load_teacher(reference, options.model, option="--convert")
    if kind == "torchvision":
        labels = {label: label for label in names}  # of its 90, those that COCO uses
    else:
        file, function = python_file(reference)
        reference = f"python:{file.resolve()}:{function}"  # the run may be evaluated from any folder
    return Source(reference, model, labels, names)


def classes_of_run(reference: str) -> list[Category] | None:
    """List the classes of the run that is converted; None if there is none, or it is no run."""
    if not reference or is_reference(reference):
        return None
    _, spec = load_model(Path(reference), "--convert")
    return [Category(*category) for category in spec.categories]


def refuse_unknown(categories: Collection[Category], index: CocoIndex) -> None:
    """Refuse classes that a detector lacks.

    Raises:
        DataError: There are some.
    """
    if categories:
        more = ", …" if len(categories) > 5 else ""
        raise DataError(
            expected="classes of the detector that is converted",
            got=", ".join(map(str, list(categories)[:5])) + more,
            where=f"categories of {index.annotations.file}",
            fix="leave their boxes out, or train a detector that has them",
        )


def in_labels_of(index: CocoIndex, spec: ModelSpec) -> CocoIndex:
    """Number the objects of an index as a detector does; to train on and to draw, but not to score."""
    own = {key_of(category): label for label, category in spec.label_to_category.items()}
    moved = {label: own.get(key_of(category), -1) for label, category in index.label_to_category.items()}
    if all(label == other for label, other in moved.items()):
        return index
    table = torch.tensor([0, *(moved[label] for label in sorted(moved))])
    return replace(index, records=tuple(replace(r, labels=table[r.labels]) for r in index.records))


def trained_labels(index: CocoIndex, spec: ModelSpec) -> tuple[int, ...] | None:
    """List the labels whose classes an annotation file has; None for all: that an object is none of them, it tells."""
    listed = {key_of(category.id) for category in index.annotations.listed}
    labels = tuple(label for label, category in spec.label_to_category.items() if key_of(category) in listed)
    return labels if len(labels) < len(spec.categories) else None
