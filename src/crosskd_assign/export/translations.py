"""Translate to ONNX what torch translates so that it overflows: logarithms of sums of exponentials."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["stable_translations"]


def stable_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Build a translation table for ``torch.onnx.export``.

    torch writes log(eᵃ + eᵇ) and log(σ(x)) as they stand. Logits beyond ±88 are usual (a product of two, a confident
    background), and there they become infinite, and their sum NaN. Here no exponential is above 1.
    """
    op: Any = importlib.import_module("onnxscript").opset18

    def log_one_plus_exp_minus(x: Any) -> Any:
        return op.Log(op.Add(op.Exp(op.Neg(op.Abs(x))), op.CastLike(1.0, x)))

    def log_add_exp(self: Any, other: Any) -> Any:
        return op.Add(op.Max(self, other), log_one_plus_exp_minus(op.Sub(self, other)))

    def log_sigmoid(self: Any) -> Any:
        return op.Sub(op.Min(self, op.CastLike(0.0, self)), log_one_plus_exp_minus(self))

    return {torch.ops.aten.logaddexp.default: log_add_exp, torch.ops.aten.log_sigmoid.default: log_sigmoid}
