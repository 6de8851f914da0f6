"""`probe_detector`: what it finds, what it costs in passes, and what it leaves alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crosskd_assign import (
    AuxiliaryHead,
    CrossHeadDistiller,
    DensePredictions,
    DetectorAdapter,
    GridLevel,
    ResizingAdapter,
    adapt,
)
from crosskd_assign.detectors import PyramidLevel, probe_detector
from crosskd_assign.detectors.probing import evaluation_mode
from crosskd_assign.errors import DetectorError
from crosskd_assign.structures import Batch
from tests.makers.builders import TinyAdapter, TinyNetwork, tiny_detector
from tests.makers.small_models import MAKERS, small_fcos, small_retinanet, snapshot

each_kind = pytest.mark.parametrize("kind", MAKERS)


def counted(model: nn.Module) -> Counter[str]:
    """Counts passes of a torchvision detector's backbone and head, from now on."""
    counts: Counter[str] = Counter()
    for name in ("backbone", "head"):

        def note(*_: Any, name: str = name) -> None:
            counts[name] += 1

        getattr(model, name).register_forward_hook(note)
    return counts


class Calls(TinyAdapter):
    """Counts what is asked of the adapter itself."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.calls: Counter[str] = Counter()

    def features(self, batch: Batch) -> list[Tensor]:
        self.calls["features"] += 1
        return super().features(batch)

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        self.calls["head"] += 1
        return super().head(features, image_size)


# --- passes -----------------------------------------------------------------------------------------------------------


@each_kind
def test_a_probe_is_one_pass_of_the_features_and_one_of_the_head(kind):
    model = MAKERS[kind]()
    counts = counted(model)
    probe_detector(adapt(model))
    assert counts == {"backbone": 1, "head": 1}


@pytest.mark.parametrize("entry", [0, 2])
def test_building_a_distiller_is_one_pass_of_each_detector(entry):
    models = small_retinanet(1), small_retinanet(2, channels=64)
    counts = [counted(model) for model in models]
    distiller = CrossHeadDistiller(*models, entry=entry)
    assert counts == [{"backbone": 1, "head": 1}] * 2
    distiller.attach_teacher(small_retinanet(3, channels=64))
    assert counts[0] == {"backbone": 1, "head": 1}, "the student was measured already"


def test_an_adapter_of_ones_own_is_asked_as_seldom():
    student, teacher = Calls(TinyNetwork()), Calls(TinyNetwork())
    CrossHeadDistiller(student, teacher)
    assert student.calls == teacher.calls == {"features": 1, "head": 1}


def test_an_auxiliary_head_is_built_with_one_pass():
    model = small_fcos()
    counts = counted(model)
    AuxiliaryHead(model)
    assert counts == {"backbone": 1, "head": 1}


# --- what it finds ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "levels"),
    [
        (small_fcos, [(32, 8), (32, 16), (32, 32), (32, 64), (32, 128)]),
        (lambda: small_retinanet(levels=3, channels=64), [(64, 8), (64, 16), (64, 32)]),
        (lambda: small_fcos(levels=3, stem_stride=8), [(32, 16), (32, 32), (32, 64)]),
        (lambda: tiny_detector(channels=12), [(12, 8), (12, 16), (12, 32)]),
    ],
    ids=["fcos", "retinanet", "coarse", "tiny"],
)
def test_channels_and_strides_are_measured(make: Callable[[], Any], levels: list[tuple[int, float]]):
    probe = probe_detector(adapt(make()))
    assert probe.levels == tuple(PyramidLevel(channels, float(stride)) for channels, stride in levels)
    assert probe.strides == [stride for _, stride in levels]
    assert probe.image_size == (256, 256)
    assert [tuple(x.shape) for x in probe.features] == [(2, c, 256 // s, 256 // s) for c, s in levels]
    assert probe.predictions.logits.shape[0] == 2


def test_declared_strides_win_over_measured_ones():
    class Declared(TinyAdapter):
        strides = (10.0, 20.0, 40.0)

    assert probe_detector(Declared(TinyNetwork())).strides == [10, 20, 40]
    adapter = tiny_detector()
    adapter.strides = [7.5, 15.0, 30.0]
    assert probe_detector(adapter).strides == [7.5, 15, 30]
    distiller = CrossHeadDistiller(Declared(TinyNetwork()), Declared(TinyNetwork()))
    assert [level.stride for level in distiller.student_entry.pyramid] == [10, 20, 40]


@pytest.mark.parametrize("strides", [(8.0, 16.0), (8.0, 16.0, 32.0, 64.0)], ids=["few", "many"])
def test_declared_strides_of_another_number_than_the_maps_are_refused_by_name(strides):
    adapter = tiny_detector()
    adapter.strides = strides
    with pytest.raises(DetectorError, match=rf"3 strides, one a map, but got {len(strides)} \(TinyAdapter\.strides\)"):
        probe_detector(adapter)


class WithBins(TinyAdapter):
    """A head with both optional branches."""

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        made = super().head(features, image_size)
        bins = made.logits.new_zeros(*made.logits.shape[:2], 4, 5)
        return DensePredictions.from_bins(made.logits, bins, made.levels or (), quality=made.quality)


def test_branches_are_those_that_the_head_predicts():
    assert probe_detector(adapt(small_fcos())).branches == {"quality"}
    assert probe_detector(adapt(small_retinanet())).branches == frozenset()
    assert probe_detector(WithBins(TinyNetwork())).branches == {"quality", "distribution"}


@pytest.mark.parametrize("inplace", [False, True])
def test_a_head_that_edits_its_maps_is_found_out_and_the_maps_of_the_probe_are_clean(inplace):
    model = small_fcos()
    model.head.classification_head.conv.insert(0, nn.ReLU(inplace))
    adapter = adapt(model)
    probe = probe_detector(adapter)
    assert probe.edits_features is inplace
    with evaluation_mode(adapter):
        size = ((256, 256),) * 2
        clean = adapter.features(Batch(torch.zeros(2, 3, 256, 256), size, size))
    torch.testing.assert_close(probe.features, clean, atol=0, rtol=0)


# --- networks that do not take 256 pixels -----------------------------------------------------------------------------


class TakesOnly(TinyAdapter):
    """Runs on images of one size, as networks with a table of positions do."""

    size = 256

    def features(self, batch: Batch) -> list[Tensor]:
        if batch.image_size != (self.size,) * 2:
            raise RuntimeError(f"The size of tensor a ({batch.image_size[0]}) must match {self.size}\nand more")
        return super().features(batch)


class Prepares(TakesOnly, ResizingAdapter):
    """Brings images to that size."""


@pytest.mark.parametrize("fit", ["letterbox", "stretch", "longer"])
@pytest.mark.parametrize("size", [128, 320, 640])
def test_a_network_of_one_size_is_probed_through_its_own_preprocess(size, fit):
    adapter = Prepares(TinyNetwork(), size=size, fit=fit)
    adapter.size = size
    probe = probe_detector(adapter)
    assert probe.image_size == (size, size)
    assert probe.strides == [8, 16, 32]
    teacher = tiny_detector(1)
    assert [level.stride for level in CrossHeadDistiller(adapter, teacher).student_entry.pyramid] == [8, 16, 32]


def test_a_network_of_large_images_without_resizing_gets_larger_blank_ones():
    adapter = TakesOnly(TinyNetwork())
    adapter.size = 1024
    assert probe_detector(adapter).image_size == (1024, 1024)


def test_levels_that_are_one_cell_each_on_256_pixels_are_told_apart_on_larger_images():
    class Coarse(TinyAdapter):
        """Strides of 128, 256 and 512."""

        def features(self, batch: Batch) -> list[Tensor]:
            return [nn.functional.avg_pool2d(x, 16, ceil_mode=True) for x in super().features(batch)]

        def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
            levels = [GridLevel.of(x, 128 * 2**i) for i, x in enumerate(features)]
            out = torch.cat([self.model.regression(x).flatten(2).transpose(1, 2) for x in features], dim=1)
            return DensePredictions.from_sides(out, out.exp(), levels)

    assert probe_detector(Coarse(TinyNetwork())).strides == [128, 256, 512]


def test_a_network_that_takes_no_blank_image_is_refused_with_the_first_reason():
    adapter = TakesOnly(TinyNetwork())
    adapter.size = 333
    message = (
        r"got RuntimeError: The size of tensor a \(256\) must match 333 \(TakesOnly, on a blank image of 256 pixels\)"
    )
    with pytest.raises(DetectorError, match=message) as caught:
        probe_detector(adapter)
    assert "ResizingAdapter" in caught.value.fix


# --- what it leaves alone ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("training", [True, False])
def test_modes_statistics_gradients_and_random_numbers_stay(norm, training):
    model = small_fcos(norm=norm).train(training)
    model.backbone.body[1].train(not training)  # a mode of its own
    adapter = adapt(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    modes, before = {m: m.training for m in adapter.modules()}, snapshot(adapter)
    trainable = [p.requires_grad for p in model.parameters()]
    generator = torch.get_rng_state()
    probe = probe_detector(adapter)
    assert {m: m.training for m in adapter.modules()} == modes
    torch.testing.assert_close(snapshot(adapter), before, atol=0, rtol=0)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert torch.equal(torch.get_rng_state(), generator)
    assert not any(x.requires_grad for x in (*probe.features, probe.predictions.logits))


def test_modes_come_back_after_an_error():
    adapter = tiny_detector(batch_norm=True).train()

    def fail() -> None:
        assert not any(module.training for module in adapter.modules())
        assert not torch.is_grad_enabled()
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"), evaluation_mode(adapter):
        fail()
    assert all(module.training for module in adapter.modules())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_blank_images_have_the_dtype_of_the_network(dtype):
    probe = probe_detector(tiny_detector().to(dtype))
    assert {x.dtype for x in probe.features} == {dtype}


# --- what it refuses --------------------------------------------------------------------------------------------------


class Returns(TinyAdapter):
    """Features that are whatever one says."""

    returned: Any = None

    def features(self, batch: Batch) -> list[Tensor]:
        return self.returned  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"p3": torch.zeros(2, 8, 32, 32)}, "a list of maps, but got dict"),
        ([], "a list of maps, but got list"),
        (torch.zeros(2, 8, 32, 32), "a list of maps, but got Tensor"),
        ([torch.zeros(2, 8, 32, 32), torch.zeros(2, 8)], r"got shape \(2, 8\) \(Returns.features\(\)\[1\]\)"),
        (["p3"], r"got str \(Returns.features\(\)\[0\]\)"),
    ],
)
def test_features_that_are_no_list_of_maps_are_refused_by_name(returned, message):
    adapter: DetectorAdapter = Returns(TinyNetwork())
    adapter.returned = returned  # type: ignore[assignment]
    with pytest.raises(DetectorError, match=message):
        probe_detector(adapter)
