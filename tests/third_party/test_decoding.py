"""Boxes and scores of each adapter are those of its package's own inference, on the same weights and images."""

from __future__ import annotations

import os

import pytest
import torch
from ssdlite_detector import SSDLiteAdapter
from torch import Tensor

from crosskd_assign import DensePredictions, DetectorAdapter, EndToEndDetector, functional
from crosskd_assign.postprocessing import suppress, top_detections
from crosskd_assign.structures import Batch
from tests.third_party.makers import CLASSES, SIZE, make_detector


def built(name: str) -> DetectorAdapter:
    return make_detector(name).eval()


@torch.no_grad()
def predicted(adapter: DetectorAdapter, images: Tensor) -> tuple[DensePredictions, Batch]:
    batch, _ = adapter.preprocess(images)
    return adapter.head(adapter.features(batch), batch.image_size), batch


def pixels(height: int = SIZE, width: int = SIZE) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(3))


# --- ultralytics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(96, 96), (64, 160)])
@pytest.mark.parametrize("name", ["yolov8n", "yolo11n", "yolo26n"])
def test_yolo_predicts_what_its_own_inference_predicts(name, size):
    adapter = built(name)
    images = pixels(*size)
    mine, _ = predicted(adapter, images)
    with torch.no_grad():
        theirs = adapter.model(images)[0].transpose(1, 2)  # (N, A, 4 + C): centre, size, scores
    centre, extent, scores = theirs.split([2, 2, CLASSES], dim=2)
    boxes = torch.cat([centre - extent / 2, centre + extent / 2], dim=2)
    torch.testing.assert_close(mine.boxes, boxes, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(mine.logits.sigmoid(), scores, rtol=1e-4, atol=1e-6)
    assert (mine.distribution is None) == (name == "yolo26n")


def test_a_student_in_the_one_to_one_branch_detects_the_same_through_the_packages_end_to_end_inference():
    adapter = built("yolo26n-one-to-one")
    for branch in adapter.model.model[-1].one2one_cv3:
        branch[-1].weight.data *= 0.05  # scores of 1.0 would be in no order
    images = pixels()
    detections = EndToEndDetector(adapter, top_k=50).eval()(images)
    adapter.model.end2end = True
    with torch.no_grad():
        theirs = adapter.model(images)[0]  # (N, 300, 6): corners, score, class
    for mine, row in zip(detections, theirs, strict=True):
        torch.testing.assert_close(mine["scores"], row[:50, 4], rtol=1e-4, atol=1e-6)
        assert mine["labels"].tolist() == row[:50, 5].long().tolist()
        boxes = row[:50, :4].clamp(0, SIZE)  # the package leaves clipping to later
        torch.testing.assert_close(mine["boxes"], boxes, rtol=1e-4, atol=1e-3)


# --- effdet -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(128, 128), (160, 192)])
def test_efficientdet_detects_what_its_own_predict_bench_detects_at_any_size(size):
    effdet = pytest.importorskip("effdet")
    adapter = built("effdet")  # built for 320 × 320
    own = effdet.create_model("tf_efficientdet_lite0", num_classes=CLASSES, pretrained_backbone=False, image_size=size)
    own.load_state_dict(adapter.model.state_dict())
    images = pixels(*size)
    mine, batch = predicted(adapter, images)
    with torch.no_grad():
        theirs = effdet.DetBenchPredict(own).eval()(adapter.normalize(batch))  # (N, 100, 6): corners, score, class + 1
    for scores, boxes, labels, row in zip(*top_detections(mine, 5000), theirs, strict=True):
        kept = suppress({"boxes": boxes, "scores": scores, "labels": labels}, 0.5)
        torch.testing.assert_close(kept["scores"], row[:, 4], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(kept["boxes"], row[:, :4], rtol=1e-4, atol=1e-2)
        assert (kept["labels"] + 1).tolist() == row[:, 5].long().tolist()


def test_efficientdet_is_left_as_it_was_built():
    pytest.importorskip("effdet")
    adapter = built("effdet")
    image = torch.rand(1, 3, 320, 320, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = adapter.model(image)
        predicted(adapter, pixels(96, 160))
        after = adapter.model(image)
    assert all(torch.equal(x, y) for a, b in zip(before, after, strict=True) for x, y in zip(a, b, strict=True))


# --- torchvision's SSDlite --------------------------------------------------------------------------------------------


def test_ssdlite_detects_what_its_own_inference_detects():
    adapter = built("ssdlite")
    assert isinstance(adapter, SSDLiteAdapter)
    model = adapter.model
    model.score_thresh, model.nms_thresh, model.topk_candidates, model.detections_per_img = 0.0, 1.0, 10**6, 10**6
    images = [torch.rand(3, 80, 120), torch.rand(3, SIZE, SIZE)]
    with torch.no_grad():
        theirs = model(images)
        mine = EndToEndDetector(adapter, top_k=10**6).eval()(images)
    for a, b in zip(mine, theirs, strict=True):
        assert len(a["scores"]) == len(b["scores"]) > 900
        torch.testing.assert_close(a["scores"], b["scores"], rtol=1e-4, atol=1e-6)
        best = slice(0, 200)
        torch.testing.assert_close(a["boxes"][best], b["boxes"][best], rtol=1e-4, atol=1e-2)
        assert (a["labels"][best] + 1).tolist() == b["labels"][best].tolist()


@pytest.mark.parametrize("spread", [1.0, 10.0, 200.0])
def test_sigmoids_of_the_logits_are_the_softmax_with_finite_gradients(spread):
    scores = (spread * torch.randn(50, 5, generator=torch.Generator().manual_seed(0))).requires_grad_()
    logits = functional.sigmoid_logits(scores)
    exact = scores.detach().double().softmax(dim=-1)
    torch.testing.assert_close(logits.detach().double().sigmoid(), exact, rtol=1e-4, atol=1e-7)
    against = logits.detach().double().neg().sigmoid()  # 1 − p, to its own last digits
    others = torch.stack([exact[:, [j for j in range(5) if j != i]].sum(dim=1) for i in range(5)], dim=1)
    torch.testing.assert_close(against, others, rtol=1e-3, atol=1e-30)
    logits.sum().backward()
    assert scores.grad is not None
    assert bool(scores.grad.isfinite().all())


# --- NanoDet and YOLOX with their COCO weights ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nanodet", "yolox"])
def test_trained_detectors_predict_what_their_own_decoding_gives(name):
    adapter = built(name)
    images = pixels(96, 128)
    mine, batch = predicted(adapter, images)
    with torch.no_grad():
        boxes, scores = adapter.model.decode(adapter.model(adapter.normalize(batch)))
    torch.testing.assert_close(mine.boxes, boxes, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(mine.logits.sigmoid(), scores, rtol=1e-3, atol=1e-6)


@pytest.mark.skipif("COCO_DETECTORS" not in os.environ, reason="needs the weights")
def test_coco_categories_skip_the_numbers_that_coco_never_used():
    from nanodet_yolox import COCO_CATEGORIES

    assert len(COCO_CATEGORIES) == 80
    assert (COCO_CATEGORIES[0], COCO_CATEGORIES[11], COCO_CATEGORIES[79]) == (1, 13, 90)
