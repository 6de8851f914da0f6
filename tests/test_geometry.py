"""Overlap measures against torchvision, and where torchvision gives NaN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_iou, clip_boxes_to_image, generalized_box_iou

from crosskd_assign.geometry import area, at_least_float32, clip, generalized_iou, iou, scale

COORDINATE = st.floats(-500, 500, width=32)


def boxes(least: float, most: float):
    """Boxes ``(D, 4)`` with sides between ``least`` and ``most`` pixels."""
    side = st.floats(least, most, width=32)
    corners = st.tuples(COORDINATE, COORDINATE, side, side).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))
    return st.lists(corners, min_size=1, max_size=5).map(torch.tensor)


@given(boxes(1, 600), boxes(1, 600))
def test_iou_and_generalized_iou_equal_torchvision(a, b):
    torch.testing.assert_close(iou(a[:, None], b), box_iou(a, b), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(generalized_iou(a[:, None], b), generalized_box_iou(a, b), rtol=1e-5, atol=1e-5)


@given(boxes(1, 600), boxes(1, 600))
def test_overlap_is_symmetric_and_bounded(a, b):
    for measure, low in ((iou, 0), (generalized_iou, -1)):
        values = measure(a[:, None], b)
        torch.testing.assert_close(values, measure(b[:, None], a).T)
        assert ((values >= low - 1e-6) & (values <= 1 + 1e-6)).all()
    assert (generalized_iou(a[:, None], b) <= iou(a[:, None], b) + 1e-6).all()
    torch.testing.assert_close(iou(a, a), torch.ones(len(a)))


POINT, LINE, WALL, INVERTED = [5.0, 5, 5, 5], [5.0, 5, 5, 9], [5.0, 5, 9, 5], [9.0, 9, 5, 5]
NORMAL, FAR = [4.0, 4, 10, 10], [1e4, 1e4, 1e4 + 1, 1e4 + 1]


@pytest.mark.parametrize("a", [POINT, LINE, WALL, INVERTED, NORMAL, FAR])
@pytest.mark.parametrize("b", [POINT, LINE, WALL, INVERTED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_boxes_overlap_nothing_with_finite_gradients(a, b, dtype):
    x = torch.tensor(a, dtype=dtype, requires_grad=True)
    y = torch.tensor(b, dtype=dtype, requires_grad=True)
    assert iou(x, y) == 0
    assert -1 - 1e-6 <= generalized_iou(x, y) <= 0
    for measure in (iou, generalized_iou):
        for gradient in torch.autograd.grad(measure(x, y), (x, y)):
            assert gradient.isfinite().all()


@pytest.mark.parametrize("size", [1e3, 1e6, 1e9, 1e18, 1e20])
def test_boxes_of_any_size_give_finite_overlaps_and_gradients(size):
    """Distances decoded by exp overshoot early in training."""
    x = torch.tensor([-size, -size, size, size], requires_grad=True)
    for other in (torch.tensor(NORMAL), torch.tensor([0, 0, size, size])):
        for measure in (iou, generalized_iou):
            value = measure(x, other)
            assert value.isfinite()
            assert torch.autograd.grad(value, x)[0].isfinite().all()


@pytest.mark.parametrize("measure", [iou, generalized_iou])
def test_overlaps_pass_gradcheck(measure):
    a = torch.tensor([[0.0, 0, 7, 5], [2, 1, 9, 13], [30, 30, 33, 31]], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([[1.0, 2, 8, 9], [0, 0, 6, 5], [1, 2, 3, 4]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(measure, (a, b))


def test_generalized_iou_of_hand_made_boxes():
    a = torch.tensor([0.0, 0, 2, 2])
    assert float(generalized_iou(a, torch.tensor([1.0, 0, 3, 2]))) == pytest.approx(1 / 3)  # the hull is the union
    assert float(generalized_iou(a, torch.tensor([3.0, 0, 5, 2]))) == pytest.approx(-2 / 10)
    assert float(generalized_iou(a, torch.tensor([1.0, 1, 3, 3]))) == pytest.approx(1 / 7 - 2 / 9)


def test_areas_of_inverted_boxes_are_zero():
    assert area(torch.tensor([[0.0, 0, 2, 3], INVERTED, [5, 0, 0, 5], LINE])).tolist() == [6, 0, 0, 0]


@given(boxes(0, 600), st.tuples(st.integers(1, 300), st.integers(1, 300)))
def test_clip_equals_torchvision_and_keeps_boxes_inside(a, size):
    clipped = clip(a, size)
    assert torch.equal(clipped, clip_boxes_to_image(a, size))
    assert torch.equal(clip(clipped, size), clipped)
    assert (clipped <= torch.tensor([size[1], size[0]] * 2)).all()


def test_clip_cuts_height_and_width_each_at_its_own_border():
    assert clip(torch.tensor([[-5.0, -6, 70, 80]]), (50, 60)).tolist() == [[0, 0, 60, 50]]


def test_scale_moves_x_with_the_width_and_y_with_the_height():
    assert scale(torch.tensor([[1.0, 2, 3, 4]]), (10, 100), (50, 200)).tolist() == [[2, 10, 6, 20]]


@given(boxes(1, 600), st.tuples(*[st.integers(1, 2000)] * 2), st.tuples(*[st.integers(1, 2000)] * 2))
def test_scaling_there_and_back_changes_nothing(a, source, target):
    torch.testing.assert_close(scale(scale(a, source, target), target, source), a, rtol=1e-4, atol=1e-3)


def test_half_precision_becomes_float32_and_the_rest_stays():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert at_least_float32(torch.zeros(1, dtype=dtype)).dtype == torch.float32
    assert at_least_float32(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
