"""Load the images of a training run in the order of its steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.data import Dataset

from coco_example.data.augmentation import augmentation, scaled_augmentations
from coco_example.data.dataset import CocoDataset, MixedDataset, Target
from coco_example.data.reader import CocoIndex
from coco_example.data.sampler import Key, ResumableSampler, mixed, parts_of
from coco_example.engine.distributed import Worker
from coco_example.engine.loaders import loaded
from coco_example.options import Options

__all__ = ["TrainingData", "moved"]

_UNLABELLED = (1,)  # the stream of random numbers of images without labels


class TrainingData:
    """The batches of one process: the same after a stop as without it.

    Args:
        options: The run's.
        index: Images to train on.
        worker: This process.
        unlabelled: Images without labels, a share of every batch; their target is None.

    Attributes:
        dataset: The images with labels, augmented.
        unlabelled: The images without, augmented alike.
        steps_per_epoch: Steps of one epoch of the images with labels, of ``accumulate`` batches each.
    """

    def __init__(self, options: Options, index: CocoIndex, worker: Worker, unlabelled: CocoIndex | None = None) -> None:
        self._options, self._worker = options, worker
        self.dataset = self._augmented(index)
        self.unlabelled = None if unlabelled is None else self._augmented(unlabelled, _UNLABELLED)
        # Each process that loads would keep a copy of the images.
        data = options.dataset
        self._loaders = 0 if data.cache and data.workers < 0 else data.workers
        self.steps_per_epoch = self._sampler(0).batches_per_epoch

    @property
    def unlabelled_per_batch(self) -> int:
        """Count the images without labels in a batch of one process."""
        return 0 if self.unlabelled is None else self._options.unlabelled_per_batch

    def _augmented(self, index: CocoIndex, stream: tuple[int, ...] = ()) -> CocoDataset:
        data, model = self._options.dataset, self._options.model
        return CocoDataset(
            index,
            augmentation(model.size, data.augmentation, model.short_side),
            seed=self._options.seed,
            cache=data.cache,
            mosaic=data.mosaic,
            scaled=scaled_augmentations(model.size, data.augmentation, model.short_side) if data.multi_scale else {},
            stream=stream,
        )

    def _sampler(self, step: int) -> ResumableSampler:
        return self._order(len(self.dataset), self._options.training.batch_size - self.unlabelled_per_batch, step)

    def _order(self, length: int, count: int, step: int, stream: tuple[int, ...] = ()) -> ResumableSampler:
        """Draw the images of whole steps, whose order is that of batches ``accumulate`` times as large."""
        return ResumableSampler(
            length,
            count * self._options.training.accumulate,
            seed=self._options.seed,
            rank=self._worker.rank,
            world_size=self._worker.count,
            start_batch=step,
            stream=stream,
            short_sides=tuple(self.dataset.scaled),
        )

    def _source(self, step: int) -> tuple[Dataset[tuple[Tensor, Target | None]], Iterable[list[Key]]]:
        """Choose the images, and their order from a step on."""
        own = parts_of(self._sampler(step), self._options.training.accumulate)
        if self.unlabelled is None:
            return self.dataset, own
        others = self._order(len(self.unlabelled), self.unlabelled_per_batch, step, _UNLABELLED)
        both = mixed(own, parts_of(others, self._options.training.accumulate), len(self.dataset))
        return MixedDataset(self.dataset, self.unlabelled), both

    @contextmanager
    def batches(self, step: int) -> Iterator[Iterator[tuple[list[Tensor], list[Target | None]]]]:
        """Load endless batches from a step on, onto the process's device, until the block ends."""
        device = self._worker.device
        dataset, order = self._source(step)
        with loaded(dataset, order, workers=self._loaders, pin_memory=device.type == "cuda") as batches:
            yield (moved(images, targets, device) for images, targets in batches)


def moved(
    images: list[Tensor], targets: list[Target | None], device: torch.device
) -> tuple[list[Tensor], list[Target | None]]:
    """Move a batch onto a device."""
    there = [
        None if t is None else {name: value.to(device, non_blocking=True) for name, value in t.items()} for t in targets
    ]
    return [image.to(device, non_blocking=True) for image in images], there
