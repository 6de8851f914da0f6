"""Draw training batches in an order that a resumed run repeats."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import TypeAlias

import numpy as np
from torch.utils.data import Sampler

from coco_example.errors import DataError

Key: TypeAlias = tuple[int, ...]  # epoch, index, and the short side of its batch where batches have sizes of their own


@dataclass(frozen=True)
class ResumableSampler(Sampler[list[Key]]):
    """Endless batches of ``(epoch, index)`` keys, for ``DataLoader(dataset, batch_sampler=…, collate_fn=collate)``.

    Batch k depends on the arguments and k alone: with ``start_batch=k``, a resumed run continues as if it had not
    stopped. All ranks cut one permutation per epoch, and global batch k stays the same while
    ``batch_size * world_size`` does. With ``short_sides``, all ranks get a batch of one size, drawn for each, so that
    none waits for larger images. The incomplete last batch of an epoch is left out; a set smaller than one global
    batch is repeated to fill it.
    """

    length: int  # images
    batch_size: int  # images per batch and rank
    _: KW_ONLY
    seed: int = 0  # not negative
    rank: int = 0
    world_size: int = 1
    start_batch: int = 0  # batches already done since the training began
    stream: tuple[int, ...] = ()  # further numbers that the order is drawn from
    short_sides: tuple[int, ...] = ()  # sizes of the batches; none: keys have no size

    def __post_init__(self) -> None:
        if self.length < 1 or self.batch_size < 1 or not 0 <= self.rank < self.world_size or self.start_batch < 0:
            raise DataError(
                expected="at least one image and a rank below world_size",
                got=str(self),
                where="sampler",
                fix="check the arguments",
            )

    @property
    def batches_per_epoch(self) -> int:
        """Count the batches that each rank gets of one permutation."""
        return max(1, self.length // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[Key]]:
        first, done = divmod(self.start_batch, self.batches_per_epoch)
        for epoch in itertools.count(first):
            order = np.random.default_rng((self.seed, epoch, *self.stream)).permutation(self.length)
            batches = np.resize(order, (self.batches_per_epoch, self.world_size, self.batch_size))[:, self.rank]
            # Another stream of random numbers than the order's, which stays what it is without sizes.
            drawn = np.random.default_rng((self.seed, epoch, 1)).integers(
                max(1, len(self.short_sides)), size=len(batches)
            )
            for batch, n in zip(batches[done:].tolist(), drawn[done:].tolist(), strict=True):
                side = self.short_sides[n : n + 1]  # one, or none
                yield [(epoch, i, *side) for i in batch]
            done = 0


def parts_of(batches: Iterable[list[Key]], count: int) -> Iterator[list[Key]]:
    """Cut each batch into ``count`` equal ones."""
    for batch in batches:
        size = len(batch) // count
        for start in range(0, len(batch), size):
            yield batch[start : start + size]


def mixed(first: Iterable[list[Key]], second: Iterable[list[Key]], length: int) -> Iterator[list[Key]]:
    """Join endless batches of two sets: some images of the first, then some of the second, for `MixedDataset`.

    Each set has an order and epochs of its own: the second one goes on where it was when the first one ends.

    Args:
        first: Batches of the first set.
        second: Batches of the second.
        length: Images of the first set, behind which those of the second are counted.
    """
    for own, others in zip(first, second, strict=True):
        yield [*own, *((epoch, length + i, *own[0][2:]) for epoch, i, *_ in others)]  # all of one size
