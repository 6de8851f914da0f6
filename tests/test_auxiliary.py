"""`AuxiliaryHead`: what it owns and shares, what learns from it, and its losses against a dense loop."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss

from crosskd_assign import (
    AuxiliaryHead,
    CrossHeadDistiller,
    DensePredictions,
    DetectorAdapter,
    EndToEndDetector,
    adapt,
    functional,
)
from crosskd_assign.assignment import TaskAwareOneToManyAssigner
from crosskd_assign.errors import DetectorError, OptionError
from crosskd_assign.export import TensorDetector
from crosskd_assign.structures import Batch
from tests.makers.builders import TinyAdapter, assignment_of, tiny_detector
from tests.makers.small_models import backward, gradients, scene, small_fcos, small_retinanet, snapshot, total

SIZES = ((64, 90), (75, 64))
MAKERS: dict[str, Callable[..., Any]] = {
    "fcos": small_fcos,
    "retinanet": small_retinanet,
    "fcos with batch norm": partial(small_fcos, norm="batch"),
    "tiny": tiny_detector,  # its parts() makes an nn.ModuleList at every call
}
each_kind = pytest.mark.parametrize("kind", MAKERS)


def build(kind: str, **options: Any) -> EndToEndDetector:
    student = MAKERS[kind](1)
    return EndToEndDetector(student, auxiliary=AuxiliaryHead(student, **options)).train()


def twin_of(detector: EndToEndDetector) -> DetectorAdapter:
    return detector.auxiliary._hidden[0]


def part(losses: dict[str, Tensor], *, auxiliary: bool) -> dict[str, Tensor]:
    return {name: loss for name, loss in losses.items() if name.startswith("auxiliary_") is auxiliary}


def memory(tensors: Any) -> set[int]:
    return {x.data_ptr() for x in tensors}


def loaded(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def shares_all_but_the_head(detector: EndToEndDetector) -> bool:
    """Whether the twin runs the detector's own backbone and the auxiliary head."""
    adapter, twin = detector.adapter, twin_of(detector)
    own_head = {id(p) for p in adapter.part("head").parameters()}
    trunk = {id(p) for p in adapter.parameters()} - own_head
    head = {id(p) for p in detector.auxiliary.head.parameters()}
    statistics = {id(x) for x in adapter.part("backbone").buffers()}
    assert statistics == {id(x) for x in twin.part("backbone").buffers()}
    assert statistics.isdisjoint(id(x) for x in twin.part("head").buffers())
    return {id(p) for p in twin.parameters()} == trunk | head and head.isdisjoint(own_head) and len(trunk) > 0


# --- what it owns, and what it shares ---------------------------------------------------------------------------------


@each_kind
def test_its_parameters_are_the_detectors_and_never_the_models(kind):
    plain, detector = EndToEndDetector(MAKERS[kind](1)), build(kind)
    added = set(detector.state_dict()) - set(plain.state_dict())
    assert set(plain.state_dict()) <= set(detector.state_dict())
    assert added == {f"auxiliary.head.{name}" for name in detector.adapter.part("head").state_dict()}
    names = {name for name, _ in detector.named_parameters()}
    assert names & added == names - {name for name, _ in plain.named_parameters()}
    assert set(detector.model.state_dict()) == set(plain.model.state_dict())
    owned = memory(detector.auxiliary.parameters())
    assert owned.isdisjoint(memory(detector.model.state_dict().values()))
    assert len(owned) == len(list(detector.adapter.part("head").parameters()))


@each_kind
def test_it_starts_as_a_copy_of_the_head_and_leaves_the_model_as_it_was(kind):
    model = MAKERS[kind](1)
    before, modes = snapshot(model), [module.training for module in model.modules()]
    auxiliary = AuxiliaryHead(model)
    torch.testing.assert_close(snapshot(model), before, atol=0, rtol=0)
    assert [module.training for module in model.modules()] == modes
    torch.testing.assert_close(snapshot(auxiliary.head), snapshot(adapt(model).part("head")), atol=0, rtol=0)


@each_kind
def test_it_runs_the_detectors_own_backbone(kind):
    detector = build(kind)
    assert shares_all_but_the_head(detector)
    batch, _ = detector.adapter.preprocess(scene(SIZES)[0])
    with torch.no_grad():
        for p in detector.adapter.part("backbone").parameters():
            p.mul_(1.5)
    torch.testing.assert_close(twin_of(detector).features(batch), detector.adapter.features(batch), atol=0, rtol=0)


@each_kind
@pytest.mark.parametrize("duplicate", [copy.deepcopy, loaded], ids=["deepcopy", "pickle"])
def test_copies_share_among_themselves_and_with_nobody_else(kind, duplicate):
    detector = build(kind)
    losses = detector(*scene(SIZES))
    twin = duplicate(detector)
    assert shares_all_but_the_head(twin)
    everything = [*detector.parameters(), *twin_of(detector).parameters()]
    assert memory(everything).isdisjoint(memory([*twin.parameters(), *twin_of(twin).parameters()]))
    torch.testing.assert_close(twin(*scene(SIZES)), losses)
    before = snapshot(detector)
    optimizer = torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.01)
    backward(twin(*scene(SIZES)))
    optimizer.step()
    torch.testing.assert_close(snapshot(detector), before, atol=0, rtol=0)
    assert shares_all_but_the_head(twin)
    twin.load_state_dict(detector.state_dict())
    torch.testing.assert_close(twin(*scene(SIZES)), losses)


@each_kind
def test_conversions_move_it_along(kind):
    detector = build(kind).double()
    assert {p.dtype for p in (*detector.parameters(), *twin_of(detector).parameters())} == {torch.float64}
    assert shares_all_but_the_head(detector)
    images, targets = scene(SIZES)
    losses = detector([x.double() for x in images], [{**t, "boxes": t["boxes"].double()} for t in targets])
    assert losses["auxiliary_classification"].dtype == torch.float64
    expected = build(kind)(images, targets)
    for name, loss in losses.items():
        torch.testing.assert_close(loss.float(), expected[name].float(), atol=1e-3, rtol=1e-3)


class ScaledTiny(TinyAdapter):
    """A head that needs a buffer of the network's own, which belongs to no part."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        model.register_buffer("scale", torch.tensor(0.1))

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        self.dtype_of_scale = self.model.scale.dtype
        return super().head([self.model.scale * x for x in features], image_size)


def test_conversions_reach_what_belongs_to_no_part():
    student = ScaledTiny(tiny_detector().model)
    detector = EndToEndDetector(student, auxiliary=AuxiliaryHead(student)).double()
    images, targets = scene(SIZES)
    detector([x.double() for x in images], targets)
    assert student.dtype_of_scale == twin_of(detector).dtype_of_scale == torch.float64


def test_frozen_heads_give_auxiliary_heads_that_learn():
    model = small_fcos(1)
    model.head.requires_grad_(False)
    auxiliary = AuxiliaryHead(model)
    frozen = [name for name, p in auxiliary.head.named_parameters() if not p.requires_grad]
    assert frozen == ["regression_head.bbox_ctrness.weight", "regression_head.bbox_ctrness.bias"]
    assert not any(p.requires_grad for p in model.head.parameters())


def test_an_adapter_that_names_no_head_is_refused_by_name():
    class Headless(TinyAdapter):
        def parts(self) -> dict[str, nn.Module]:
            return {"backbone": self.model.backbone}

    with pytest.raises(DetectorError, match=r'a module named "head" in parts\(\), but got backbone \(Headless\)'):
        AuxiliaryHead(Headless(tiny_detector().model))


@pytest.mark.parametrize("option", [{"classification": -1.0}, {"box": -0.5}, {"box": float("nan")}], ids=str)
def test_weights_out_of_range_are_refused_by_name(option):
    with pytest.raises(OptionError, match=next(iter(option))):
        AuxiliaryHead(tiny_detector(), **option)


# --- what learns from it ----------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("detach", [False, True])
def test_every_trainable_parameter_gets_a_gradient(kind, detach):
    detector = build(kind, detach=detach)
    backward(detector(*scene(SIZES)))
    trainable = {name for name, p in detector.named_parameters() if p.requires_grad}
    assert set(gradients(detector)) == trainable
    assert any(name.startswith("auxiliary.head.") for name in trainable)


@each_kind
def test_auxiliary_losses_teach_backbone_and_auxiliary_head_and_never_the_detectors_own(kind):
    detector = build(kind)
    backward(part(detector(*scene(SIZES)), auxiliary=True))
    reached = {id(p) for p in detector.parameters() if p.grad is not None}
    assert not reached & {id(p) for p in detector.adapter.part("head").parameters()}
    assert {id(p) for p in detector.adapter.part("backbone").parameters()} <= reached
    assert {id(p) for p in detector.auxiliary.head.parameters() if p.requires_grad} <= reached


@each_kind
@pytest.mark.parametrize("detach", [False, True])
def test_detach_stops_one_to_one_losses_at_the_features_and_changes_no_loss(kind, detach):
    detector = build(kind, detach=detach)
    losses = detector(*scene(SIZES))
    torch.testing.assert_close(losses, build(kind)(*scene(SIZES)))
    backward(part(losses, auxiliary=False))
    trunk = [p for name in ("backbone", "neck") for p in detector.adapter.part(name).parameters()]
    assert all((p.grad is None) is detach for p in trunk)
    assert not gradients(detector.auxiliary)
    head = [p for p in detector.adapter.part("head").parameters() if p.requires_grad]
    assert all(p.grad is not None for p in head)


@each_kind
def test_one_to_one_losses_are_those_of_a_detector_without_it(kind):
    losses = build(kind)(*scene(SIZES))
    torch.testing.assert_close(part(losses, auxiliary=False), EndToEndDetector(MAKERS[kind](1)).train()(*scene(SIZES)))
    assert set(part(losses, auxiliary=True)) == {"auxiliary_classification", "auxiliary_bbox_regression"}


@each_kind
def test_detections_are_those_of_a_detector_without_it(kind):
    images, _ = scene(SIZES)
    detector = build(kind)
    with torch.no_grad():
        for p in detector.auxiliary.parameters():
            p.fill_(float("nan"))
    plain = EndToEndDetector(MAKERS[kind](1)).eval()
    torch.testing.assert_close(detector.eval()(images), plain(images), atol=0, rtol=0)


def test_images_without_boxes_give_finite_losses_that_reach_every_parameter():
    detector = build("fcos")
    losses = detector(*scene(SIZES, boxes=0))
    assert losses["auxiliary_bbox_regression"] == 0
    backward(losses)
    assert all(gradient.isfinite().all() for gradient in gradients(detector).values())
    assert set(gradients(detector)) == {name for name, p in detector.named_parameters() if p.requires_grad}


# --- the losses -------------------------------------------------------------------------------------------------------

A, C = 12, 3
PAIRS = [(0, 3, 0), (0, 4, 0), (0, 9, 1), (1, 0, 0), (1, 11, 0)]  # several points a box


def dense_classification(logits: Tensor, labels: list[int], weights: list[float], alpha: float, gamma: float) -> Tensor:
    """The focal loss of a soft label, entry by entry."""
    soft = {(n, p, c): w for (n, p, _), c, w in zip(PAIRS, labels, weights, strict=True)}
    loss = logits.new_zeros(())
    for n in range(2):
        for a in range(A):
            for c in range(C):
                p, w = logits[n, a, c].sigmoid(), soft.get((n, a, c), 0.0)
                loss = loss - w * alpha * (1 - p) ** gamma * p.log()
                loss = loss - (1 - w) * (1 - alpha) * p**gamma * (1 - p).log()
    return loss


@settings(max_examples=12)  # 72 entries each, one by one
@given(st.integers(0, 2**20), st.sampled_from([0.25, 0.6]), st.sampled_from([0.0, 1.5, 2.0]))
def test_one_to_many_terms_are_their_formulas_entry_by_entry(seed, alpha, gamma):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, A, C, generator=generator, dtype=torch.float64).requires_grad_()
    corner = 40 * torch.rand(2, A, 2, generator=generator, dtype=torch.float64)
    boxes = torch.cat([corner, corner + 1 + 20 * torch.rand(2, A, 2, generator=generator).double()], dim=-1)
    boxes.requires_grad_()
    labels = torch.randint(C, (5,), generator=generator)
    weights = torch.rand(5, generator=generator, dtype=torch.float64)
    wanted = torch.stack([boxes.detach()[n, (p + 5) % A] for n, p, _ in PAIRS])
    pairs = assignment_of(*PAIRS)

    focal = functional.one_to_many_classification_loss(
        logits, pairs, labels, weights, normalizer=3.0, alpha=alpha, gamma=gamma
    )
    expected = dense_classification(logits, labels.tolist(), weights.tolist(), alpha, gamma) / 3
    torch.testing.assert_close(focal, expected, atol=1e-9, rtol=1e-9)
    mine, theirs = (torch.autograd.grad(loss, logits)[0] for loss in (focal, expected))
    torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)

    overlap = functional.one_to_many_box_loss(boxes, pairs, wanted, weights, normalizer=3.0)
    loop = [
        w * generalized_box_iou_loss(boxes[n, p], g) for (n, p, _), g, w in zip(PAIRS, wanted, weights, strict=True)
    ]
    torch.testing.assert_close(overlap, torch.stack(loop).sum() / 3, atol=1e-7, rtol=1e-7)


def test_with_weights_of_one_they_are_the_one_to_one_terms():
    generator = torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(2, A, C, generator=generator), 30 * torch.rand(2, A, 4, generator=generator)
    labels, wanted = torch.tensor([0, 1, 2, 0, 1]), 30 * torch.rand(5, 4, generator=generator)
    pairs, ones = assignment_of(*PAIRS), torch.ones(5)
    many = functional.one_to_many_classification_loss(logits, pairs, labels, ones, normalizer=2.0)
    assert many == functional.one_to_one_classification_loss(logits, pairs, labels, normalizer=2.0)
    many = functional.one_to_many_box_loss(boxes, pairs, wanted, ones, normalizer=2.0)
    assert many == functional.one_to_one_box_loss(boxes, pairs, wanted, normalizer=2.0)


def test_with_weights_of_zero_everything_is_background():
    logits, labels = torch.randn(2, A, C, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 0, 1])
    pairs, nothing = assignment_of(*PAIRS), assignment_of()
    found = functional.one_to_many_classification_loss(logits, pairs, labels, torch.zeros(5), normalizer=1.0)
    background = functional.one_to_one_classification_loss(logits, nothing, labels[:0], normalizer=1.0)
    torch.testing.assert_close(found, background)
    boxes, wanted = torch.rand(2, A, 4), torch.rand(5, 4)
    assert functional.one_to_many_box_loss(boxes, pairs, wanted, torch.zeros(5), normalizer=1.0) == 0


@each_kind
def test_terms_are_weighted_by_the_share_of_the_best_metric_and_divided_by_the_sum_of_weights(kind):
    detector = build(kind, classification=0.5, box=3.0, assigner=TaskAwareOneToManyAssigner(positives=4))
    run = detector.run(*scene(SIZES))
    losses = detector.auxiliary(run)
    predictions = twin_of(detector).head([x.clone() for x in run.features], run.batch.image_size)
    found = TaskAwareOneToManyAssigner(positives=4)(predictions, run.targets)
    assert len(found) > 4  # boxes, so that some have several
    metrics: dict[tuple[int, int], list[float]] = {}
    keys = list(zip(found.image.tolist(), found.target.tolist(), strict=True))
    for key, metric in zip(keys, found.metric.tolist(), strict=True):
        metrics.setdefault(key, []).append(metric)
    best = [max(metrics[key]) for key in keys]
    weights = [m / b if b > 0 else 1.0 for m, b in zip(found.metric.tolist(), best, strict=True)]
    labels = torch.stack([run.targets[n]["labels"][g] for n, g in keys])
    boxes = torch.stack([run.targets[n]["boxes"][g] for n, g in keys])
    w, n = torch.tensor(weights), max(1.0, sum(weights))
    focal = functional.one_to_many_classification_loss(predictions.logits, found, labels, w, normalizer=n)
    giou = functional.one_to_many_box_loss(predictions.boxes, found, boxes, w, normalizer=n)
    torch.testing.assert_close(losses, {"classification": 0.5 * focal, "bbox_regression": 3 * giou})


@pytest.mark.parametrize("box", [[9.0, 9, 9.5, 9.5], [70.0, 70, 90, 90]], ids=["between points", "outside"])
def test_an_object_without_a_metric_weighs_one(box):
    """No point lies in its prior, so that it has the nearest free one, and nothing to be measured against."""
    detector = build("tiny")
    images, targets = scene(((64, 64),), boxes=1)
    targets[0] = {"boxes": torch.tensor([box]), "labels": torch.tensor([2])}
    run = detector.run(images, targets)
    losses = detector.auxiliary(run)
    predictions = twin_of(detector).head(run.features, run.batch.image_size)
    found = detector.auxiliary.assigner(predictions, run.targets)
    assert (found.fallback.tolist(), found.metric.tolist()) == ([True], [0.0])
    boxes, labels = run.targets[0]["boxes"], run.targets[0]["labels"]
    focal = functional.one_to_one_classification_loss(predictions.logits, found, labels, normalizer=1.0)
    giou = functional.one_to_one_box_loss(predictions.boxes, found, boxes, normalizer=1.0)
    torch.testing.assert_close(losses, {"classification": focal, "bbox_regression": 2 * giou})
    assert losses["bbox_regression"] > 0


# --- with the rest of the library -------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [0, 1])
@pytest.mark.parametrize("kind", ["fcos", "retinanet"])
def test_a_distiller_trains_a_student_with_an_auxiliary_head(kind, entry):
    detector = build(kind)
    distiller = CrossHeadDistiller(detector, MAKERS[kind](2), entry=entry).train()
    losses = distiller(*scene(SIZES))
    plain = CrossHeadDistiller(MAKERS[kind](1), MAKERS[kind](2), entry=entry).train()(*scene(SIZES))
    torch.testing.assert_close(part(losses, auxiliary=False), plain)
    torch.testing.assert_close(part(losses, auxiliary=True), part(build(kind)(*scene(SIZES)), auxiliary=True))
    backward(losses)
    assert set(gradients(distiller)) == {name for name, p in distiller.named_parameters() if p.requires_grad}
    twin = copy.deepcopy(distiller)
    assert shares_all_but_the_head(twin.detector)


def test_with_detach_the_teacher_reaches_the_features_at_the_pyramid_and_no_further_entry_is_allowed():
    detector = build("fcos", detach=True)
    distiller = CrossHeadDistiller(detector, small_fcos(2)).train()
    losses = distiller(*scene(SIZES))
    backward({name: loss for name, loss in losses.items() if name.startswith("distill_")})
    assert gradients(detector.model.backbone)
    assert not gradients(detector.model.head)
    with pytest.raises(OptionError, match=r"detach=True.*but got 1"):
        CrossHeadDistiller(build("fcos", detach=True), small_fcos(2), entry=1)


@each_kind
def test_what_is_exported_has_none_of_it(kind):
    detector = build(kind).eval()
    exported = TensorDetector(detector)
    assert memory(exported.parameters()).isdisjoint(memory(detector.auxiliary.parameters()))
    assert memory(exported.parameters()) == memory(detector.model.parameters())
    assert not any("auxiliary" in name for name in exported.state_dict())
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        boxes, scores, _ = exported(images)
        detections = detector(images)
    torch.testing.assert_close(boxes, torch.stack([d["boxes"] for d in detections]))
    torch.testing.assert_close(scores, torch.stack([d["scores"] for d in detections]))


def test_it_learns():
    detector = build("tiny")
    optimizer = torch.optim.Adam([p for p in detector.parameters() if p.requires_grad], lr=1e-2)
    images, targets = scene()
    history = []
    for _ in range(25):
        losses = detector(images, targets)
        optimizer.zero_grad()
        backward(losses)
        optimizer.step()
        history.append(float(total(part(losses, auxiliary=True)).detach()))
    assert history[-1] < 0.7 * history[0]


class Editing(TinyAdapter):
    """A head that edits what it is given."""

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        return super().head([x.relu_() for x in features], image_size)

    def features(self, batch: Batch) -> list[Tensor]:
        return [2 * x for x in super().features(batch)]


def test_neither_head_edits_what_the_other_sees():
    detectors = []
    for _ in range(2):
        adapter = Editing(tiny_detector(3).model)
        detectors.append(EndToEndDetector(adapter, auxiliary=AuxiliaryHead(adapter)).train())
    one, other = detectors
    images, targets = scene()
    run = one.run(images, targets)
    before = [x.detach().clone() for x in run.features]
    losses = one.losses(run)
    torch.testing.assert_close([x.detach() for x in run.features], before, atol=0, rtol=0)
    torch.testing.assert_close(other.losses(other.run(images, targets)), losses)
    backward(losses)
    assert all(gradient.isfinite().all() for gradient in gradients(one).values())


def test_an_auxiliary_head_of_another_detector_is_refused():
    model = small_fcos(1)
    for other in (small_fcos(1), small_retinanet(1)):
        with pytest.raises(DetectorError, match="auxiliary of the same detector"):
            EndToEndDetector(model, auxiliary=AuxiliaryHead(other))
    EndToEndDetector(adapt(model), auxiliary=AuxiliaryHead(model))  # another adapter of it is as good
