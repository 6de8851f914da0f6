"""Sums of elementwise losses over millions of logits, without the intermediate tensors that autograd would keep.

The dense classification terms touch N · A · C values, 28 million for a COCO batch, through half a dozen elementwise
operations. Composed, each of these writes a tensor of that size and autograd keeps five of them. Here loss and
derivative are computed together and only the derivative is kept: on a GPU by a kernel of `kernels/triton.py`, elsewhere
in chunks that stay in the processor's cache.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, Literal

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
_Kernel = Literal["quality_focal", "background_focal"]


class _FusedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, terms: _Terms, kernel: _Kernel, gamma: float, z: Tensor, *others: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[3]
        kernels = _kernels(z)
        if kernels is None:
            total, derivative = _in_chunks(terms, z, others, wanted)
        else:
            logits = [x.contiguous() for x in (z, *others)]
            total, derivative = getattr(kernels, kernel)(*logits, gamma=gamma, wanted=wanted)
        if derivative is not None:
            ctx.save_for_backward(derivative.view(z.shape))
        ctx.others = len(others)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (derivative,) = ctx.saved_tensors
        kernels = _kernels(derivative)
        if kernels is None:
            # In full precision first: a loss scale alone may be beyond float16.
            scaled = (at_least_float32(derivative) * gradient).to(derivative.dtype)
        else:
            scaled = kernels.scaled(derivative, gradient)
        return (None, None, None, scaled, *(None,) * ctx.others)


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


def _kernels(z: Tensor) -> ModuleType | None:
    """The kernels for these logits, or None."""
    fit = z.is_cuda and z.numel() > 0 and z.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return _working_kernels(z.device, z.dtype) if fit else None


@cache
def _working_kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The kernels, tried once: compiling them takes Triton, a C compiler and a GPU that is not too old."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        from . import triton as kernels  # noqa: PLC0415  # Triton is not everywhere

        z = torch.zeros(1, device=device, dtype=dtype)
        kernels.quality_focal(z, z, gamma=1, wanted=True)
        total, _ = kernels.background_focal(z, gamma=2, wanted=True)
        kernels.scaled(z, total)
    except Exception as error:  # any failure: fall back to the chunked path
        warnings.warn(
            f"Expected Triton to compile the kernels for {device}, but got {type(error).__name__}: {error} "
            "(crosskd_assign.kernels). The losses go on without them, slower. Fix: install a C compiler.",
            stacklevel=2,
        )
        return None
    return kernels


def _sum(terms: _Terms, kernel: _Kernel, gamma: float, z: Tensor, *others: Tensor) -> Tensor:
    if torch.compiler.is_compiling():  # the compiler fuses by itself, and would unroll the chunks
        return terms(*(at_least_float32(x).flatten() for x in (z, *others)), False)[0]
    total: Tensor = _FusedSum.apply(terms, kernel, gamma, z, *others)
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

    return _sum(terms, "quality_focal", gamma, z, teacher.detach())


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

    return _sum(terms, "background_focal", gamma, z)
