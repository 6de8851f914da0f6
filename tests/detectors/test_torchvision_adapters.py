"""The built-in adapters say of an image exactly what torchvision says of it."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator

from crosskd_assign import DensePredictions, DetectorAdapter, EndToEndDetector, adapt
from crosskd_assign.detectors import PyramidLevel, probe_detector
from crosskd_assign.errors import DetectorError, UnknownDetectorError
from crosskd_assign.structures import Batch
from tests.makers.small_models import (
    CLASSES,
    MAKERS,
    STRIDES,
    SmallBackbone,
    backward,
    gradients,
    scene,
    small_fcos,
    small_retinanet,
    snapshot,
    total,
)

# The map sizes of P6 and P7 divide none of the padded images but the first.
SIZES = {
    "equal": ((64, 64), (64, 64)),
    "mixed": ((64, 90), (75, 64)),
    "uneven": ((96, 150), (88, 160), (64, 64)),
    "tall": ((150, 70),),
}


def torchvision_says(model, images, targets=None) -> DensePredictions:
    """Everything recomputed from torchvision's transform, head, anchor generator and box coder."""
    image_list, _ = model.transform(images, targets)
    features = list(model.backbone(image_list.tensors).values())
    output = model.head(features)
    anchors = model.anchor_generator(image_list, features)
    decode = model.box_coder.decode if isinstance(model, FCOS) else model.box_coder.decode_single
    boxes = torch.stack([decode(r, a) for r, a in zip(output["bbox_regression"], anchors, strict=True)])
    points = (anchors[0][:, :2] + anchors[0][:, 2:]) / 2
    quality = output["bbox_ctrness"][..., 0] if "bbox_ctrness" in output else None
    return DensePredictions(output["cls_logits"], boxes, points, torch.empty(0), quality)


def adapter_says(model, images) -> DensePredictions:
    adapter = adapt(model)
    batch, _ = adapter.preprocess(images)
    return adapter.head(adapter.features(batch), batch.image_size)


def same_detections(ours, theirs, tolerance: float = 5e-3) -> bool:
    """Whether both hold the same (box, label, score) rows in whatever order, so that ties do not matter."""
    a, b = (torch.cat([d["boxes"], 1000 * d["labels"][:, None], 100 * d["scores"][:, None]], 1) for d in (ours, theirs))
    distance = (a[:, None] - b[None]).abs().amax(dim=-1)
    nearest = max(distance.amin(0).max().item(), distance.amin(1).max().item())
    return len(a) == len(b) and nearest < tolerance


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", MAKERS)
class TestPredictions:
    def test_logits_boxes_centerness_and_points_are_torchvisions_own(self, kind, training, sizes):
        model = MAKERS[kind](max_size=160).train(training)
        images, _ = scene(sizes)
        ours, theirs = adapter_says(model, images), torchvision_says(model, images)
        torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.boxes, theirs.boxes, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(ours.points, theirs.points, atol=0, rtol=0)
        if isinstance(model, FCOS):
            torch.testing.assert_close(ours.quality, theirs.quality, atol=1e-4, rtol=1e-4)
        else:
            assert ours.quality is None
        assert ours.boxes.std(dim=1).min() > 1, "the model says the same everywhere, so this test shows nothing"

    def test_strides_are_those_of_the_levels(self, kind, training, sizes):
        model = MAKERS[kind](max_size=160).train(training)
        images, _ = scene(sizes)
        adapter = adapt(model)
        batch, _ = adapter.preprocess(images)
        maps = adapter.features(batch)
        predictions = adapter.head(maps, batch.image_size)
        anchors = 1 if isinstance(model, FCOS) else 2
        if isinstance(model, FCOS):
            expected = list(STRIDES)
        else:
            height, width = batch.images.shape[-2:]
            expected = [max(height // m.shape[-2], width // m.shape[-1]) for m in maps]
        counts = [m.shape[-2] * m.shape[-1] * anchors for m in maps]
        torch.testing.assert_close(
            predictions.strides, torch.tensor(expected).repeat_interleave(torch.tensor(counts)).float()
        )


@pytest.mark.parametrize("sizes", [SIZES["uneven"], SIZES["tall"]], ids=["uneven", "tall"])
@pytest.mark.parametrize("kind", MAKERS)
def test_detections_are_torchvisions_own_with_suppression_switched_off(kind, sizes):
    unlimited = {"score_thresh": 0.0, "nms_thresh": 1.1, "detections_per_img": 10**6, "topk_candidates": 10**6}
    model = MAKERS[kind](max_size=160, **unlimited).eval()
    if isinstance(model, FCOS):  # certain centerness: torchvision's score becomes the root of the class score
        nn.init.zeros_(model.head.regression_head.bbox_ctrness.weight)
        nn.init.constant_(model.head.regression_head.bbox_ctrness.bias, 30)
    images, _ = scene(sizes)
    ours = EndToEndDetector(model, top_k=10**6).eval()(images)
    for mine, theirs in zip(ours, model(images), strict=True):
        scores = theirs["scores"] ** 2 if isinstance(model, FCOS) else theirs["scores"]
        assert same_detections(mine, {**theirs, "scores": scores})


TRANSFORMS = {
    "resized": {"min_size": 48, "max_size": 80},
    "enlarged": {"min_size": 100, "max_size": 300},
    "as it is": {"_skip_resize": True},
    "several scales": {"min_size": (32, 48, 64, 80), "max_size": 200},
    "fixed": {"fixed_size": (96, 64)},
    "other padding": {"size_divisible": 64},
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("kind", ["fcos", "retinanet"])
def test_preprocessing_is_the_models_own_transform(kind, transform, training):
    options = {"image_mean": [0.1, 0.5, 0.9], "image_std": [0.3, 0.2, 0.7], **transform}
    model = MAKERS[kind](**options).train(training)
    adapter = adapt(model)
    images, targets = scene(((64, 90), (75, 64), (100, 100)), boxes=(1, 0, 3))
    targets[2]["image_id"] = torch.tensor(7)
    torch.manual_seed(5)  # scales are drawn
    batch, moved = adapter.preprocess(images, targets)
    torch.manual_seed(5)
    expected, expected_targets = model.transform(images, targets)
    torch.testing.assert_close(adapter.normalize(batch), expected.tensors, atol=1e-5, rtol=1e-5)
    assert list(batch.sizes) == [tuple(size) for size in expected.image_sizes]
    assert batch.original_sizes == ((64, 90), (75, 64), (100, 100))
    torch.testing.assert_close(moved, expected_targets)
    for i, (height, width) in enumerate(batch.sizes):
        assert not batch.images[i, :, height:].any()
        assert not batch.images[i, :, :, width:].any()
        assert batch.images[i, :, :height, :width].any()


def test_preprocessing_edits_neither_images_nor_targets():
    images, targets = scene(((64, 90), (75, 64)))
    before = [x.clone() for x in [*images, *(t["boxes"] for t in targets)]]
    adapter = adapt(small_fcos(min_size=40))
    batch, moved = adapter.preprocess(images, targets)
    pixels = batch.images.clone()
    adapter.features(batch)
    assert torch.equal(batch.images, pixels), "another detector is to see the same batch"
    assert moved is not None
    assert not torch.equal(moved[0]["boxes"], targets[0]["boxes"])
    for was, now in zip(before, [*images, *(t["boxes"] for t in targets)], strict=True):
        torch.testing.assert_close(now, was, atol=0, rtol=0)


def test_images_of_one_tensor_are_prepared_as_a_list_of_them():
    images, targets = scene(((64, 96), (64, 96)))
    adapter = adapt(small_fcos())
    one, moved = adapter.preprocess(torch.stack(images), targets)
    many, _ = adapter.preprocess(images, targets)
    assert torch.equal(one.images, many.images)
    assert one.sizes == many.sizes
    assert moved is not None
    assert len(moved) == 2


@pytest.mark.parametrize("kind", MAKERS)
def test_training_mode_changes_no_prediction(kind):
    model = MAKERS[kind]()
    images, _ = scene(SIZES["mixed"])
    train, evaluate = adapter_says(model.train(), images), adapter_says(model.eval(), images)
    assert torch.equal(train.boxes, evaluate.boxes)
    assert torch.equal(train.logits, evaluate.logits)


@pytest.mark.parametrize("kind", MAKERS)
def test_under_bfloat16_autocast_boxes_are_still_decoded_in_float32(kind):
    model = MAKERS[kind](min_size=64, max_size=320).eval()
    adapter = adapt(model)
    images, _ = scene(((64, 320),))
    batch, _ = adapter.preprocess(images)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        maps = adapter.features(batch)
        ours = adapter.head(maps, batch.image_size)
        output = model.head(maps)
    assert output["bbox_regression"].dtype == torch.bfloat16, "autocast was not on"
    assert ours.boxes.dtype == ours.points.dtype == torch.float32
    torch.testing.assert_close(ours.points, adapter_says(model, images).points, atol=0, rtol=0)

    image_list, _ = model.transform(images)
    anchors = model.anchor_generator(image_list, [m.double() for m in maps])[0]
    decode = model.box_coder.decode if isinstance(model, FCOS) else model.box_coder.decode_single
    expected = decode(output["bbox_regression"][0].double(), anchors)
    torch.testing.assert_close(ours.boxes[0].double(), expected, atol=1e-3, rtol=1e-6)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_first_call_in_inference_mode_leaves_nothing_that_training_cannot_use(kind):
    detector = EndToEndDetector(MAKERS[kind]())
    images, targets = scene()
    with torch.inference_mode():
        detector.eval()(images)
    backward(detector.train()(images, targets))
    assert gradients(detector.model.backbone)


def test_batches_of_changing_shapes_do_not_confuse_each_other():
    model = small_fcos(max_size=160)
    adapter = adapt(model)
    for name in ("equal", "tall", "uneven", "equal", "tall"):
        images, _ = scene(SIZES[name])
        batch, _ = adapter.preprocess(images)
        ours = adapter.head(adapter.features(batch), batch.image_size)
        torch.testing.assert_close(ours.boxes, torchvision_says(model, images).boxes, atol=1e-3, rtol=1e-4)


def test_what_an_adapter_remembers_of_batches_travels_in_no_pickle():
    adapter = adapt(small_retinanet(max_size=400))
    before = len(pickle.dumps(adapter))
    for width in range(100, 400, 32):
        adapter_says(adapter, [torch.rand(3, 64, width)])
    assert len(pickle.dumps(adapter)) < before + 1000


# --- adapt ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [nn.Linear(1, 1), nn.Sequential(small_fcos())], ids=["linear", "wrapped"])
def test_an_unknown_model_is_refused_with_a_message_that_says_what_to_write(model):
    with pytest.raises(UnknownDetectorError) as caught:
        adapt(model)
    message = str(caught.value)
    for word in (type(model).__qualname__, "FCOS", "RetinaNet", "DetectorAdapter", "features", "head", "Fix:"):
        assert word in message


def test_adapting_an_adapter_gives_the_adapter_itself():
    adapter = adapt(small_retinanet())
    assert adapt(adapter) is adapter


def test_the_adapter_wraps_the_model_and_copies_nothing():
    model = small_fcos()
    adapter = adapt(model)
    assert adapter.model is model
    assert adapter.part("neck") is model.backbone.fpn
    assert adapter.part("head") is model.head
    names = {"stem", "body"}
    assert {name.partition(".")[0] for name in adapter.part("backbone").state_dict()} == names
    together = {id(p) for part in adapter.parts().values() for p in part.parameters()}
    assert together == {id(p) for p in model.parameters()}
    assert set(adapter.parameters()) == set(model.parameters())
    assert {name.removeprefix("model.") for name in adapter.state_dict()} == set(model.state_dict())


def test_centerness_alone_is_left_unused_by_one_to_one_training():
    fcos = small_fcos()
    assert set(adapt(fcos).unused_parameters()) == set(fcos.head.regression_head.bbox_ctrness.parameters())
    assert not list(adapt(small_retinanet()).unused_parameters())


class OneConvolution(nn.Module):
    """An FCOS head of another build: same answers, no part that is called as torchvision's."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, classes + 5, 1)

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        rows = torch.cat([self.conv(level).flatten(2).transpose(1, 2) for level in x], dim=1)
        return {"cls_logits": rows[..., 5:], "bbox_regression": rows[..., :4].exp(), "bbox_ctrness": rows[..., 4:5]}


def test_an_fcos_head_of_another_build_trains():
    fcos = small_fcos()
    channels = fcos.backbone.out_channels
    fcos.head = OneConvolution(channels, 3)
    assert not list(adapt(fcos).unused_parameters())
    targets = [{"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1])}]
    losses = EndToEndDetector(fcos).train()([torch.rand(3, 64, 64)], targets)
    torch.stack(list(losses.values())).sum().backward()
    assert fcos.head.conv.weight.grad is not None


# --- pyramid ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [3, 5])
@pytest.mark.parametrize("channels", [32, 64])
def test_the_pyramid_has_the_channels_and_strides_of_the_backbone(channels, levels):
    pyramid = list(probe_detector(adapt(small_fcos(channels=channels, levels=levels))).levels)
    assert pyramid == [PyramidLevel(channels, float(stride)) for stride in STRIDES[:levels]]


def test_a_backbone_of_a_single_map_is_a_pyramid_of_one_level():
    backbone = nn.Sequential(nn.Conv2d(3, 32, 16, stride=16))
    backbone.out_channels = 32  # type: ignore[assignment]
    model = FCOS(backbone, CLASSES, anchor_generator=AnchorGenerator(((16,),), ((1.0,),)), min_size=64, max_size=64)
    assert probe_detector(adapt(model)).levels == (PyramidLevel(32, 16.0),)
    images, targets = scene()
    assert total(EndToEndDetector(model)(images, targets)).isfinite()


def test_measuring_the_pyramid_leaves_modes_and_batch_norm_statistics_alone():
    model = small_fcos(norm="batch")
    model.backbone.body[0].eval()  # somebody keeps a part of it frozen
    adapter = adapt(model)
    modes = {name: module.training for name, module in adapter.named_modules()}
    before = snapshot(adapter)
    probe_detector(adapter)
    assert {name: module.training for name, module in adapter.named_modules()} == modes
    for name, value in snapshot(adapter).items():
        assert torch.equal(value, before[name]), name


class Broken(DetectorAdapter):
    """An adapter whose features() returns whatever it is given."""

    def __init__(self, result: Any) -> None:
        super().__init__(SmallBackbone())
        self.result = result

    def features(self, batch: Batch) -> list[Tensor]:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result  # type: ignore[no-any-return]

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        raise NotImplementedError


@pytest.mark.parametrize(
    "result",
    [
        torch.zeros(1, 8, 4, 4),
        {"0": torch.zeros(1, 8, 4, 4)},
        [torch.zeros(8, 4, 4)],
        [[torch.zeros(1, 8, 4, 4)]],
        None,
    ],
    ids=["one map", "dict", "map without batch", "nested", "nothing"],
)
def test_features_that_are_no_list_of_maps_are_refused_by_name(result):
    with pytest.raises(DetectorError, match=r"Broken\.features\(\)"):
        probe_detector(Broken(result))


def test_modes_are_restored_even_if_features_fail():
    adapter = Broken(RuntimeError("on purpose"))
    with pytest.raises(DetectorError, match=r"RuntimeError: on purpose \(Broken, on a blank image of 256 pixels\)"):
        probe_detector(adapter)
    assert all(module.training for module in adapter.modules())


@pytest.mark.parametrize("kind", MAKERS)
def test_no_side_of_a_thin_image_vanishes(kind):
    """torchvision refuses an image whose shorter side would be resized to less than a pixel."""
    detector = EndToEndDetector(MAKERS[kind](max_size=160)).eval()
    images = [torch.rand(3, 2, 900), torch.rand(3, 900, 3), torch.rand(3, 64, 64)]
    boxes = [torch.tensor([[0.0, 0, 450, 2]]), torch.tensor([[1.0, 0, 2, 900]]), torch.tensor([[8.0, 8, 24, 24]])]
    targets = [{"boxes": each, "labels": torch.tensor([1])} for each in boxes]
    batch, moved = detector.adapter.preprocess(images, targets)
    assert [min(size) for size in batch.sizes[:2]] == [1, 1]
    for target, given, size, original in zip(moved, boxes, batch.sizes, batch.original_sizes, strict=True):
        scale = torch.tensor([size[1] / original[1], size[0] / original[0]] * 2)
        torch.testing.assert_close(target["boxes"], given * scale)
    for image, found in zip(images, detector(images), strict=True):
        assert (found["boxes"] >= 0).all()
        assert (found["boxes"][:, 2:] <= torch.tensor([image.shape[2], image.shape[1]]) + 1e-3).all()
