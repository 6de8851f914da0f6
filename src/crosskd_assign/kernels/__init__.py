"""Dense class sums without autograd's intermediate tensors."""

from __future__ import annotations

from .chunked import background_focal_sum, quality_focal_sum

__all__ = ["background_focal_sum", "quality_focal_sum"]
