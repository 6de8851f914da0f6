"""Find pictures and annotations of a split in the folders as COCO, Roboflow, CVAT, Label Studio and FiftyOne have them.

A split has its own annotation file and its own folder of pictures, which file names are relative to.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PureWindowsPath
from typing import Literal, TypeAlias

from coco_example.data.pictures import is_picture
from coco_example.data.values import shown
from coco_example.errors import DataError

__all__ = ["Split", "find_pictures", "locate_split"]

Split: TypeAlias = Literal["train", "val", "test"]

_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train2017", "train", "Train"),
    "val": ("val2017", "val", "valid", "Validation"),
    "test": ("test2017", "test", "Test"),
}
# Annotation file and picture folder of a split that is called {}.
_LAYOUTS = (
    ("annotations/instances_{}.json", "{}"),  # COCO
    ("annotations/instances_{}.json", "images/{}"),  # CVAT
    ("{}/_annotations.coco.json", "{}"),  # Roboflow
    ("{}/labels.json", "{}/data"),  # FiftyOne
    ("{}/annotations/instances_default.json", "{}/images/default"),  # one export of CVAT a split
    ("{}/result.json", "{}/images"),  # one export of Label Studio a split
)
# An export that is not divided into splits: the program, its annotation file and picture folder.
_UNDIVIDED = (
    ("CVAT", "annotations/instances_default.json", "images/default"),
    ("CVAT", "annotations/instances_default.json", "images"),
    ("Label Studio", "result.json", "images"),
    ("Roboflow", "_annotations.coco.json", ""),
    ("FiftyOne", "labels.json", "data"),
)


def locate_split(
    root: Path, split: Split, annotations: str | None = None, images: str | None = None
) -> tuple[Path, Path]:
    """Find a split's picture folder and annotation file below ``root``.

    Args:
        root: The folder of the data set.
        split: Which one. An export that is not divided is all training.
        annotations: The annotation file to use instead, in ``root/annotations``, in ``root`` or anywhere.
        images: The picture folder to use instead, in ``root`` or anywhere.

    Raises:
        DataError: If no known layout is there; names what was tried, or the option that would help.
    """
    # 1. What is asked for by name.
    given = _first(root / images, Path(images)) if images else None
    if annotations:
        file = _first(root / "annotations" / annotations, root / annotations, Path(annotations))
        return given or _pictures_beside(file, root, split), file

    # 2. What has a usual place.
    layouts = [
        (given or root / pictures.format(name), root / file.format(name))
        for file, pictures in _LAYOUTS
        for name in _NAMES[split]
    ]
    for folder, file in layouts:
        if folder.is_dir() and file.is_file():
            return folder, file

    # 3. An export that has no splits.
    for program, name, pictures in _UNDIVIDED:
        folder, file = given or root / pictures, root / name
        if folder.is_dir() and file.is_file():
            if split == "train":
                return folder, file
            raise DataError(
                expected=f"an annotation file of the {split} split",
                got=f"one export of {program} that is not divided, {name}",
                where=str(root),
                fix=f"name a {split} split: train.py with --val-annotations FILE --val-images FOLDER, evaluate.py with "
                "--annotations FILE --images FOLDER, or with --split train for this one",
            )
    raise _nothing_there(layouts[:2], split)


def _first(*paths: Path) -> Path:
    """Choose the first path that is there; the very first if none is."""
    return next((path for path in paths if path.exists()), paths[0])


def _pictures_beside(file: Path, root: Path, split: Split) -> Path:
    """Choose the picture folder of an annotation file that was named: where its export is, or by the split's name."""
    export = file.parent.parent if file.parent.name == "annotations" else file.parent
    places = [f"{part}{name}" for part in ("", "images/") for name in _NAMES[split]]
    folders = [export / place for place in (*places, "images/default", "images", "data")]
    if not (export.is_dir() and any(is_picture(path) for path in export.iterdir())):
        folders += [root / place for place in places]
    return _first(*(folder for folder in folders if folder.is_dir()), export)


def _nothing_there(layouts: Sequence[tuple[Path, Path]], split: Split) -> DataError:
    tried = [f"{path}{'' if path.exists() else ' (missing)'}" for pair in layouts for path in pair]
    pairs = [f"{folder} with {file}" for folder, file in zip(tried[::2], tried[1::2], strict=True)]
    return DataError(
        expected="an image folder and its annotation file",
        got=", and ".join(pairs),
        where=f"{split} split",
        fix="name the folder that holds both, as COCO, Roboflow, CVAT, Label Studio or FiftyOne lay it out; or both of "
        f"them: train.py with --{split}-annotations and --{split}-images, evaluate.py with --annotations and --images",
    )


def find_pictures(folder: Path, names: Sequence[str], file: Path) -> list[Path]:
    """Find the pictures of an annotation file, without opening any.

    Names may have the separators of any system, and begin with the name of ``folder`` itself. Where no file has the
    very name, one counts that differs in capitals or in how accents are composed, and then one of the same last part:
    the rest may be a path of the system that wrote it.

    Raises:
        DataError: If a name leads out of ``folder`` to a picture that is not in it, or a picture is missing.
    """
    # 1. Find each picture by its path, unless that leads out of the folder.
    listing = _Listing(folder)
    pures = [PureWindowsPath(name) for name in names]  # knows the separators of every system
    outside = [bool(pure.anchor) or ".." in pure.parts for pure in pures]
    found = [
        None if out else listing.find(name, pure.parts) for name, pure, out in zip(names, pures, outside, strict=True)
    ]

    # 2. Find the others by the last part of their paths, if each of them is another one.
    last = [
        listing.find(pure.name, (pure.name,)) if path is None else path for pure, path in zip(pures, found, strict=True)
    ]
    claims = Counter(last)
    found = [path if path is not None or claims[other] > 1 else other for path, other in zip(found, last, strict=True)]

    # 3. Name those that are not there.
    for n, path in enumerate(found):
        if path is None and outside[n]:
            raise DataError(
                expected=f"file_name to stay inside {folder}",
                got=shown(names[n]),
                where=f"images[{n}] of {file}",
                fix="make it relative to that folder",
            )
    missing = [f"{name:.100}" for name, path in zip(names, found, strict=True) if path is None]
    if missing:
        raise DataError(
            expected="every image to be on disk",
            got=f"{len(missing)} missing: {', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}",
            where=str(folder),
            fix="complete the folder, or name the right one with --train-images, --val-images or --images",
        )
    return [path for path in found if path is not None]


class _Listing:
    """The files below a folder; a listing per folder is much faster than a look at every file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[Path, dict[str, Path]] = {}
        self._alike: dict[Path, dict[str, Path | None]] = {}

    def find(self, name: str, parts: tuple[str, ...]) -> Path | None:
        """Find a file by its name as it stands, or by the parts of its path, which may repeat those of the folder."""
        repeated = [n for n in range(1, len(parts)) if self._folder.parts[-n:] == parts[:n]]
        ways = [Path(name), Path(*parts), *(Path(*parts[n:]) for n in repeated)]
        exact = (self._files_in(way.parent).get(way.name) for way in ways)
        alike = (self._alike_in(way.parent).get(_folded(way.name)) for way in ways)
        return next(filter(None, exact), None) or next(filter(None, alike), None)

    def _files_in(self, place: Path) -> dict[str, Path]:
        if place not in self._files:
            folder = self._folder / place
            self._files[place] = {path.name: path for path in folder.iterdir()} if folder.is_dir() else {}
        return self._files[place]

    def _alike_in(self, place: Path) -> dict[str, Path | None]:
        """List the files by what is left of their names; None where several are left with the same."""
        if place not in self._alike:
            alike: dict[str, Path | None] = {}
            for name, path in self._files_in(place).items():
                alike[_folded(name)] = None if _folded(name) in alike else path
            self._alike[place] = alike
        return self._alike[place]


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
