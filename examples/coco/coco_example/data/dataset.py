"""Load the images and targets of a COCO index, with random numbers that depend on nothing but seed, epoch and index.

Boxes are ``xyxy`` float32 pixels of the stored image. Labels run from 1 to K in the order of the index's categories;
0 is the background, as in torchvision. G is the number of boxes of one image, H and W its height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from coco_example.data.augmentation import GREY, TIDY
from coco_example.data.pictures import read_picture
from coco_example.data.reader import CocoIndex
from coco_example.data.sampler import Key

Target: TypeAlias = dict[str, Tensor]


@dataclass(eq=False)
class CocoDataset(Dataset[tuple[Tensor, Target]]):
    """The images and targets of an index; item ``(epoch, i)`` is the same in any process and in any order.

    An item is an image (3, H, W) float32 RGB in 0..1 and a target of plain tensors: ``boxes`` (G, 4) float32 xyxy
    pixels, ``labels`` (G,) int64, ``image_id`` () int64: the place of its record in the index, because the file's own
    id may be a text or larger than any int64. A plain index ``i`` stands for ``(0, i)``. An item
    ``(epoch, i, side)`` is transformed by ``scaled[side]`` instead.
    """

    index: CocoIndex = field(repr=False)
    transform: v2.Transform | None = None  # of (image, target), such as `augmentation` returns
    _: KW_ONLY
    seed: int = 0  # not negative; starts all random numbers of an item, together with its epoch and index
    cache: bool = False  # keep decoded images (uint8) in memory, in each worker process: for small sets
    scaled: Mapping[int, v2.Transform] = field(default_factory=dict)  # transforms for batches of a size of their own
    mosaic: float = 0.0  # probability of joining an image with three others; the first one's image_id stays
    stream: tuple[int, ...] = ()  # starts them, too: another set of the same seed draws other numbers
    _decoded: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.index.records)

    def __getitem__(self, key: int | Key) -> tuple[Tensor, Target]:
        epoch, i, *side = key if isinstance(key, tuple) else (0, key)
        transform = self.scaled[side[0]] if side else self.transform
        with torch.random.fork_rng(devices=[]):
            # 1. Seed. Not with torch.manual_seed: it would also reseed the accelerators, which are not restored.
            state = np.random.SeedSequence((self.seed, epoch, i, *self.stream)).generate_state(1, np.uint64)
            torch.default_generator.manual_seed(int(state[0]))
            # 2. Load one image, or four as a mosaic.
            join = torch.rand(()).item() < self.mosaic
            image, target = self._join(i) if join else self._load(i)
            # 3. Augment.
            if transform is not None:
                image, target = transform(image, target)
        # 4. Return plain tensors, pixels in 0..1.
        pixels = v2.functional.to_dtype(image.as_subclass(Tensor).contiguous(), torch.float32, scale=True)
        return pixels, {name: value.as_subclass(Tensor) for name, value in target.items()}

    def _load(self, i: int) -> tuple[Tensor, Target]:
        record = self.index.records[i]
        pixels = self._decoded.get(i)
        if pixels is None:
            pixels = read_picture(record.path, (record.width, record.height))
        if self.cache:
            self._decoded[i] = pixels
        return _sample(pixels, record.boxes.clone(), record.labels.clone(), i)

    def _join(self, i: int) -> tuple[Tensor, Target]:
        """Join image i, upper left, with three random ones around a point, and crop a window as large as one image."""
        # 1. Load the four and make room for the largest, four times.
        parts = [self._load(j) for j in (i, *torch.randint(len(self), (3,)).tolist())]
        height, width = (max(sides) for sides in zip(*(image.shape[-2:] for image, _ in parts), strict=True))
        canvas = torch.full((3, 2 * height, 2 * width), GREY, dtype=torch.uint8)
        # 2. Place each with a corner at the centre of the canvas; its boxes move along.
        for n, (image, target) in enumerate(parts):
            h, w = image.shape[-2:]
            y, x = (height - h, height)[n // 2], (width - w, width)[n % 2]
            canvas[:, y : y + h, x : x + w] = image
            target["boxes"] += torch.tensor([x, y, x, y])
        # 3. Crop.
        boxes, labels = (torch.cat([target[name] for _, target in parts]) for name in ("boxes", "labels"))
        joined = _sample(canvas, boxes, labels, i)
        window: tuple[Tensor, Target] = v2.Compose([v2.RandomCrop((height, width)), *TIDY])(*joined)
        return window


def _sample(image: Tensor, boxes: Tensor, labels: Tensor, image_id: int) -> tuple[Tensor, Target]:
    wrapped = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(image.shape[-2:]))
    return tv_tensors.Image(image), {"boxes": wrapped, "labels": labels, "image_id": torch.tensor(image_id)}


@dataclass(frozen=True, eq=False)
class MixedDataset(Dataset[tuple[Tensor, "Target | None"]]):
    """Images with labels, and behind them images without, whose target is None.

    Both are augmented alike. A mosaic joins images of one kind.
    """

    labelled: CocoDataset
    unlabelled: CocoDataset

    def __len__(self) -> int:
        return len(self.labelled) + len(self.unlabelled)

    def __getitem__(self, key: Key) -> tuple[Tensor, Target | None]:
        epoch, i, *side = key
        if i < len(self.labelled):
            return self.labelled[key]
        image, _ = self.unlabelled[(epoch, i - len(self.labelled), *side)]
        return image, None


def collate(batch: Sequence[tuple[Tensor, Target | None]]) -> tuple[list[Tensor], list[Target | None]]:
    """Split items into a list of images and a list of targets, as torchvision's detectors take them."""
    return [image for image, _ in batch], [target for _, target in batch]
