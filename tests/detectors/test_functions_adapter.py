"""`adapt(model, features=…, head=…)`: two functions do what a subclass does, in copies and files too."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crosskd_assign import CrossHeadDistiller, DensePredictions, DetectorAdapter, EndToEndDetector, adapt
from crosskd_assign.errors import DetectorError, OptionError
from crosskd_assign.testing import check_adapter
from tests.makers import odd_detectors as odd
from tests.makers.small_models import backward, gradients, scene, small_fcos


def maps(model: odd.Net, images: Tensor) -> list[Tensor]:
    return model.maps(images)


def predict(model: odd.Net, features: list[Tensor]) -> DensePredictions:
    return odd.Good(model).head(features, (0, 0))  # its head needs no size


def network(seed: int = 0) -> odd.Net:
    return odd.build(seed=seed).model


def adapter(model: odd.Net | None = None, **options: Any) -> DetectorAdapter:
    model = network() if model is None else model
    functions = {"features": maps, "head": predict, "image_mean": odd.MEAN, "image_std": odd.STD}
    functions["parts"] = {"backbone": model.body}
    return adapt(model, **{**functions, **options})


def test_it_says_what_a_subclass_says_and_passes_all_checks():
    images, targets = scene()
    mine, theirs = EndToEndDetector(adapter()), EndToEndDetector(odd.build())
    torch.testing.assert_close(mine(images, targets), theirs(images, targets))
    torch.testing.assert_close(mine.eval()(images), theirs.eval()(images))
    report = check_adapter(adapter(), images, targets)
    assert report.ok, str(report)
    assert [check.name for check in report.checks if check.outcome == "note"] == ["parts"], str(report)


def test_images_are_normalised_and_padded_before_features_sees_them():
    seen = []

    def features(model: odd.Net, images: Tensor) -> list[Tensor]:
        seen.append(images)
        return model.maps(images)

    images, _ = scene(((50, 64), (64, 40)))
    mine = adapter(features=features, size_divisible=64)
    batch, _ = mine.preprocess(images)
    mine.features(batch)
    torch.testing.assert_close(seen[0], mine.normalize(batch))
    assert seen[0].shape == (2, 3, 64, 64)


def test_its_parameters_are_the_models_once_each():
    model = network()
    mine = adapter(model, features=odd.Net.maps, unused_parameters=model.sides.parameters())
    assert [name for name, _ in mine.named_parameters()] == [f"model.{name}" for name, _ in model.named_parameters()]
    assert set(mine.state_dict()) == {f"model.{name}" for name in model.state_dict()}
    assert mine.part("backbone") is model.body
    assert list(mine.unused_parameters()) == list(model.sides.parameters())
    assert adapter(model, parts=None).parts() == {}
    detector = EndToEndDetector(mine)
    assert not any(p.requires_grad for p in model.sides.parameters())
    assert detector.model is model


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))], ids=["copy", "pickle"])  # noqa: S301
def test_a_copy_runs_the_copied_network(duplicate):
    model = network()
    mine = adapter(model, unused_parameters=model.sides.parameters())
    twin = duplicate(mine)
    assert twin.part("backbone") is twin.model.body
    assert list(map(id, twin.unused_parameters())) == list(map(id, twin.model.sides.parameters()))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    images, _ = scene()
    batch, _ = mine.preprocess(images)
    assert not twin.eval().features(batch)[0].any()
    assert mine.eval().features(batch)[0].any()


def test_a_lambda_works_in_copies_though_not_in_files():
    mine = adapter(features=lambda model, images: model.maps(images))
    batch, _ = mine.preprocess(scene()[0])
    torch.testing.assert_close(copy.deepcopy(mine).eval().features(batch), mine.eval().features(batch))
    assert check_adapter(mine, scene()[0]).ok


def test_both_functions_teach_and_learn():
    images, targets = scene()
    for student, teacher in ((adapter(network(1)), small_fcos(2, levels=3)), (small_fcos(1, levels=3), adapter())):
        distiller = CrossHeadDistiller(student, teacher)
        backward({n: loss for n, loss in distiller(images, targets).items() if n.startswith("distill_")})
        reached = gradients(distiller.detector.adapter.part("backbone"))
        assert reached
        assert all(gradient.isfinite().all() for gradient in reached.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"features": lambda images: [images]}, r"features\(model, images\).*model as the first argument"),
        ({"head": lambda: None}, r"head\(model, maps\) -> DensePredictions"),
        ({"head": 3}, r"but got int \(adapt, head\)"),
        ({"parts": {"neck": nn.Linear(1, 1)}}, r'parts of the model, but got Linear \(adapt, parts\["neck"\]\)'),
        ({"unused_parameters": nn.Linear(1, 1).parameters()}, r"parts of the model, but got 2 others"),
    ],
)
def test_what_cannot_work_is_refused_at_once(options, words):
    with pytest.raises(DetectorError, match=words):
        adapter(**options)


def test_one_function_alone_or_options_without_functions_are_refused():
    for options in ({"features": maps}, {"head": predict}, {"image_mean": odd.MEAN}, {"parts": {}}):
        with pytest.raises(OptionError, match="both features and head"):
            adapt(network(), **options)


def test_a_builtin_without_a_signature_is_taken_at_its_word():
    assert adapter(head=min).model
