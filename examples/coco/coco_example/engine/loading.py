"""Load the images of a training run in the order of its steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from coco_example.data.augmentation import augmentation, scaled_augmentations
from coco_example.data.dataset import CocoDataset, Target
from coco_example.data.reader import CocoIndex
from coco_example.data.sampler import ResumableSampler
from coco_example.engine.distributed import Worker
from coco_example.engine.loaders import loaded
from coco_example.options import Options

__all__ = ["TrainingData"]


class TrainingData:
    """The batches of one process: the same after a stop as without it.

    Args:
        options: The run's.
        index: Images to train on.
        worker: This process.

    Attributes:
        dataset: The images, augmented.
        steps_per_epoch: Batches that each process gets in one epoch.
    """

    def __init__(self, options: Options, index: CocoIndex, worker: Worker) -> None:
        self._options, self._worker = options, worker
        data, model = options.dataset, options.model
        self.dataset = CocoDataset(
            index,
            augmentation(model.size, data.augmentation, model.short_side),
            seed=options.seed,
            cache=data.cache,
            mosaic=data.mosaic,
            scaled=scaled_augmentations(model.size, data.augmentation, model.short_side) if data.multi_scale else {},
        )
        # Each process that loads would keep a copy of the images.
        self._workers = 0 if data.cache and data.workers < 0 else data.workers
        self.steps_per_epoch = self._sampler(0).batches_per_epoch

    def _sampler(self, step: int) -> ResumableSampler:
        return ResumableSampler(
            len(self.dataset),
            self._options.training.batch_size,
            seed=self._options.seed,
            rank=self._worker.rank,
            world_size=self._worker.count,
            start_batch=step,
            short_sides=tuple(self.dataset.scaled),
        )

    @contextmanager
    def batches(self, step: int) -> Iterator[Iterator[tuple[list[Tensor], list[Target]]]]:
        """Load endless batches from a step on, onto the process's device, until the block ends."""
        device = self._worker.device
        with loaded(
            self.dataset,
            self._sampler(step),
            workers=self._workers,
            pin_memory=device.type == "cuda",
        ) as batches:
            yield (_moved(images, targets, device) for images, targets in batches)


def _moved(images: list[Tensor], targets: list[Target], device: torch.device) -> tuple[list[Tensor], list[Target]]:
    moved = [{name: value.to(device, non_blocking=True) for name, value in t.items()} for t in targets]
    return [image.to(device, non_blocking=True) for image in images], moved
