"""Decode pictures, in one way for training, evaluation and prediction.

Orientation tags are ignored: boxes refer to stored pixels. H and W are the stored height and width.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coco_example.errors import DataError, first_line

__all__ = ["check_pictures", "is_picture", "picture_sizes", "pictures_below", "read_picture"]

_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

# Pillow refuses large pictures lest a small file fill the memory. Here the header has to agree with the annotated size
# before a pixel is decoded; a picture without one must stay below Pillow's own limit.
_MOST_PIXELS = 178_956_970
Image.MAX_IMAGE_PIXELS = None

_THREADS = 8  # reading headers waits for the disk, and decoding leaves Python free
_HUGE = 50_000_000  # pixels; several at a time might fill the memory


def is_picture(path: Path) -> bool:
    """Whether a file is called a picture, and is not hidden, as the notes that macOS leaves beside files are."""
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")


def pictures_below(folder: Path) -> list[Path]:
    """List the pictures in any tree below a folder, sorted by their paths in it.

    Hidden files and folders are left out. Links are followed, and a folder that several lead to is listed once.

    Raises:
        OSError: A folder cannot be read.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(place)  # a link may lead back up
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        paths = () if real in seen else map(Path(place).joinpath, files)
        found += [path for path in paths if is_picture(path) and path.is_file()]
        seen.add(real)
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _raise(error: OSError) -> None:
    raise error


def picture_sizes(paths: Sequence[Path]) -> list[tuple[int, int] | DataError]:
    """Read width and height of pictures from their headers, or else what is wrong with each."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(_size_or_error, paths))


def _size_or_error(path: Path) -> tuple[int, int] | DataError:
    try:
        return _check_file(path, None)
    except DataError as error:
        return error


def read_picture(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """Decode the stored pixels, (3, H, W) uint8 RGB.

    Args:
        path: The file.
        size: Annotated width and height, which it must have.

    Raises:
        DataError: If it is no readable picture, has more than 8 bits a channel, or another size.
    """
    try:
        with Image.open(path) as image:
            _check_header(image, path, size)
            announced = image.size
            # A palette with transparency would warn on its direct way to RGB.
            rgb = image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB")
    except DataError:
        raise
    except Exception as error:  # damaged files raise nearly anything
        raise _unreadable(path, error) from error
    if rgb.size != announced:
        raise _other_size(path, announced, rgb.size)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()  # colour jitter is 4 times slower on a view


def check_pictures(paths: Sequence[Path], sizes: Sequence[tuple[int, int]], *, decode: bool = False) -> None:
    """Check that pictures have their annotated sizes, by their headers alone or by decoding them as well.

    Raises:
        DataError: The first that `read_picture` would raise.
    """
    check = read_picture if decode else _check_file
    huge = decode and any(width * height > _HUGE for width, height in sizes)
    with ThreadPoolExecutor(1 if huge else _THREADS) as pool:
        try:
            for _ in pool.map(check, paths, sizes):
                pass
        finally:
            pool.shutdown(cancel_futures=True)  # after one that is wrong, the others need no look


def _check_file(path: Path, size: tuple[int, int] | None) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            _check_header(image, path, size)
            return image.size
    except DataError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error


def _check_header(image: Image.Image, path: Path, size: tuple[int, int] | None) -> None:
    """Refuse what would come out wrong, before it takes time and memory."""
    if size is not None and image.size != size:
        raise _other_size(path, size, image.size)
    if size is None and image.width * image.height > _MOST_PIXELS:
        raise DataError(
            expected=f"at most {_MOST_PIXELS:,} pixels",
            got=f"{image.width}×{image.height}",
            where=str(path),
            fix="cut it into parts, or make it smaller",
        )
    if image.mode[0] in "IF":  # 16 or 32 bits, of which the conversion to RGB leaves white
        raise DataError(
            expected="8 bits per channel", got=f"mode {image.mode}", where=str(path), fix="convert the file"
        )


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(expected="a readable image", got=first_line(error), where=str(path), fix="replace or remove it")


def _other_size(path: Path, expected: tuple[int, int], got: tuple[int, int]) -> DataError:
    return DataError(
        expected=f"{expected[0]}×{expected[1]} pixels",
        got=f"{got[0]}×{got[1]}",
        where=str(path),
        fix="save it at the annotated size, with its orientation tag applied if it has one",
    )
