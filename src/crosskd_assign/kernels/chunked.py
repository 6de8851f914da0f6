"""Sums of elementwise losses over millions of logits, without the intermediate tensors that autograd would keep.

The dense classification terms touch N · A · C values, 28 million for a COCO batch, through half a dozen elementwise
operations. Composed, each of these writes a tensor of that size and autograd keeps five of them. Here loss and
derivative are computed together, in chunks that stay in the processor's cache, and only the derivative is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import PredictionError
from ..geometry import at_least_float32

__all__ = ["background_focal_sum", "quality_focal_sum"]

# Elements at a time: a chunk and its temporaries fit a core's cache; on accelerators, launches must stay few.
_CHUNK = {"cpu": 2**16, "other": 2**22}

# Takes flat logits (and further tensors of their shape); returns the sum of the loss and, if wanted, its derivative.
_Terms = Callable[..., tuple[Tensor, Tensor | None]]


class _FusedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, terms: _Terms, z: Tensor, *others: Tensor) -> Tensor:
        total, derivative = _in_chunks(terms, z, others, ctx.needs_input_grad[1])
        if derivative is not None:
            ctx.save_for_backward(derivative.view(z.shape))
        ctx.others = len(others)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (derivative,) = ctx.saved_tensors
        # In full precision first: a loss scale alone may be beyond float16.
        scaled = (at_least_float32(derivative) * gradient).to(derivative.dtype)
        return (None, scaled, *(None,) * ctx.others)


def _in_chunks(terms: _Terms, z: Tensor, others: tuple[Tensor, ...], wanted: bool) -> tuple[Tensor, Tensor | None]:
    flat, flat_others = z.reshape(-1), [x.reshape(-1) for x in others]
    derivative = torch.empty_like(flat) if wanted else None
    total = torch.zeros((), dtype=at_least_float32(flat[:0]).dtype, device=z.device)
    chunk = _CHUNK.get(z.device.type, _CHUNK["other"])
    for start in range(0, len(flat), chunk):
        part = slice(start, start + chunk)
        loss, slope = terms(at_least_float32(flat[part]), *(at_least_float32(x[part]) for x in flat_others), wanted)
        total += loss
        if derivative is not None and slope is not None:
            derivative[part] = slope
    return total, derivative


def _sum(terms: _Terms, z: Tensor, *others: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # the compiler fuses by itself, and would unroll the chunks
        return terms(*(at_least_float32(x).flatten() for x in (z, *others)), False)[0]
    total: Tensor = _FusedSum.apply(terms, z, *others)
    return total


def quality_focal_sum(z: Tensor, teacher: Tensor, gamma: float) -> Tensor:
    """Σ |σ(z) − q|ᵞ · BCE(z, q) with q = σ(teacher), over tensors of one shape; no gradient flows into ``teacher``.

    Raises:
        PredictionError: The shapes or the devices differ.
    """
    if (z.shape, z.device) != (teacher.shape, teacher.device):
        expected, got = (f"{tuple(x.shape)} on {x.device}" for x in (z, teacher))
        raise PredictionError(
            expected=f"teacher logits like the student's, {expected}",
            got=got,
            where="cross_head_classification_loss",
            fix="run the features of both models through one head",
        )

    def terms(z: Tensor, t: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        # 1. The loss.
        p, q = z.sigmoid(), t.sigmoid()
        difference = p - q  # also the derivative of the cross-entropy
        entropy = F.softplus(z).addcmul_(q, z, value=-1)
        if gamma == 0:
            return entropy.sum(), difference
        distance = difference.abs()
        weight = distance if gamma == 1 else distance**gamma
        loss = torch.dot(weight, entropy)
        if not wanted:
            return loss, None

        # 2. Its derivative: d/dz of |d|ᵞ E is sign(d) (γ |d|ᵞ⁻¹ p (1 − p) E + |d|ᵞ⁺¹), with d = p − q the derivative of
        # E.
        slope = torch.addcmul(p, p, p, value=-1).mul_(entropy)
        if gamma != 1:
            slope.mul_(gamma * distance ** (gamma - 1))
        return loss, slope.addcmul_(weight, distance).mul_(difference.sign_())

    return _sum(terms, z, teacher.detach())


def background_focal_sum(z: Tensor, gamma: float) -> Tensor:
    """Σ σ(z)ᵞ · softplus(z): the focal loss of logits that should all be background, without its factor 1 − α."""

    def terms(z: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        p, entropy = z.sigmoid(), F.softplus(z)
        weight = p * p if gamma == 2 else p**gamma
        loss = torch.dot(weight, entropy)
        if not wanted:
            return loss, None
        # d/dz of pᵞ E is pᵞ (γ (1 − p) E + p).
        return loss, entropy.mul_(1 - p).mul_(gamma).add_(p).mul_(weight)

    return _sum(terms, z)
