"""Training data of COCO format: augmentation that repeats itself, batches that resume.

Boxes are ``xyxy`` float32 pixels of the stored image. Labels run from 1 to K in ascending category id order; 0 is
the background, as in torchvision. G is the number of boxes of one image, H and W its height and width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

import numpy as np
import torch
from coco_reader import CocoIndex, ImageRecord, problem
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2

Level = Literal["none", "flip", "crop", "full"]
Target = dict[str, Tensor]
Key = tuple[int, int]  # epoch, index

_GREY = 114  # around pictures smaller than their frame: near ImageNet's mean, so about 0 when normalised
_TIDY = (v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=2))


@dataclass(eq=False)
class CocoDataset(Dataset[tuple[Tensor, Target]]):
    """The images and targets of an index; item ``(epoch, i)`` is the same in any process and in any order.

    An item is an image (3, H, W) float32 RGB in 0..1 and a target of plain tensors: ``boxes`` (G, 4) float32 xyxy
    pixels, ``labels`` (G,) int64, ``image_id`` () int64. A plain index ``i`` stands for ``(0, i)``.
    """

    index: CocoIndex = field(repr=False)
    transform: v2.Transform | None = None  # of (image, target), such as `augmentation` gives
    _: KW_ONLY
    seed: int = 0  # not negative; starts all random numbers of an item, together with its epoch and index
    cache: bool = False  # keep decoded images (uint8) in memory, in each worker process: for small sets
    mosaic: float = 0.0  # probability of joining an image with three others; the first one's image_id stays
    _decoded: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.index.records)

    def __getitem__(self, key: int | Key) -> tuple[Tensor, Target]:
        epoch, i = key if isinstance(key, tuple) else (0, key)
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed: it would also reseed the accelerators, which are not restored afterwards.
            state = np.random.SeedSequence((self.seed, epoch, i)).generate_state(1, np.uint64)
            torch.default_generator.manual_seed(int(state[0]))
            join = torch.rand(()).item() < self.mosaic
            image, target = self._join(i) if join else self._load(i)
            if self.transform is not None:
                image, target = self.transform(image, target)
        pixels = v2.functional.to_dtype(image.as_subclass(Tensor).contiguous(), torch.float32, scale=True)
        return pixels, {name: value.as_subclass(Tensor) for name, value in target.items()}

    def _load(self, i: int) -> tuple[Tensor, Target]:
        record = self.index.records[i]
        pixels = self._decoded.get(i)
        if pixels is None:
            pixels = _decode(record)
        if self.cache:
            self._decoded[i] = pixels
        return _sample(pixels, record.boxes.clone(), record.labels.clone(), record.id)

    def _join(self, i: int) -> tuple[Tensor, Target]:
        """Four images around a point, seen through a window as large as one; image i is the upper left one."""
        parts = [self._load(j) for j in (i, *torch.randint(len(self), (3,)).tolist())]
        height, width = (max(sides) for sides in zip(*(image.shape[-2:] for image, _ in parts), strict=True))
        canvas = torch.full((3, 2 * height, 2 * width), _GREY, dtype=torch.uint8)
        for n, (image, target) in enumerate(parts):
            h, w = image.shape[-2:]
            y, x = (height - h, height)[n // 2], (width - w, width)[n % 2]
            canvas[:, y : y + h, x : x + w] = image
            target["boxes"] += torch.tensor([x, y, x, y])
        boxes, labels = (torch.cat([target[name] for _, target in parts]) for name in ("boxes", "labels"))
        joined = _sample(canvas, boxes, labels, self.index.records[i].id)
        window: tuple[Tensor, Target] = v2.Compose([v2.RandomCrop((height, width)), *_TIDY])(*joined)
        return window


def _sample(image: Tensor, boxes: Tensor, labels: Tensor, image_id: int) -> tuple[Tensor, Target]:
    wrapped = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(image.shape[-2:]))
    return tv_tensors.Image(image), {"boxes": wrapped, "labels": labels, "image_id": torch.tensor(image_id)}


def _decode(record: ImageRecord) -> Tensor:
    """The stored pixels (3, H, W) uint8 RGB; an orientation tag is not obeyed, since boxes refer to stored pixels."""
    try:
        with Image.open(record.path) as image:
            mode = image.mode
            # A palette with transparency would warn on its direct way to RGB.
            rgb = image.convert("RGBA").convert("RGB") if mode == "P" else image.convert("RGB")
    except Exception as error:  # damaged files raise nearly anything
        raise problem("a readable image", repr(error), str(record.path), "replace the file") from error
    if mode[0] in "IF":  # 16 or 32 bits, of which the conversion to RGB leaves white
        raise problem("8 bits per channel", f"mode {mode}", str(record.path), "convert the file")
    if rgb.size != (record.width, record.height):
        got = f"{rgb.width}×{rgb.height}"
        fix = "save it at the annotated size, with its orientation tag applied if it has one"
        raise problem(f"{record.width}×{record.height} pixels", got, str(record.path), fix)
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous()  # colour jitter is 4 times slower on a view


def augmentation(size: int, level: Level, short_side: int = 0) -> v2.Transform:
    """A transform of (image, target) whose pictures have no side longer than ``size`` pixels.

    ``"none"`` makes the longer side that long. ``"flip"`` also mirrors half of the images. ``"crop"`` instead scales
    that by 0.5 to 1.5 and takes a random square, grey where the image ends. ``"full"`` scales by 0.3 to 2 and changes
    colours as well; it goes well with ``CocoDataset(mosaic=0.5)``. Boxes are clipped to the picture; those thinner
    than 2 pixels go, together with their labels. With ``short_side``, images of the first two levels become as large
    as they can with no shorter side above it.
    """
    steps: list[v2.Transform] = [] if level == "none" else [v2.RandomHorizontalFlip()]
    if level in ("none", "flip"):
        # Leaves an image of that size alone.
        steps.append(v2.Resize(size=[short_side] if short_side else None, max_size=size))
    else:
        scales = (0.5, 1.5) if level == "crop" else (0.3, 2.0)
        steps.append(v2.ScaleJitter((size, size), scales))
        steps.append(v2.RandomCrop((size, size), pad_if_needed=True, fill=_GREY))
    if level == "full":
        steps.append(v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.6))  # a hue would triple the time
    return v2.Compose([*steps, *_TIDY])


@dataclass(frozen=True)
class ResumableSampler(Sampler[list[Key]]):
    """Endless batches of ``(epoch, index)`` keys, for ``DataLoader(dataset, batch_sampler=…, collate_fn=collate)``.

    Batch k depends on the arguments and k alone: with ``start_batch=k``, a resumed run goes on as if it had not
    stopped. All ranks cut one permutation per epoch, and global batch k stays the same while
    ``batch_size * world_size`` does. What does not fill a batch is left out of its epoch; a set smaller than one
    global batch is repeated to fill it.
    """

    length: int  # images
    batch_size: int  # images per batch and rank
    _: KW_ONLY
    seed: int = 0  # not negative
    rank: int = 0
    world_size: int = 1
    start_batch: int = 0  # batches already done since the training began

    def __post_init__(self) -> None:
        if self.length < 1 or self.batch_size < 1 or not 0 <= self.rank < self.world_size or self.start_batch < 0:
            raise problem("at least one image and a rank below world_size", str(self), "sampler", "check the arguments")

    @property
    def batches_per_epoch(self) -> int:
        """Batches that each rank gets of one permutation."""
        return max(1, self.length // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[Key]]:
        first, done = divmod(self.start_batch, self.batches_per_epoch)
        for epoch in itertools.count(first):
            order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
            batches = np.resize(order, (self.batches_per_epoch, self.world_size, self.batch_size))[:, self.rank]
            for batch in batches[done:].tolist():
                yield [(epoch, i) for i in batch]
            done = 0


def collate(batch: Sequence[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """Turns items into a list of images and a list of targets, as torchvision's detectors take them."""
    return [image for image, _ in batch], [target for _, target in batch]
