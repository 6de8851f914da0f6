"""Sums in chunks against autograd in float64, wherever the borders of the chunks fall."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crosskd_assign.errors import PredictionError
from crosskd_assign.kernels import background_focal_sum, chunked, quality_focal_sum

COUNTS = [1, 6, 7, 8, 14, 15, 50]  # around chunks of 7
GAMMAS = [0, 1, 1.5, 2]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunked, "_CHUNK", {"cpu": 7, "other": 7})


def logits(count: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (3 * torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1).to(dtype)


def quality_by_hand(z: Tensor, teacher: Tensor, gamma: float) -> Tensor:
    q = teacher.sigmoid()
    weight = (z.sigmoid() - q).abs() ** gamma if gamma else torch.ones_like(z)
    return (weight * F.binary_cross_entropy_with_logits(z, q, reduction="none")).sum()


def background_by_hand(z: Tensor, gamma: float) -> Tensor:
    return (z.sigmoid() ** gamma * F.softplus(z)).sum()


def slope_of(loss: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    value = loss(z)
    return value.detach(), torch.autograd.grad(5 * value, z)[0]


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_are_those_of_the_formula(dtype, count, gamma):
    z, teacher = logits(count, 0, dtype), logits(count, 1, dtype)
    pairs = [
        (lambda x: quality_focal_sum(x, teacher, gamma), lambda x: quality_by_hand(x, teacher.double(), gamma)),
        (lambda x: background_focal_sum(x, gamma), lambda x: background_by_hand(x, gamma)),
    ]
    for ours, formula in pairs:
        (value, slope), (expected, derivative) = slope_of(ours, z), slope_of(formula, z.double())
        assert value.dtype == torch.promote_types(dtype, torch.float32)
        assert slope.dtype == dtype
        tolerance = max(torch.finfo(dtype).eps, 1e-12)
        torch.testing.assert_close(
            value.double(), expected, rtol=max(1e-12, 1e-6 * (dtype != torch.float64)), atol=1e-6
        )
        torch.testing.assert_close(slope.double(), derivative, rtol=4 * tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("count", COUNTS)
def test_gradients_equal_finite_differences(count):
    z, teacher = logits(count, 2).requires_grad_(), logits(count, 3)
    assert torch.autograd.gradcheck(lambda x: quality_focal_sum(x, teacher, 1.5), z)
    assert torch.autograd.gradcheck(lambda x: background_focal_sum(x, 2), z)


def test_the_layout_of_the_logits_does_not_matter():
    z, teacher = (logits(60, seed).view(3, 4, 5).transpose(0, 2) for seed in (4, 5))
    for ours in (lambda x: quality_focal_sum(x, teacher, 1), lambda x: background_focal_sum(x, 2)):
        (value, slope), (expected, derivative) = slope_of(ours, z), slope_of(ours, z.contiguous())
        torch.testing.assert_close((value, slope), (expected, derivative))
        assert slope.shape == (5, 4, 3)


def test_no_logits_give_zero_and_a_gradient_without_entries():
    for ours in (lambda x: quality_focal_sum(x, torch.zeros(0), 1), lambda x: background_focal_sum(x, 2)):
        value, slope = slope_of(ours, torch.zeros(0))
        assert (float(value), slope.shape) == (0.0, (0,))


def test_without_a_gradient_wanted_the_value_is_the_same_and_nothing_is_kept():
    z, teacher = logits(20, 6), logits(20, 7)
    for ours in (lambda x: quality_focal_sum(x, teacher, 1.5), lambda x: background_focal_sum(x, 1.5)):
        alone = ours(z)
        assert not alone.requires_grad
        torch.testing.assert_close(alone, slope_of(ours, z)[0])


def test_no_gradient_reaches_the_teacher_and_neither_is_edited():
    z, teacher = logits(20, 8).requires_grad_(), logits(20, 9).requires_grad_()
    versions = z._version, teacher._version
    quality_focal_sum(z, teacher, 1).backward()
    assert teacher.grad is None
    assert z.grad is not None
    assert (z._version, teacher._version) == versions


def test_a_second_derivative_is_refused_and_not_silently_zero():
    z = logits(20, 10).requires_grad_()
    (slope,) = torch.autograd.grad(background_focal_sum(z, 2), z, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        slope.sum().backward()


def test_other_shapes_are_refused_with_both():
    with pytest.raises(PredictionError) as caught:
        quality_focal_sum(torch.zeros(2, 6), torch.zeros(3, 4), 1)
    assert "(2, 6) on cpu" in caught.value.expected
    assert caught.value.got == "(3, 4) on cpu"
