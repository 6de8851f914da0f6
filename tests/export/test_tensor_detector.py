"""`TensorDetector` says what its detector says, run as it is, traced and compiled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from crosskd_assign import CrossHeadDistiller, EndToEndDetector
from crosskd_assign.errors import OptionError
from crosskd_assign.export import TensorDetector
from crosskd_assign.structures import Batch
from tests.makers.builders import tiny_detector
from tests.makers.small_models import MAKERS, scene, small_fcos

K = 20
SIZES = {"square": (128, 128), "wide": (90, 160), "tall": (150, 70)}
MODELS = {"tiny": tiny_detector, **{kind: lambda k=kind: MAKERS[k](min_size=128, max_size=256) for kind in MAKERS}}


def detector_of(kind: str) -> EndToEndDetector:
    return EndToEndDetector(MODELS[kind](), top_k=K).eval()


def stacked(detections):
    return tuple(torch.stack([d[name] for d in detections]) for name in ("boxes", "scores", "labels"))


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", MODELS)
def test_inside_it_finds_in_a_batch_what_the_detector_finds_in_a_list(kind, size):
    detector = detector_of(kind)
    images, _ = scene([size] * 3)
    with torch.no_grad():
        found, expected = TensorDetector(detector)(torch.stack(images)), stacked(detector(images))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert found[2].dtype == torch.int64


@pytest.mark.parametrize("kind", MODELS)
def test_outside_the_batch_may_be_padded_with_the_mean_and_boxes_are_in_its_pixels(kind):
    detector = detector_of(kind)
    adapter = detector.adapter
    images, _ = scene([(128, 150)] * 2)
    mean = adapter.image_mean.view(1, 3, 1, 1)
    padded = mean + F.pad(torch.stack(images) - mean, (0, 160 - 150))
    with torch.no_grad():
        boxes, scores, labels = TensorDetector(detector, preprocessing="outside")(padded)
        batch = Batch(padded, ((128, 150),) * 2, ((128, 160),) * 2)  # what is known of the padding inside
        expected = adapter.head(adapter.features(batch), batch.image_size)
    best = expected.logits.flatten(1).sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(scores, best.values[:, :K].sigmoid(), atol=1e-5, rtol=0)
    assert torch.equal(labels, best.indices[:, :K] % expected.logits.shape[2])
    at = (best.indices[:, :K] // expected.logits.shape[2])[..., None].expand(-1, -1, 4)
    inside = torch.stack(
        [c.clamp(0, side) for c, side in zip(expected.boxes.unbind(2), (160, 128) * 2, strict=True)], 2
    )
    torch.testing.assert_close(boxes, inside.gather(1, at), atol=1e-3, rtol=0)


@pytest.mark.filterwarnings("ignore")  # the exporter's own, about itself
def test_torch_export_takes_it_with_any_number_of_images():
    view = TensorDetector(detector_of("fcos"))
    images = torch.stack(scene([(90, 160)] * 3)[0])
    shapes = {"images": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        program = torch.export.export(view, (images[:2],), dynamic_shapes=shapes, strict=False).module()
        torch.testing.assert_close(program(images), view(images), atol=1e-4, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")  # the compiler's own, about itself
@pytest.mark.parametrize(
    ("kind", "backend"),
    [("tiny", "eager"), pytest.param("fcos", "aot_eager", marks=pytest.mark.slow)],
)
def test_it_compiles_whole(kind, backend):
    torch.compiler.reset()
    view = TensorDetector(detector_of(kind))
    images = torch.stack(scene([(90, 160)] * 2)[0])
    with torch.no_grad():
        compiled = torch.compile(view, backend=backend, fullgraph=True)(images)
        torch.testing.assert_close(compiled, view(images), atol=1e-4, rtol=1e-5)


def test_it_is_the_student_of_a_distiller_and_shares_its_mode_and_weights():
    student, teacher = small_fcos(1), small_fcos(2)
    distiller = CrossHeadDistiller(student, teacher)
    view = TensorDetector(distiller)
    assert view.training
    assert not TensorDetector(distiller.eval()).training
    assert {id(p) for p in view.parameters()} == {id(p) for p in student.parameters()}


def test_preprocessing_is_inside_or_outside():
    with pytest.raises(OptionError, match="both"):
        TensorDetector(detector_of("tiny"), preprocessing="both")
