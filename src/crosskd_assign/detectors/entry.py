"""Head entries: the point at which a detector's head is entered with another detector's maps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import Self

from ..errors import DetectorError, IncompatibleDetectorsError, OptionError
from ..structures import DensePredictions
from .base import DetectorAdapter, PyramidLevel
from .probing import Probe, edited, evaluation_mode

__all__ = ["BranchEntry", "HeadEntry", "PyramidEntry", "measure_entry"]


@dataclass(frozen=True)
class HeadEntry(ABC):
    """A split point of a head: what runs before it, and what runs behind it.

    Holds no reference to the adapter, so that it can be copied and pickled with the distiller while the teacher cannot.

    Attributes:
        branches: Names of the head's branches there, in the order of the maps.
        levels: Channels and stride of each map: all levels of the first branch, then of the second, and so on.
        edits_features: Whether the part before it begins with an in-place operation.
        edits_maps: Whether the part behind it does.
    """

    branches: tuple[str, ...]
    levels: tuple[PyramidLevel, ...]
    edits_features: bool
    edits_maps: bool

    @property
    def pyramid(self) -> tuple[PyramidLevel, ...]:
        """The levels of one branch."""
        return self.levels[: len(self.levels) // len(self.branches)]

    @property
    def names(self) -> list[tuple[str, float]]:
        """Branch and stride of every map."""
        n = len(self.pyramid)
        return [(self.branches[i // n], level.stride) for i, level in enumerate(self.levels)]

    @property
    @abstractmethod
    def convolutions(self) -> int:
        """How many convolutions of the head run before it."""

    @abstractmethod
    def maps(self, adapter: DetectorAdapter, features: list[Tensor]) -> list[Tensor]:
        """Compute the maps at this entry, in the order of ``levels``. ``features`` are not modified."""

    def predict(self, adapter: DetectorAdapter, maps: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        """Run what lies behind this entry. ``maps`` are not modified."""
        return self._predict(adapter, _guard(maps, edits=self.edits_maps), image_size)

    @abstractmethod
    def _predict(
        self, adapter: DetectorAdapter, maps: list[Tensor], image_size: tuple[int, int]
    ) -> DensePredictions: ...


@dataclass(frozen=True)
class PyramidEntry(HeadEntry):
    """The beginning of a head: every head has it."""

    @classmethod
    def unmeasured(cls, *, edits_maps: bool) -> Self:
        """Build the entry of a detector that is compared with no other, so that its levels do not matter."""
        return cls(("pyramid",), (), edits_features=False, edits_maps=edits_maps)

    @property
    def convolutions(self) -> int:
        """None."""
        return 0

    def maps(self, adapter: DetectorAdapter, features: list[Tensor]) -> list[Tensor]:
        """Return the pyramid itself."""
        return features

    def _predict(self, adapter: DetectorAdapter, maps: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        return adapter.head(maps, image_size)


@dataclass(frozen=True)
class BranchEntry(HeadEntry):
    """Behind the first ``k`` convolutions of every branch of a head."""

    k: int

    @property
    def convolutions(self) -> int:
        """How many convolutions of the head run before it."""
        return self.k

    def maps(self, adapter: DetectorAdapter, features: list[Tensor]) -> list[Tensor]:
        """Run the first part of the head."""
        stem = adapter.head_stem(_guard(features, edits=self.edits_features), self.k)
        return [x for name in self.branches for x in stem[name]]

    def _predict(self, adapter: DetectorAdapter, maps: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        n = len(maps) // len(self.branches)
        split = {name: maps[i * n : (i + 1) * n] for i, name in enumerate(self.branches)}
        return adapter.head_rest(split, self.k, image_size)


def measure_entry(adapter: DetectorAdapter, k: int, probe: Probe, role: str) -> HeadEntry:
    """Measure the entry behind the first ``k`` convolutions of a detector's head; 0 for its beginning.

    Args:
        adapter: The detector.
        k: How many convolutions further in than the feature pyramid.
        probe: The detector run on a blank image.
        role: "student" or "teacher", for messages.

    Raises:
        OptionError: ``k`` is no natural number.
        IncompatibleDetectorsError: The head cannot be split there.
        DetectorError: Its parts return other maps than they should, or predict something else than the whole.
    """
    if not isinstance(k, int) or k < 0:
        raise OptionError(
            expected="entry of 0 or more convolutions",
            got=repr(k),
            where="constructor argument",
            fix="0 enters at the feature pyramid, k behind the first k convolutions of the head",
        )
    if k == 0:
        return PyramidEntry(("pyramid",), probe.levels, edits_features=False, edits_maps=probe.edits_features)
    return _measure_branches(adapter, k, probe, f"{role} {type(adapter).__name__}")


def _measure_branches(adapter: DetectorAdapter, k: int, probe: Probe, where: str) -> BranchEntry:
    if k > adapter.max_entry:
        deepest = adapter.max_entry
        raise IncompatibleDetectorsError(
            expected=f"entry of at most {deepest}" if deepest else "entry of 0, because this head cannot be split",
            got=f"{k}",
            where=where,
            fix="choose a smaller entry" if deepest else "leave entry at 0, or write head_stem() for it",
        )
    with evaluation_mode(adapter):
        # 1. The first part, on copies: does it edit what it is given, and does it return a map for every level?
        given = [x.clone() for x in probe.features]
        versions = [x._version for x in given]
        stem = adapter.head_stem(given, k)
        edits_features = edited(given, versions)
        maps = [x for branch in stem.values() for x in branch]
        if not stem or [x.shape[-2:] for x in maps] != [x.shape[-2:] for x in probe.features] * len(stem):
            raise DetectorError(
                expected=f"{len(probe.features)} maps for each branch",
                got=f"{ {name: [tuple(x.shape) for x in branch] for name, branch in stem.items()} }",
                where=f"{where}.head_stem()",
                fix="return for every branch one map a level, of the level's size",
            )
        levels = (PyramidLevel(x.shape[1], s) for x, s in zip(maps, probe.strides * len(stem), strict=True))
        entry = BranchEntry(tuple(stem), tuple(levels), edits_features, edits_maps=False, k=k)

        # 2. The second part, on what the first returned: does it edit that?
        versions = [x._version for x in maps]
        parts = entry.predict(adapter, maps, probe.image_size)
        entry = replace(entry, edits_maps=edited(maps, versions))

    # 3. Both together have to predict what the whole head predicts.
    pairs = [(probe.predictions.logits, parts.logits), (probe.predictions.boxes, parts.boxes)]
    if not all(torch.allclose(a, b, equal_nan=True) for a, b in pairs):
        raise DetectorError(
            expected="head_rest(head_stem()) to equal head()",
            got="other predictions",
            where=f"{where}, entry={k}",
            fix="split the head where nothing behind it reads what came before",
        )
    return entry


def _guard(maps: Sequence[Tensor], *, edits: bool) -> list[Tensor]:
    """Copy maps for a head that would edit them while others still need them."""
    return [x.clone() for x in maps] if edits else list(maps)
