"""Where two detectors are crossed: at which maps of the student the teacher's head is entered, and what has to fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Self

from .detectors import DetectorAdapter, PyramidLevel
from .errors import DetectorError, IncompatibleDetectorsError, OptionError, problem
from .structures import Batch, DensePredictions

__all__ = ["Crossing", "Entrance", "check_branches", "cross_levels", "missing_branch"]

PYRAMID = "pyramid"  # the one branch of a head that is entered at its beginning


@dataclass(frozen=True)
class Entrance:
    """A place in a detector: the beginning of its head, or behind the first convolutions of the head's branches.

    It holds facts and no adapter, so that it may travel where the teacher must not.

    Attributes:
        entry: Convolutions before it; 0 for the feature pyramid.
        branches: Names of the head's branches there, in the order of the maps.
        levels: Channels and stride of each map: all levels of the first branch, then of the second, and so on.
        edits_features: Whether the head's first part begins with an in-place operation.
        edits_maps: Whether what comes behind this place does.
    """

    entry: int
    branches: tuple[str, ...]
    levels: tuple[PyramidLevel, ...]
    edits_features: bool = False
    edits_maps: bool = False

    @classmethod
    @torch.no_grad()
    def of(cls, adapter: DetectorAdapter, entry: int, role: str) -> Self:
        """Measure channels and strides on one blank image.

        Args:
            adapter: The detector.
            entry: How many convolutions further in than the feature pyramid.
            role: "student" or "teacher", for messages.

        Raises:
            OptionError: ``entry`` is no natural number.
            IncompatibleDetectorsError: The head cannot be split there.
            DetectorError: It returns other maps than it should.
        """
        if not isinstance(entry, int) or entry < 0:
            fix = "0 enters at the feature pyramid, k behind the first k convolutions of the head"
            raise OptionError(problem("entry of 0 or more convolutions", repr(entry), "constructor argument", fix))
        pyramid = tuple(adapter.pyramid())
        if entry == 0:
            return cls(0, (PYRAMID,), pyramid)
        who = f"{role} {type(adapter).__name__}"
        if entry > adapter.max_entry:
            can = f"at most {adapter.max_entry}" if adapter.max_entry else "0, because this head cannot be split"
            fix = "choose a smaller entry" if adapter.max_entry else "leave entry at 0, or write head_stem() for it"
            raise IncompatibleDetectorsError(problem(f"entry of {can}", f"{entry}", who, fix))
        with adapter._probing() as batch:
            features = adapter.features(batch)
            maps = adapter.head_stem([x.clone() for x in features], entry)
        flat = [x for branch in maps.values() for x in branch]
        if not maps or [x.shape[-2:] for x in flat] != [x.shape[-2:] for x in features] * len(maps):
            got = f"{ {name: [tuple(x.shape) for x in branch] for name, branch in maps.items()} }"
            fix = "return for every branch one map a level, of the level's size"
            raise DetectorError(problem(f"{len(features)} maps for each branch", got, f"{who}.head_stem()", fix))
        strides = [level.stride for level in pyramid] * len(maps)
        levels = (PyramidLevel(x.shape[1], stride) for x, stride in zip(flat, strides, strict=True))
        return cls(entry, tuple(maps), tuple(levels))

    @torch.no_grad()
    def tried(self, adapter: DetectorAdapter) -> Self:
        """This place, after the head has run on one blank image: in-place operations are known, the parts agree.

        Raises:
            DetectorError: ``head_rest(head_stem())`` does not say what ``head()`` says.
        """
        if self.entry == 0:
            return replace(self, edits_maps=adapter.edits_features())
        with adapter._probing() as batch:
            features = adapter.features(batch)
            whole = adapter.head([x.clone() for x in features], batch)
            known = replace(self, edits_features=_edits(features, lambda x: adapter.head_stem(x, self.entry)))
            maps = known.maps(adapter, adapter.features(batch))
            known = replace(known, edits_maps=_edits(maps, lambda x: self.predictions(adapter, x, batch)))
            parts = known.predictions(adapter, known.maps(adapter, adapter.features(batch)), batch)
        pairs = [(whole.logits, parts.logits), (whole.boxes, parts.boxes)]
        if not all(torch.allclose(a, b, equal_nan=True) for a, b in pairs):
            fix = "split the head where nothing behind it reads what came before"
            where = f"{type(adapter).__name__}, entry={self.entry}"
            raise DetectorError(problem("head_rest(head_stem()) to equal head()", "other predictions", where, fix))
        return known

    @property
    def pyramid(self) -> tuple[PyramidLevel, ...]:
        """The levels of one branch."""
        return self.levels[: len(self.levels) // len(self.branches)]

    def maps(self, adapter: DetectorAdapter, features: list[Tensor]) -> list[Tensor]:
        """The maps at this place, in the order of ``levels``; ``features`` stay as they are."""
        if self.entry == 0:
            return features
        stem = adapter.head_stem(_guarded(features, self.edits_features), self.entry)
        return [x for name in self.branches for x in stem[name]]

    def guarded(self, maps: list[Tensor]) -> list[Tensor]:
        """Copies of maps if what comes behind this place would edit them, else the maps."""
        return _guarded(maps, self.edits_maps)

    def predictions(self, adapter: DetectorAdapter, maps: list[Tensor], batch: Batch) -> DensePredictions:
        """What the head says from this place on; ``maps`` stay as they are."""
        maps = self.guarded(maps)
        if self.entry == 0:
            return adapter.head(maps, batch)
        n = len(maps) // len(self.branches)
        split = {name: maps[i * n : (i + 1) * n] for i, name in enumerate(self.branches)}
        return adapter.head_rest(split, self.entry, batch)


def _edits(maps: list[Tensor], run: Callable[[list[Tensor]], object]) -> bool:
    """Whether a computation edits the maps it is given."""
    versions = [x._version for x in maps]
    run(list(maps))
    return versions != [x._version for x in maps]


def _guarded(maps: Sequence[Tensor], edited: bool) -> list[Tensor]:
    """Copies for a head that would edit maps which others still need."""
    return [x.clone() for x in maps] if edited else list(maps)


@dataclass(frozen=True)
class Crossing:
    """A map that both detectors have: its place among the maps of each, and its channels in each."""

    student: int
    teacher: int
    student_channels: int
    teacher_channels: int


def cross_levels(student: Entrance, teacher: Entrance) -> list[Crossing]:
    """The maps of equal branch and stride.

    Raises:
        IncompatibleDetectorsError: The heads have other branches, or the pyramids share no stride.
    """
    if set(student.branches) != set(teacher.branches):
        got = f"student {list(student.branches)} and teacher {list(teacher.branches)}"
        fix = "enter at the feature pyramid, entry=0"
        raise IncompatibleDetectorsError(problem("heads of equal branches", got, f"entry={student.entry}", fix))
    places = {place: j for j, place in enumerate(_places(teacher))}
    crossings = [
        Crossing(i, places[place], student.levels[i].channels, teacher.levels[places[place]].channels)
        for i, place in enumerate(_places(student))
        if place in places
    ]
    if not crossings:
        own, others = [level.stride for level in student.pyramid], [level.stride for level in teacher.pyramid]
        got = f"student {own} and teacher {others}"
        fix = "build both on pyramids that share at least one level"
        raise IncompatibleDetectorsError(problem("a common stride in both pyramids", got, "feature levels", fix))
    return crossings


def _places(entrance: Entrance) -> list[tuple[str, float]]:
    """Branch and stride of every map."""
    n = len(entrance.pyramid)
    return [(entrance.branches[i // n], level.stride) for i, level in enumerate(entrance.levels)]


def check_branches(adapter: DetectorAdapter, weights: dict[str, float]) -> None:
    """Raise `IncompatibleDetectorsError` if a teacher's head lacks a branch whose term has a weight.

    Args:
        adapter: The teacher.
        weights: By the name of a field of `DensePredictions`.
    """
    needed = [name for name, weight in weights.items() if weight > 0]
    if needed:
        with adapter._probing() as batch:
            predictions = adapter.head(adapter.features(batch), batch)
        for name in needed:
            if getattr(predictions, name) is None:
                raise missing_branch(name, f"teacher {type(adapter).__name__}.head()")


def missing_branch(name: str, where: str) -> IncompatibleDetectorsError:
    """The error of a term that a head cannot give."""
    fix = f"leave {name}_weight at 0"
    return IncompatibleDetectorsError(problem(f"a head that predicts {name}", "none", where, fix))
