"""Distillation of distance bins: the loss alone, and its way through the distiller."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from crosskd_assign import CrossHeadDistiller, CrossHeadLoss
from crosskd_assign.errors import IncompatibleDetectorsError, PredictionError
from crosskd_assign.functional import cross_head_distribution_loss
from tests.makers.builders import TinyAdapter, random_images, tiny_detector

BINS = 8


class BinnedAdapter(TinyAdapter):
    """Pretends that each side's distance came from bins around it."""

    def head(self, features, batch):
        predictions = super().head(features, batch)
        sides = predictions.boxes - predictions.points.repeat(1, 2)  # (A, 4) broadcasts over N
        centers = torch.linspace(-32, 32, BINS)
        return replace(predictions, distribution=-(sides[..., None] - centers).abs() / 16)


def random_bins(seed, dtype=torch.float64):
    return torch.randn(2, 3, 4, BINS, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_it_is_the_weighted_divergence_of_torchs_own_distributions(temperature):
    student, teacher, confidence = random_bins(0), random_bins(1), torch.rand(2, 3, dtype=torch.float64)
    expected = 0.0
    for n in range(2):
        for a in range(3):
            p, q = (Categorical(logits=x[n, a] / temperature) for x in (teacher, student))
            expected += float(confidence[n, a] * temperature**2 * kl_divergence(p, q).mean())
    loss = cross_head_distribution_loss(student, teacher, confidence, normalizer=5.0, temperature=temperature)
    assert float(loss) == pytest.approx(expected / 5, rel=1e-9)


def test_its_gradient_is_right_and_does_not_reach_the_teacher():
    student, teacher = random_bins(0).requires_grad_(), random_bins(1).requires_grad_()
    confidence = torch.rand(2, 3, dtype=torch.float64)

    def loss(x):
        return cross_head_distribution_loss(x, teacher, confidence, normalizer=2.0)

    assert torch.autograd.gradcheck(loss, (student,))
    loss(student).backward()
    assert teacher.grad is None


def test_agreement_costs_nothing():
    student = random_bins(0).requires_grad_()
    loss = cross_head_distribution_loss(student, student.detach(), torch.ones(2, 3), normalizer=1.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(student.grad, torch.zeros_like(student))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_stay_finite(dtype):
    student = (100 * random_bins(0).sign()).to(dtype).requires_grad_()
    loss = cross_head_distribution_loss(
        student, (100 * random_bins(1).sign()).to(dtype), torch.ones(2, 3), normalizer=1
    )
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_the_distiller_adds_it_where_it_is_weighted():
    student, teacher = tiny_detector(0), tiny_detector(1)
    images = random_images()
    targets = [{"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])} for _ in images]
    binned = BinnedAdapter(copy.deepcopy(teacher.model))
    plain = CrossHeadDistiller(student, binned)(images, targets)
    weighted = CrossHeadDistiller(student, binned, loss=CrossHeadLoss(distribution=0.5))(images, targets)
    assert "distill_distribution" not in plain
    assert float(weighted["distill_distribution"].detach()) > 0
    weighted["distill_distribution"].backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in student.parameters())


@pytest.mark.parametrize("branch", ["distribution", "quality"])
def test_a_branch_that_the_teachers_head_lacks_is_refused_even_if_it_is_weighted_later(branch):
    class Bare(TinyAdapter):
        def head(self, features, image_size):
            return replace(super().head(features, image_size), quality=None)

    teacher = Bare(tiny_detector(1).model)
    with pytest.raises(IncompatibleDetectorsError, match=f"a head that predicts {branch}"):
        CrossHeadDistiller(tiny_detector(0), teacher, loss=CrossHeadLoss(**{branch: 0.5}))
    distiller = CrossHeadDistiller(tiny_detector(0), teacher)
    distiller.loss = CrossHeadLoss(**{branch: 0.5})
    targets = [{"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])} for _ in range(2)]
    with pytest.raises(IncompatibleDetectorsError, match=f"heads that predict {branch}"):
        distiller(random_images(), targets)


def test_a_distribution_of_another_shape_is_refused():
    class Broken(BinnedAdapter):
        def head(self, features, image_size):
            predictions = super().head(features, image_size)
            return replace(predictions, distribution=predictions.distribution.flatten(2))

    teacher = Broken(tiny_detector(1).model)
    distiller = CrossHeadDistiller(tiny_detector(0), teacher)
    targets = [{"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])} for _ in range(2)]
    with pytest.raises(PredictionError, match=r"distribution of shape \(2, \d+, 4, R\)"):
        distiller(random_images(), targets)
