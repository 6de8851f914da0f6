"""The one-to-one ranking loss against a loop over pairs, and the logit of a product of scores."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_iou

from crosskd_assign import EndToEndDetector, OneToOneLoss
from crosskd_assign.functional import one_to_one_ranking_loss, product_logits
from tests.makers.builders import assignment_of, random_images, random_targets, tiny_detector


def scene(seed: int = 0, points: int = 12, classes: int = 3):
    """Predictions that crowd around two objects in each of two images, three of the four matched."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.tensor([[10.0, 10, 50, 50], [60, 20, 100, 90]])
    which = torch.randint(2, (2, points), generator=generator)
    boxes = (truth[which] + 6 * torch.randn(2, points, 4, generator=generator)).double()
    logits = torch.randn(2, points, classes, generator=generator, dtype=torch.float64)
    assignment = assignment_of((0, 1, 0), (0, 4, 1), (1, 0, 0))
    return logits, boxes, assignment, torch.tensor([2, 0, 2]), truth[[0, 1, 0]].double()


def by_loop(logits, boxes, assignment, labels, matched, threshold, candidates) -> float:
    own = {(int(n), int(p), int(c)) for n, p, c in zip(assignment.image, assignment.point, labels, strict=True)}
    total = 0.0
    for n, p, c, box in zip(
        assignment.image.tolist(), assignment.point.tolist(), labels.tolist(), matched, strict=True
    ):
        flat = logits[n].flatten()
        best = sorted(range(len(flat)), key=lambda i: -float(flat[i]))[:candidates]
        rivals = 0.0
        for i in best:
            point, label = divmod(i, logits.shape[-1])
            overlap = float(box_iou(boxes[n, point][None], box[None]))
            if label == c and (n, point, label) not in own and overlap > threshold:
                rivals += math.exp(float(flat[i]) - float(logits[n, p, c]))
        total += math.log(1 + rivals)
    return total


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.6])
@pytest.mark.parametrize("candidates", [1, 7, 300])
def test_it_is_the_cross_entropy_of_picking_the_match_out_of_its_duplicates(threshold, candidates):
    logits, boxes, assignment, labels, matched = scene()
    expected = by_loop(logits, boxes, assignment, labels, matched, threshold, candidates)
    options = {"normalizer": 3.0, "iou_threshold": threshold, "candidates": candidates}
    found = one_to_one_ranking_loss(logits, boxes, assignment, labels, matched, **options)
    assert float(found) == pytest.approx(expected / 3, rel=1e-9)
    if threshold < 0.6 and candidates > 1:
        assert expected > 0.5  # there are rivals


def test_its_gradient_is_that_of_finite_differences_and_leaves_boxes_and_matched_scores_alone():
    logits, boxes, assignment, labels, matched = scene(1)
    boxes.requires_grad_()
    own = torch.zeros_like(logits, dtype=torch.bool)
    own[assignment.image, assignment.point, labels] = True
    fixed = logits.clone()

    def loss(z):
        return one_to_one_ranking_loss(z, boxes, assignment, labels, matched, normalizer=2.0, iou_threshold=0.4)

    assert torch.autograd.gradcheck(lambda z: loss(torch.where(own, fixed, z)), logits.requires_grad_())
    loss(logits).backward()
    assert boxes.grad is None
    assert torch.equal(logits.grad[own], torch.zeros(3).double())
    assert (logits.grad >= 0).all()
    assert logits.grad.sum() > 0.1


@pytest.mark.parametrize("scale", [1e-3, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits_and_half_precision_stay_finite(scale, dtype):
    logits, boxes, assignment, labels, matched = scene(2)
    z = (scale * logits).to(dtype).requires_grad_()
    loss = one_to_one_ranking_loss(z, boxes.to(dtype), assignment, labels, matched, normalizer=1.0, iou_threshold=0.3)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert z.grad.isfinite().all()


def test_nothing_matched_and_no_rivals_cost_nothing_but_stay_connected():
    logits, boxes, assignment, labels, matched = scene()
    logits.requires_grad_()
    nobody = one_to_one_ranking_loss(logits, boxes + 1e4, assignment, labels, matched, normalizer=1.0)
    nothing = one_to_one_ranking_loss(logits, boxes, assignment_of(), labels[:0], matched[:0], normalizer=1.0)
    for loss in (nobody, nothing):
        assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
        loss.backward()
        assert logits.grad.abs().max() < 1e-12


def test_a_detector_adds_it_only_where_it_has_a_weight():
    images, targets = random_images(2), random_targets((2, 1))
    plain = EndToEndDetector(tiny_detector()).train()
    ranked = EndToEndDetector(tiny_detector(), loss=OneToOneLoss(ranking=0.5)).train()
    twice = EndToEndDetector(tiny_detector(), loss=OneToOneLoss(ranking=1.0)).train()
    losses = ranked(images, targets)
    assert losses.keys() - plain(images, targets).keys() == {"ranking"}
    torch.testing.assert_close(2 * losses["ranking"], twice(images, targets)["ranking"])


@given(x=st.floats(-90, 90), y=st.floats(-90, 90))
def test_the_logit_of_a_product_is_exact_at_any_magnitude(x, y):
    found = product_logits(torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64))
    # σ(found) = σ(x) σ(y), compared as logarithms, of both the product and its complement.
    log_product = -math.log1p(math.exp(-x)) - math.log1p(math.exp(-y))
    assert float(torch.nn.functional.logsigmoid(found)) == pytest.approx(log_product, rel=1e-12, abs=1e-300)
    complement = math.log(-math.expm1(log_product)) if log_product < 0 else -math.inf
    if complement > -30:  # nearer to 0 the reference has lost its digits
        assert float(torch.nn.functional.logsigmoid(-found)) == pytest.approx(complement, rel=1e-6)


def test_the_logit_of_a_product_of_nothing_or_of_certainty_is_infinite_or_the_other_one():
    infinity = float("inf")
    x = torch.tensor([-infinity, -infinity, infinity, infinity, 1e38])
    y = torch.tensor([3.0, -infinity, 3.0, infinity, 3e38])
    torch.testing.assert_close(product_logits(x, y), torch.tensor([-infinity, -infinity, 3.0, infinity, 1e38]))


@given(x=st.floats(-30, 30), y=st.floats(-30, 30))
def test_the_gradient_of_the_logit_of_a_product_is_that_of_its_definition(x, y):
    a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (x, y))
    product_logits(a, b).backward()
    # d logit(p) = dp / (p (1 − p)) with p = σ(x) σ(y), dp/dx = p (1 − σ(x)).
    sigmoid = [1 / (1 + math.exp(-value)) for value in (x, y)]
    complement = -math.expm1(sum(math.log(value) for value in sigmoid))
    expected = [math.exp(-value) * s / complement for value, s in zip((x, y), sigmoid, strict=True)]
    if complement > 1e-9:  # nearer to 0 the reference has lost its digits
        assert [float(a.grad), float(b.grad)] == pytest.approx(expected, rel=1e-5)
