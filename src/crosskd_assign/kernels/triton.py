"""The sums of `chunked.py` on a GPU: one pass over the logits, with everything in between in registers.

Triton comes with PyTorch's builds for CUDA and ROCm. Where it is missing or cannot compile, `chunked.py` is used.
"""

# No ``from __future__ import annotations``: Triton 3.0's interpreter does not see a constexpr in a string.
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["background_focal", "quality_focal", "scaled"]

_BLOCK = 1024  # elements of one program

_Sums = tuple[Tensor, Tensor | None]


@triton.jit
def _sigmoid_parts(z: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """σ(z), 1 − σ(z) and log(1 + exp(−|z|)), all of them to the last digits even where they are tiny."""
    e = tl.exp(-tl.abs(z))
    u = 1 + e
    small, large = e / u, 1 / u
    # The logarithm of 1 + e from that of the rounded u: Goldberg, ACM Computing Surveys 23(1), 1991, theorem 4.
    log = tl.where(u == 1, e, tl.log(u) * e / tl.where(u == 1, 1.0, u - 1))
    return tl.where(z >= 0, large, small), tl.where(z >= 0, small, large), log


@triton.jit
def _block(n: tl.tensor, block: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    offset = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    return offset, offset < n


@triton.jit
def _quality_focal(
    z_at: tl.tensor,
    t_at: tl.tensor,
    slope_at: tl.tensor,
    sum_at: tl.tensor,
    n: tl.tensor,
    gamma: tl.constexpr,
    wanted: tl.constexpr,
    block: tl.constexpr,
) -> None:
    offset, inside = _block(n, block)
    z = tl.load(z_at + offset, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(t_at + offset, mask=inside, other=0.0).to(tl.float32)
    p, not_p, log = _sigmoid_parts(z)
    q, _, _ = _sigmoid_parts(t)
    difference = p - q
    distance = tl.abs(difference)
    entropy = tl.maximum(z, 0.0) + log - q * z
    if gamma == 0:
        loss, slope = entropy, difference
    else:
        if gamma == 1:
            weight, weight_slope = distance, p * not_p * entropy
        else:
            logarithm = tl.log(distance)  # −∞ where both agree, the powers of which are 0
            weight = tl.exp(gamma * logarithm)
            weight_slope = gamma * tl.exp((gamma - 1) * logarithm) * p * not_p * entropy
        loss = weight * entropy
        slope = tl.where(difference < 0, -1.0, 1.0) * (weight_slope + weight * distance)
        slope = tl.where(difference == 0, 0.0, slope)
    tl.store(sum_at + tl.program_id(0), tl.sum(tl.where(inside, loss, 0.0), axis=0))
    if wanted:
        tl.store(slope_at + offset, slope, mask=inside)


@triton.jit
def _background_focal(
    z_at: tl.tensor,
    slope_at: tl.tensor,
    sum_at: tl.tensor,
    n: tl.tensor,
    gamma: tl.constexpr,
    wanted: tl.constexpr,
    block: tl.constexpr,
) -> None:
    offset, inside = _block(n, block)
    z = tl.load(z_at + offset, mask=inside, other=0.0).to(tl.float32)
    p, not_p, log = _sigmoid_parts(z)
    entropy = tl.maximum(z, 0.0) + log
    weight = p * p if gamma == 2 else tl.exp(gamma * (tl.minimum(z, 0.0) - log))
    tl.store(sum_at + tl.program_id(0), tl.sum(tl.where(inside, weight * entropy, 0.0), axis=0))
    if wanted:
        tl.store(slope_at + offset, weight * (gamma * not_p * entropy + p), mask=inside)


@triton.jit
def _scaled(x_at: tl.tensor, factor_at: tl.tensor, out_at: tl.tensor, n: tl.tensor, block: tl.constexpr) -> None:
    offset, inside = _block(n, block)
    x = tl.load(x_at + offset, mask=inside).to(tl.float32)
    tl.store(out_at + offset, x * tl.load(factor_at), mask=inside)


def quality_focal(z: Tensor, teacher: Tensor, *, gamma: float, wanted: bool) -> _Sums:
    """Σ |σ(z) − q|ᵞ · BCE(z, q) with q = σ(teacher) and, if ``wanted``, its derivative by z.

    Args:
        z: Contiguous, not empty, of float32 or half precision; computed in float32.
        teacher: Likewise, of as many elements.
        gamma: 0, or at least 1.
        wanted: Whether to compute the derivative.

    Returns:
        The sum, a float32 scalar, and the derivative with the shape and dtype of ``z`` or None.
    """
    return _launch(_quality_focal, z, teacher, gamma=gamma, wanted=wanted)


def background_focal(z: Tensor, *, gamma: float, wanted: bool) -> _Sums:
    """Σ σ(z)ᵞ · softplus(z) and, if ``wanted``, its derivative by z; as `quality_focal`."""
    return _launch(_background_focal, z, gamma=gamma, wanted=wanted)


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply a contiguous tensor by a scalar tensor, in float32; the result has the tensor's dtype."""
    out = torch.empty_like(x)
    with torch.cuda.device(x.get_device()):
        _scaled[_grid(x)](x, factor.float(), out, x.numel(), block=_BLOCK)
    return out


def _launch(kernel: Any, *logits: Tensor, gamma: float, wanted: bool) -> _Sums:
    z = logits[0]
    slope = torch.empty_like(z) if wanted else None
    # One partial sum for each block, added afterwards, so that every run gives the same.
    sums = torch.empty(_grid(z), dtype=torch.float32, device=z.device)
    with torch.cuda.device(z.get_device()):
        kernel[_grid(z)](
            *logits, z if slope is None else slope, sums, z.numel(), gamma=float(gamma), wanted=wanted, block=_BLOCK
        )
    return sums.sum(), slope


def _grid(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), _BLOCK),)
