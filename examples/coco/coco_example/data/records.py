"""The images of an annotation file, packed: a few arrays that all processes of a machine share, however many there are.

G is the number of boxes of one image, N the number of boxes of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coco_example.data.values import Identifier

__all__ = ["ImageRecord", "ImageRecords"]


@dataclass(frozen=True)
class ImageRecord:
    """One image and its objects: ``boxes`` (G, 4) float32 xyxy pixels, ``labels`` (G,) int64 in 1..K.

    ``id`` is the file's own, a number of any size or a text; tensors hold the record's place in the index instead.
    """

    id: Identifier
    path: Path
    width: int
    height: int
    boxes: Tensor
    labels: Tensor


class ImageRecords(Sequence[ImageRecord]):
    """Records that are made when they are asked for.

    A forked process copies each page of memory in which it counts a reference, and COCO as Python objects is hundreds
    of megabytes of them. Arrays have no references inside, and stay one copy for all processes.

    Args:
        ids: Id of each image.
        paths: Where each is.
        sizes: Width and height of each.
        counts: Number G of boxes of each.
        boxes: (N, 4) float32 xyxy pixels, image after image.
        labels: (N,) int64.
    """

    def __init__(
        self,
        ids: Sequence[Identifier],
        paths: Iterable[Path],
        sizes: Sequence[tuple[int, int]],
        counts: Sequence[int],
        boxes: NDArray[np.float32],
        labels: NDArray[np.int64],
    ) -> None:
        self._ids = _Texts([f"{'i' if isinstance(i, int) else 's'}{i}" for i in ids])
        self._paths = _Texts(list(map(str, paths)))
        self._sizes = np.array(sizes, dtype=np.int64).reshape(-1, 2)
        self._stops = np.concatenate([[0], np.cumsum(np.asarray(counts, dtype=np.int64))])
        self._boxes, self._labels = boxes, labels

    def __len__(self) -> int:
        return len(self._sizes)

    @overload
    def __getitem__(self, i: int) -> ImageRecord: ...

    @overload
    def __getitem__(self, i: slice) -> tuple[ImageRecord, ...]: ...

    def __getitem__(self, i: int | slice) -> ImageRecord | tuple[ImageRecord, ...]:
        if isinstance(i, slice):
            return tuple(self[n] for n in range(*i.indices(len(self))))
        n = range(len(self))[i]
        width, height = self._sizes[n].tolist()
        objects = slice(*self._stops[n : n + 2].tolist())
        boxes, labels = torch.from_numpy(self._boxes[objects]), torch.from_numpy(self._labels[objects])
        identifier = self._ids[n]
        own = int(identifier[1:]) if identifier[0] == "i" else identifier[1:]
        return ImageRecord(own, Path(self._paths[n]), width, height, boxes, labels)

    def __iter__(self) -> Iterator[ImageRecord]:
        return map(self.__getitem__, range(len(self)))


class _Texts:
    """Texts in one array of bytes; half surrogates, as in paths that are no UTF-8, included."""

    def __init__(self, texts: Sequence[str]) -> None:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        self._stops = np.concatenate([[0], np.cumsum([len(text) for text in encoded], dtype=np.int64)])
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __getitem__(self, n: int) -> str:
        return self._bytes[slice(*self._stops[n : n + 2].tolist())].tobytes().decode("utf-8", "surrogatepass")
