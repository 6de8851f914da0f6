"""Read a COCO annotation file once, for training and scoring alike, and name the entry that is wrong with it.

N is the number of boxes of the file, crowds and degenerate ones included. K is the number of classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from coco_example.data.tables import Table, Tables, read_tables
from coco_example.data.values import (
    Identifier,
    key_of,
    order_of,
    read_flag,
    read_identifier,
    read_name,
    read_number,
    read_side,
    shown,
)
from coco_example.errors import DataError

__all__ = ["Annotations", "Category", "ImageEntry", "match_classes", "read_annotations"]

T = TypeVar("T")

# What is read of each entry, the polygons not.
_FIELDS = {
    "categories": ("id", "name", "supercategory"),
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("image_id", "category_id", "bbox", "area", "iscrowd"),
}


@dataclass(frozen=True)
class Category:
    """A class of objects, with the id and the name of the annotation file."""

    id: Identifier
    name: str

    def __str__(self) -> str:
        return f"{shown(self.name)} (id {shown(self.id)})"


class ImageEntry(NamedTuple):
    """One image of an annotation file, under the file's own id and name."""

    id: Identifier
    file_name: str
    width: int
    height: int


@dataclass(frozen=True, eq=False)
class Annotations:
    """Contents of an annotation file, its values as they were meant.

    Attributes:
        file: The file.
        categories: The K classes of labels 1..K: those of the run, or the file's own by ascending id.
        unknown: Further classes of the file that have boxes, of the labels from K + 1 on.
        images: In the order of the file.
        owner: (N,) int64, the place of each box's image in ``images``.
        label: (N,) int64.
        xywh: (N, 4) float64, as the file has them.
        area: (N,) float64, width times height where the file has none.
        crowd: (N,) bool.
        listed: Those of ``categories`` that the file has.
    """

    file: Path
    categories: tuple[Category, ...]
    unknown: tuple[Category, ...]
    images: tuple[ImageEntry, ...]
    owner: NDArray[np.int64]
    label: NDArray[np.int64]
    xywh: NDArray[np.float64]
    area: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    listed: tuple[Category, ...] = ()


def read_annotations(file: Path, classes: Sequence[Category] | None = None, *, progress: bool = False) -> Annotations:
    """Read a COCO instances file.

    Args:
        file: The JSON file.
        classes: Classes of the run; by default the file has its own, but for a super-category without boxes.
        progress: Whether to show a bar on a terminal while a large file is read.

    Raises:
        DataError: If the file is malformed, contradicts itself, or contradicts ``classes``.
    """
    # 1. Read categories, images and boxes.
    tables = read_tables(file, _FIELDS, progress=progress)
    own = _read_categories(tables, file)
    images = _read_images(tables, file)
    boxes = _Reader(tables, "annotations", file)
    owner = boxes.places("image_id", [image.id for image in images], "images")
    place = boxes.places("category_id", [category.id for category in own], "categories")
    corners = boxes.numbers("bbox", _read_box, "[x, y, width, height]", _plain_boxes).reshape(-1, 4)
    given = boxes.numbers("area", _read_area, "a number from 0 up", _plain_areas, optional=True)
    crowd = boxes.numbers("iscrowd", read_flag, "0 or 1", _plain_flags, optional=True)

    # 2. Number the classes: 1..K for those of the run, further ones behind.
    used = set(np.unique(place).tolist())
    true = [category for n, category in enumerate(own) if n in used or not _is_super(category, tables)]
    categories, further = match_classes(true, true if classes is None else classes, file)
    unknown = tuple(category for category in further if own.index(category) in used)
    label_of = {key_of(category.id): label for label, category in enumerate((*categories, *unknown), start=1)}
    label = [label_of.get(key_of(category.id), 0) for category in own]

    # 3. An area that the file lacks is the box's.
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity do occur in files
        products = corners[:, 2] * corners[:, 3]
    return Annotations(
        file,
        categories,
        unknown,
        images,
        owner,
        np.array(label, dtype=np.int64)[place],
        corners,
        np.where(np.isfinite(given), given, products),
        crowd.astype(bool),
        tuple(category for category in categories if category in own),
    )


def match_classes(
    own: Sequence[Category], classes: Sequence[Category], file: Path
) -> tuple[tuple[Category, ...], tuple[Category, ...]]:
    """Find the classes of a run among those of a file, by id and name.

    Returns:
        The run's classes, with the file's own ids where it has them, and the classes of the file that are not among
        them.

    Raises:
        DataError: An id has another name than in the run, or a name another id.
    """
    # 1. Look for contradictions.
    by_key = {key_of(category.id): category for category in own}
    known = {key_of(category.id): category for category in classes}
    named = {_folded(category): category for category in classes}
    pairs = [
        (category, known.get(key) or named[_folded(category)])
        for key, category in by_key.items()
        if (key in known and _folded(known[key]) != _folded(category))
        or (key not in known and _folded(category) in named)
    ]
    if pairs:
        raise DataError(
            expected=f"the classes of the run, {', '.join(str(theirs) for _, theirs in pairs[:3])}",
            got=f"{', '.join(str(mine) for mine, _ in pairs[:3])}{' and others' if len(pairs) > 3 else ''}",
            where=f"categories of {file}",
            fix="give both files the same ids and names, or export them together",
        )

    # 2. Take the ids of the file, which results are written with.
    matched = tuple(by_key.get(key_of(category.id), category) for category in classes)
    return matched, tuple(category for key, category in by_key.items() if key not in known)


def _folded(category: Category) -> str:
    return category.name.strip().casefold()


def _is_super(category: Category, tables: Tables) -> bool:
    """Whether a category only groups others, as the first one of Roboflow's exports does."""
    columns = tables["categories"].columns
    own = [read_identifier(value) == category.id for value in columns["id"]].index(True)
    others = columns["supercategory"][:own] + columns["supercategory"][own + 1 :]
    return columns["supercategory"][own] in (None, "", "none") and category.name in others


def _read_categories(tables: Tables, file: Path) -> list[Category]:
    """List the categories by ascending id."""
    table = _Reader(tables, "categories", file)
    ids = table.identifiers("id")
    names = table.column("name", read_name, "a text")
    if len({key_of(category) for category in ids}) < len(ids):
        raise DataError(
            expected="unique category ids",
            got="one that repeats",
            where=str(file),
            fix="merge or renumber the categories",
        )
    return sorted(map(Category, ids, names), key=lambda category: order_of(category.id))


def _read_images(tables: Tables, file: Path) -> tuple[ImageEntry, ...]:
    """List the images in the order of the file."""
    # 1. Read the table.
    table = _Reader(tables, "images", file)
    ids = table.identifiers("id")
    names = table.column("file_name", read_name, "a text")
    sides = [table.column(name, read_side, "a whole number of pixels") for name in ("width", "height")]

    # 2. Each id stands for one image.
    position: dict[Identifier, int] = {}
    for n, key in enumerate(map(key_of, ids)):
        if position.setdefault(key, n) != n:
            raise DataError(
                expected="unique image ids",
                got=f"{shown(key)} as in images[{position[key]}]",
                where=f"images[{n}] of {file}",
                fix="remove one of the two",
            )
    return tuple(map(ImageEntry, ids, names, *sides))


def _read_box(value: Any) -> list[float] | None:
    if not isinstance(value, list) or len(value) != 4:
        return None
    numbers = [number for number in map(read_number, value) if number is not None]
    return numbers if len(numbers) == 4 else None


def _read_area(value: Any) -> float | None:
    """Read an area; NaN where there is none."""
    if value is None or value == "":
        return float("nan")
    number = read_number(value)
    return None if number is None or number < 0 else number


def _plain_boxes(values: list[Any]) -> NDArray[np.float64] | None:
    if not set(map(type, values)) <= {list} or not set(map(len, values)) <= {4}:
        return None
    return _plain_numbers(list(chain.from_iterable(values)))


def _plain_areas(values: list[Any]) -> NDArray[np.float64] | None:
    numbers = _plain_numbers(values)
    return None if numbers is None or (numbers < 0).any() else numbers


def _plain_flags(values: list[Any]) -> NDArray[np.float64] | None:
    numbers = _plain_numbers(values)
    return None if numbers is None or not np.isin(numbers, (0, 1)).all() else numbers


def _plain_numbers(values: list[Any]) -> NDArray[np.float64] | None:
    """Make an array of numbers that are written as such; None if some are not, or are too large."""
    if not set(map(type, values)) <= {int, float}:
        return None
    try:
        return np.array(values, dtype=np.float64)
    except OverflowError:
        return None


class _Reader:
    """Reads one table of a file by columns: values that are plain all at once, any others one by one."""

    def __init__(self, tables: Tables, name: str, file: Path) -> None:
        table = tables.get(name)
        if not isinstance(table, Table):
            raise DataError(
                expected=f"a list under {name!r}", got=shown(table), where=str(file), fix="export as COCO instances"
            )
        self._columns, self._name, self._file = table.columns, name, file

    def column(self, name: str, read: Callable[[Any], T | None], meaning: str, *, optional: bool = False) -> list[T]:
        """Read one field of every entry; where an optional one is missing, ``read`` gets None."""
        values: list[T] = []
        for n, raw in enumerate(self._columns[name]):
            value = read(raw) if raw is not None or optional else None
            if value is None:
                raise self._error(n, f"{name!r} to be {meaning}", shown(raw), "complete or correct the entry")
            values.append(value)
        return values

    def numbers(
        self,
        name: str,
        read: Callable[[Any], Any],
        meaning: str,
        plain: Callable[[list[Any]], NDArray[np.float64] | None],
        *,
        optional: bool = False,
    ) -> NDArray[np.float64]:
        """Read one field of every entry as numbers, through ``plain`` where that takes all of them."""
        quick = plain(self._columns[name])
        return quick if quick is not None else np.array(self.column(name, read, meaning, optional=optional), np.float64)

    def identifiers(self, name: str) -> list[Identifier]:
        """Read a field that identifies an image or a category."""
        return self.column(name, read_identifier, "a whole number or a text")

    def places(self, name: str, ids: Sequence[Identifier], table: str) -> NDArray[np.int64]:
        """Find the ids in one field of every entry among those of another table."""
        # 1. Numbers are their own keys.
        place = {key_of(identifier): n for n, identifier in enumerate(ids)}
        raws = self._columns[name]
        found: list[int | None] = list(map(place.get, raws)) if set(map(type, raws)) == {int} else [None]

        # 2. Whatever else there is.
        if None in found:
            found = []
            for n, identifier in enumerate(self.identifiers(name)):
                found.append(place.get(key_of(identifier)))
                if found[-1] is None:
                    got = f"{name} {shown(identifier)}"
                    raise self._error(n, f"ids listed under {table}", got, "add what is missing there")
        return np.array(found, dtype=np.int64)

    def _error(self, n: int, expected: str, got: str, fix: str) -> DataError:
        return DataError(expected=expected, got=got, where=f"{self._name}[{n}] of {self._file}", fix=fix)
