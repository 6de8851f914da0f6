"""Pictures that an exported file is calibrated on or checked with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms import v2

from coco_example.data.layouts import locate_split
from coco_example.data.pictures import is_picture, read_picture
from coco_example.errors import DataError, RunError
from coco_example.files import read_json
from crosskd_assign.errors import CrossKDError

__all__ = ["find_pictures", "prepared_pictures", "validation_folder"]


def find_pictures(folder: Path, limit: int) -> list[Path]:
    """List pictures in a tree, at most ``limit``, evenly spread over all that are there.

    Raises:
        DataError: There is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise DataError(expected="a folder of pictures", got="no such folder", where=f"{folder}", fix="check the path")
    found = sorted(path for path in folder.rglob("*") if is_picture(path) and path.is_file())
    if not found:
        raise DataError(
            expected="pictures",
            got="none, in no folder below",
            where=f"{folder}",
            fix="put some tens of pictures there",
        )
    count = min(limit, len(found))
    return [found[i * len(found) // count] for i in range(count)]


def validation_folder(run: Path) -> Path:
    """Find the validation pictures that a run was evaluated on.

    Raises:
        RunError: They are not there any more.
    """
    try:
        config = read_json(run / "config.json")
        folder, _ = locate_split(
            Path(str(config["data_path"])), "val", config.get("val_annotations"), config.get("val_images")
        )
    except (CrossKDError, OSError, KeyError) as error:
        raise RunError(
            expected="the run's validation pictures, to check the file with",
            got="none where its config.json says",
            where=f"{run}",
            fix="name a folder of pictures with --check",
        ) from error
    return folder


def prepared_pictures(
    paths: Sequence[Path], prepare: Callable[[Tensor], tuple[Tensor, tuple[int, int]]]
) -> list[Tensor]:
    """Read pictures and bring them to what an exported file takes.

    Args:
        paths: The pictures.
        prepare: Resizes and pads, such as `OnnxDetector.prepare`.

    Raises:
        DataError: One is no readable picture.
    """
    images = (v2.functional.to_dtype(read_picture(path), torch.float32, scale=True) for path in paths)
    return [prepare(image)[0] for image in images]
