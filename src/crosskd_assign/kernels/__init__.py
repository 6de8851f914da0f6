"""Dense class sums without autograd's intermediate tensors: chunked on any device, in Triton on GPUs."""

from __future__ import annotations

from .chunked import background_focal_sum, quality_focal_sum

__all__ = ["background_focal_sum", "quality_focal_sum"]
