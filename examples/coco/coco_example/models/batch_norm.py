"""Batch norm of several processes: of what each of them sees, or of all."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from crosskd_assign.distributed import channel_statistics, world_size

__all__ = ["learns_batch_norm", "synchronise_batch_norm"]


class _SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm over the images of all processes where torch's own has none: without an accelerator."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(N, C, H, W)``; in evaluation, and where there is one process, as batch norm does."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        # 1. Normalise by the statistics of all processes, whose gradient is of all processes, too.
        [(variance, mean, count)] = channel_statistics([x], across_ranks=True)
        y = (x - mean) * torch.rsqrt(variance + self.eps)
        # 2. Keep running averages; the variance of a sample is larger than that of its values.
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            total = count * world_size()
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean.flatten(), self.momentum or 0.0)
                self.running_var.lerp_(variance.flatten() * total / (total - 1).clamp(min=1), self.momentum or 0.0)
        return (y * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Let the batch norms of a model see the images of all processes; weights and their names stay."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d and child.affine:
                own = _SyncBatchNorm(child.num_features, child.eps, child.momentum)
                own.load_state_dict(child.state_dict())
                setattr(parent, name, own)


def learns_batch_norm(model: nn.Module, frozen: Iterable[nn.Module]) -> bool:
    """Whether a model has a batch norm whose statistics training moves, and that sees one process alone."""
    still = {id(module) for part in frozen for module in part.modules()}
    alone = (m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.SyncBatchNorm)) and id(m) not in still)
    return any(not isinstance(module, (_SyncBatchNorm, nn.SyncBatchNorm)) for module in alone)
