"""Load the images of a training run in the order of its steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from coco_example.data.augmentation import augmentation
from coco_example.data.dataset import CocoDataset, Target
from coco_example.data.reader import CocoIndex
from coco_example.data.sampler import ResumableSampler
from coco_example.engine.distributed import Worker
from coco_example.engine.loaders import loaded
from coco_example.options import Options

__all__ = ["TrainingData", "moved"]


class TrainingData:
    """The batches of one process: the same after a stop as without it.

    Args:
        options: The run's.
        index: Images to train on.
        worker: This process.

    Attributes:
        dataset: The images, augmented.
        steps_per_epoch: Steps of one epoch, of ``accumulate`` batches each.
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
        )
        self.steps_per_epoch = self._sampler(0).batches_per_epoch

    def _sampler(self, step: int) -> ResumableSampler:
        """Draw the images of whole steps, whose order is that of batches ``accumulate`` times as large."""
        return ResumableSampler(
            len(self.dataset),
            self._options.training.batch_size * self._options.training.accumulate,
            seed=self._options.seed,
            rank=self._worker.rank,
            world_size=self._worker.count,
            start_batch=step,
        )

    @contextmanager
    def batches(self, step: int) -> Iterator[Iterator[tuple[list[Tensor], list[Target]]]]:
        """Load endless batches from a step on, onto the process's device, until the block ends."""
        device, size = self._worker.device, self._options.training.batch_size
        with loaded(
            self.dataset,
            (keys[i : i + size] for keys in self._sampler(step) for i in range(0, len(keys), size)),
            workers=self._options.dataset.workers,
            pin_memory=device.type == "cuda",
        ) as batches:
            yield (moved(images, targets, device) for images, targets in batches)


def moved(images: list[Tensor], targets: list[Target], device: torch.device) -> tuple[list[Tensor], list[Target]]:
    """Move a batch onto a device."""
    there = [{name: value.to(device, non_blocking=True) for name, value in t.items()} for t in targets]
    return [image.to(device, non_blocking=True) for image in images], there
