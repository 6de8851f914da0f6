"""Losses on validation images: those of training, on images that are not trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from coco_example.data.dataset import CocoDataset
from coco_example.data.reader import CocoIndex
from coco_example.engine.distributed import Worker
from coco_example.engine.loaders import loaded
from coco_example.engine.loading import moved
from coco_example.engine.randomness import untouched_random_state
from coco_example.options import Options
from crosskd_assign import EndToEndDetector
from crosskd_assign.distillation import FeatureAligner

__all__ = ["ValidationLosses"]


class ValidationLosses:
    """Computes the losses of a training method on images spread evenly over a split, without augmentation.

    There is no gradient, and layers are in evaluation mode: batch norm uses its running statistics and does not move
    them. Random states stay as they are. Several processes take the same number of images and of batches each, and the
    result is that of one process with their batches joined.

    Args:
        options: The run's; ``val_losses`` images at most.
        index: The validation images.
        worker: This process.

    Attributes:
        images: How many images there are, over all processes; where there are fewer than processes, some count twice.
    """

    def __init__(self, options: Options, index: CocoIndex, worker: Worker) -> None:
        self._worker, self._loaders = worker, options.dataset.workers
        self._dataset = CocoDataset(index)
        share = max(1, min(options.training.val_losses, len(index.records)) // worker.count)
        self.images = share * worker.count

        # Joined batches, of which every process takes an equal part: losses are normalised over all of them.
        order = [i * len(index.records) // self.images for i in range(self.images)]
        size = options.training.batch_size
        self._batches: list[list[int]] = []
        for start in range(0, share, size):
            own = min(size, share - start)
            first = start * worker.count + worker.rank * own
            self._batches.append(order[first : first + own])

    def __call__(self, method: nn.Module) -> dict[str, float]:
        """Compute each loss term, its mean over the images; on all processes."""
        # 1. This process's share.
        totals: Counter[str] = Counter()
        with (
            torch.no_grad(),
            untouched_random_state(self._worker.device),
            _only_losses(method),
            loaded(self._dataset, self._batches, workers=self._loaders) as batches,
        ):
            self._worker.wait()  # for the loaders of all; losses exchange their normalisers
            for images, targets in batches:
                losses = method(*moved(images, targets, self._worker.device))
                totals.update({name: float(loss) * len(images) for name, loss in losses.items()})

        # 2. The mean over all.
        shares = self._worker.gather(dict(totals))
        return {name: sum(share[name] for share in shares) / self.images for name in shares[0]}


@contextmanager
def _only_losses(method: nn.Module) -> Iterator[None]:
    """Put every layer in evaluation mode, but let the method compute losses; all modes are restored afterwards."""
    modes = {module: module.training for module in method.modules()}
    method.eval()
    for module in modes:
        # The method itself, and what asks for its mode to know whether it is trained.
        module.training = module is method or isinstance(module, (EndToEndDetector, FeatureAligner))
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
