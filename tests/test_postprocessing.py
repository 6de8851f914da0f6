"""`top_detections` against a sort in Python, with one class a point and with a filter of classes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from crosskd_assign import DensePredictions, EndToEndDetector
from crosskd_assign.errors import OptionError
from crosskd_assign.export import TensorDetector
from crosskd_assign.postprocessing import one_to_many_detections, top_detections
from tests.makers.builders import GRIDS, random_images, random_predictions, random_targets, tiny_detector

CLASSES = 5


def predictions(seed: int = 0, *, ties: bool = False) -> DensePredictions:
    made = random_predictions(random_targets([4, 0, 2], seed=seed), GRIDS[1], seed=seed, classes=CLASSES)
    return replace(made, logits=made.logits.round()) if ties else made


def sorted_pairs(
    made: DensePredictions, n: int, one_class: bool, classes: list[int] | None
) -> list[tuple[float, int, int]]:
    """(logit, point, label) of one image, best first, by brute force."""
    pairs = []
    for a, row in enumerate(made.logits[n].tolist()):
        competing = [(-logit, label) for label, logit in enumerate(row) if classes is None or label in classes]
        pairs += [(logit, a, label) for logit, label in ([min(competing)] if one_class else competing)]
    return [(-logit, a, label) for logit, a, label in sorted(pairs)]


@pytest.mark.parametrize("k", [7, 10**6])
@pytest.mark.parametrize("classes", [None, [3, 1], [4]])
@pytest.mark.parametrize("one_class", [False, True])
def test_the_best_pairs_are_those_of_a_sort(one_class, classes, k):
    made = predictions()
    scores, boxes, labels = top_detections(made, k, one_class_per_point=one_class, classes=classes)
    for n in range(3):
        expected = sorted_pairs(made, n, one_class, classes)[:k]
        assert labels[n].tolist() == [label for _, _, label in expected]
        assert torch.equal(boxes[n], made.boxes[n, [a for _, a, _ in expected]])
        torch.testing.assert_close(scores[n], torch.tensor([logit for logit, _, _ in expected]).sigmoid())


def test_of_classes_that_tie_on_a_point_the_lower_one_is_its_best():
    made = predictions(ties=True)
    tied = (made.logits == made.logits.amax(dim=-1, keepdim=True)).sum(dim=-1) > 1
    assert tied.any(dim=1).all(), "no point has a tie, so this test shows nothing"
    _, boxes, labels = top_detections(made, 10**6, one_class_per_point=True, classes=range(1, CLASSES))
    for n in range(3):
        expected = {(a, label) for _, a, label in sorted_pairs(made, n, True, [1, 2, 3, 4])}
        found = [
            (int((made.boxes[n] == box).all(dim=1).nonzero()[0, 0]), label)
            for box, label in zip(boxes[n], labels[n].tolist(), strict=True)
        ]
        assert len(found) == made.logits.shape[1]
        assert set(found) == expected


def test_a_filter_after_the_best_were_selected_loses_objects_and_this_one_does_not():
    made = predictions()
    k, wanted = 10, 3
    _, _, labels = top_detections(made, k)
    _, _, kept = top_detections(made, k, classes=[wanted])
    assert [int((row == wanted).sum()) for row in kept] == [k] * 3
    assert all(int((row == wanted).sum()) < k for row in labels)


@torch.no_grad()
@pytest.mark.parametrize("one_class", [False, True])
def test_detectors_of_both_kinds_and_tensors_take_the_options(one_class):
    options = {"one_class_per_point": one_class, "classes": np.array([2, 0])}
    adapter, images = tiny_detector(), random_images(2)
    detector = EndToEndDetector(adapter, top_k=30, **options).eval()
    batch, _ = adapter.preprocess(images)
    made = adapter.head(adapter.features(batch), batch.image_size)
    expected = top_detections(made, 30, **options)
    tensors = TensorDetector(detector)(torch.stack(images))
    many = one_to_many_detections(adapter, replace(made, quality=None), batch, nms_threshold=None, top_k=30, **options)
    for n, found in enumerate(detector(images)):
        for other in (found["scores"], tensors[1][n], many[n]["scores"]):
            torch.testing.assert_close(other, expected[0][n])
        for other in (found["labels"], tensors[2][n], many[n]["labels"]):
            assert torch.equal(other, expected[2][n])
        assert torch.equal(found["boxes"], tensors[0][n])
    assert TensorDetector(detector).count(10, 3) == (10 if one_class else 20)


@pytest.mark.parametrize(("classes", "got"), [([], "none at all"), ([-1], "-1"), ([0, 1.5], "1.5"), ([True], "True")])
def test_a_filter_of_no_labels_is_an_error_at_once(classes, got):
    with pytest.raises(OptionError, match=got):
        EndToEndDetector(tiny_detector(), classes=classes)


def test_a_filter_of_labels_that_the_detector_lacks_is_an_error_that_names_them():
    detector = EndToEndDetector(tiny_detector(), classes=[1, 3, 7]).eval()
    with pytest.raises(OptionError, match="0…2, but got 3, 7"):
        detector(random_images(1))
