"""Crowds overlap by what was asked for, in every draw, and lie in the picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from coco_example.data.crowds import iou, sample_groups
from torchvision.ops import box_iou


def overlaps(group: np.ndarray) -> np.ndarray:
    boxes = torch.from_numpy(group)
    return box_iou(boxes, boxes).fill_diagonal_(0).numpy()


@pytest.mark.parametrize("target", [0.0, 0.3, 0.6, 0.9])
def test_neighbours_overlap_by_the_target_and_others_by_no_more(target):
    sizes = []
    for k in range(60):
        groups = sample_groups(np.random.default_rng((1, k)), 128, (target, target))
        assert groups
        for group in groups:
            sizes.append(len(group))
            found = overlaps(group)
            assert np.diagonal(found, 1) == pytest.approx(np.full(len(group) - 1, target), abs=1e-6)
            assert found.max() <= target + 1e-5
            assert group.min() >= 0
            assert group.max() <= 128 + 1e-9
    assert set(sizes) == {1, 2, 3, 4}
    assert np.mean(np.array(sizes) > 1) > 0.5


def test_a_range_is_drawn_from_evenly():
    drawn = [
        x
        for k in range(200)
        for group in sample_groups(np.random.default_rng((2, k)), 128, (0.0, 0.9))
        for x in np.diagonal(overlaps(group), 1)
    ]
    counts, _ = np.histogram(drawn, bins=3, range=(0, 0.9))
    assert counts.min() > 0.2 * len(drawn)  # flat chains are harder to fit into a picture


def test_groups_do_not_touch_and_are_drawn_again_with_the_seed():
    for k in range(40):
        groups = sample_groups(np.random.default_rng((3, k)), 128, (0.5, 0.5))
        again = sample_groups(np.random.default_rng((3, k)), 128, (0.5, 0.5))
        assert all(np.array_equal(a, b) for a, b in zip(groups, again, strict=True))
        for i, group in enumerate(groups):
            for other in groups[:i]:
                assert box_iou(torch.from_numpy(group), torch.from_numpy(other)).max() == 0


def test_the_iou_is_torchvisions():
    boxes = np.random.default_rng(0).uniform(0, 5, (6, 4)) + np.array([0, 0, 5, 5])
    expected = box_iou(torch.from_numpy(boxes[:1]), torch.from_numpy(boxes))[0].numpy()
    assert iou(boxes[0], boxes) == pytest.approx(expected)
