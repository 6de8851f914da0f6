"""Numbers that belong to the whole batch, where each process holds a part of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .geometry import at_least_float32

__all__ = ["Statistics", "channel_statistics", "is_first_rank", "normalizer_over_ranks", "world_size"]


class Statistics(NamedTuple):
    """What is known of the channels of a map over N, H and W.

    Attributes:
        variance: ``(1, *, 1, 1)``, biased.
        mean: ``(1, *, 1, 1)``.
        values: How many values a channel has on the average rank, a scalar.
    """

    variance: Tensor
    mean: Tensor
    values: Tensor


def world_size() -> int:
    """Count the processes of the default group; 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first_rank() -> bool:
    """Whether this process is the one that speaks for all: rank 0, or the only one."""
    return world_size() == 1 or dist.get_rank() == 0


def normalizer_over_ranks(total: Tensor) -> Tensor:
    """Compute max(1, Σ over ranks) / ranks of a scalar; without gradient.

    `DistributedDataParallel` averages gradients over R processes. A loss divided by this number is then, on the
    average, the loss of one process with the whole batch: its sum over max(1, total).

    Example:
        >>> normalizer_over_ranks(torch.tensor(0.25)), normalizer_over_ranks(torch.tensor(8.0))
        (tensor(1.), tensor(8.))
    """
    total, ranks = total.detach(), world_size()
    if ranks == 1:
        return total.clamp(min=1)
    total = total.clone()
    dist.all_reduce(total)
    return total.clamp(min=1) / ranks


def channel_statistics(maps: Sequence[Tensor], *, across_ranks: bool) -> list[Statistics]:
    """Compute variance and mean of every channel over N, H and W, of all ranks, with a graph.

    One all-reduce forward and one backward, however many maps there are. Each rank adds its count, mean and sum of
    squared deviations, which are then combined as in Chan et al., "Updating Formulae and a Pairwise Algorithm for
    Computing Sample Variances" (1979), so that nothing cancels.

    Args:
        maps: Maps ``(N, *, H, W)``; sizes may differ from rank to rank, channels not.
        across_ranks: False for this process alone, e.g. in evaluation, which other ranks take no part in.

    Returns:
        The statistics of each map, in float32 at least.

    Example:
        >>> [(variance, mean, count)] = channel_statistics([torch.arange(4.0).view(1, 1, 2, 2)], across_ranks=False)
        >>> variance.item(), mean.item(), count.item()
        (1.25, 1.5, 4.0)
    """
    # 1. Each map's own.
    own = []
    for x in map(at_least_float32, maps):
        variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0, keepdim=True)
        own.append(Statistics(variance, mean, mean.new_full((), float(x.numel() // x.shape[1]))))
    ranks = world_size()
    if ranks == 1 or not across_ranks:
        return own

    # 2. A row for each rank; this one fills its own, and the sum over ranks is the whole table.
    row = torch.cat([x.flatten() for variance, mean, count in own for x in (variance * count, mean, count)])
    table = row.new_zeros(ranks, len(row)).index_copy(0, torch.tensor([dist.get_rank()], device=row.device), row[None])
    table = _SumOverRanks.apply(table)

    # 3. Combine the rows.
    combined = []
    widths = [n for _, mean, _ in own for n in (mean.numel(), mean.numel(), 1)]
    columns = iter(table.split(widths, dim=1))
    for deviations, means, counts in zip(columns, columns, columns, strict=True):
        total = counts.sum()
        mean = (counts * means).sum(dim=0) / total
        variance = (deviations + counts * (means - mean) ** 2).sum(dim=0) / total
        combined.append(Statistics(variance.view(1, -1, 1, 1), mean.view(1, -1, 1, 1), total.detach() / ranks))
    return combined


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient
