"""`SelectionBranch`: its score maps against a loop, what it multiplies, what learns from it, and its export."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from crosskd_assign import AuxiliaryHead, CrossHeadDistiller, EndToEndDetector, SelectionBranch
from crosskd_assign.errors import DetectorError, OptionError
from crosskd_assign.export import TensorDetector
from crosskd_assign.selection import _depths, _score_maps, ranking_logits
from crosskd_assign.structures import DensePredictions, Target
from tests.makers.builders import TinyAdapter, TinyNetwork, random_images, tiny_detector
from tests.makers.small_models import backward, gradients, scene, small_fcos, small_retinanet, snapshot, total

SIZES = ((64, 90), (75, 64))
MAKERS: dict[str, Any] = {"fcos": small_fcos, "retinanet": small_retinanet, "tiny": tiny_detector}
each_kind = pytest.mark.parametrize("kind", MAKERS)


def build(kind: str, *, class_score: bool = False, **options: Any) -> EndToEndDetector:
    model = MAKERS[kind](1)
    torch.manual_seed(0)
    branch = SelectionBranch(model, class_score=class_score)
    return EndToEndDetector(model, selection=branch, **options).train()


def stirred(detector: EndToEndDetector) -> EndToEndDetector:
    """The same with a branch that has learnt something."""
    generator = torch.Generator().manual_seed(3)
    for parameter in detector.selection.output.parameters():
        parameter.data.normal_(std=0.5, generator=generator)
    return detector


def plain_predictions(detector: EndToEndDetector, images: list[Tensor]) -> DensePredictions:
    return EndToEndDetector(detector.adapter).eval().run(images).predictions


# --- the score it multiplies ------------------------------------------------------------------------------------------


def test_ranking_logits_are_those_of_the_root_of_class_times_quality():
    z = torch.linspace(-40, 40, 81, dtype=torch.float64).reshape(1, 81, 1)
    o = torch.linspace(30, -30, 81, dtype=torch.float64).reshape(1, 81)
    p = DensePredictions(z, torch.zeros(1, 81, 4), torch.zeros(81, 2), torch.ones(81), quality=o)
    expected = (logsigmoid(z) + logsigmoid(o)[..., None]) / 2
    torch.testing.assert_close(logsigmoid(ranking_logits(p)), expected, rtol=1e-6, atol=1e-6)
    assert ranking_logits(replace(p, quality=None)) is z


# --- how it begins ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_score", [False, True], ids=["as it ranks", "class"])
@each_kind
def test_a_fresh_branch_filters_maxima_and_changes_no_box(kind, class_score):
    images, _ = scene(SIZES)
    detector = build(kind, class_score=class_score).eval()
    with torch.no_grad():
        before = plain_predictions(detector, images)
        after = detector.run(images).predictions
    torch.testing.assert_close(after.boxes, before.boxes)
    p = (before.logits if class_score else ranking_logits(before)).sigmoid()
    q = after.logits.sigmoid()
    ratio = (q / p).clamp(max=1)
    assert torch.all(q <= p)
    assert torch.all(ratio <= torch.tensor(2.0).sigmoid() + 1e-4)
    # The best one of an image, as the detector ranks, is a maximum of any neighbourhood: it keeps what a maximum keeps.
    for image, own in enumerate(ranking_logits(before)):
        best = int(own.argmax())
        torch.testing.assert_close(ratio[image].flatten()[best], torch.tensor(2.0).sigmoid(), atol=1e-4, rtol=0)


def bump(
    detector: EndToEndDetector, images: list[Tensor], centres: list[tuple[float, float]]
) -> tuple[DensePredictions, list[Tensor]]:
    """Predictions that score points higher near some centres and on finer levels; and the neck's maps."""
    run = EndToEndDetector(detector.adapter).eval().run(images)
    points = run.predictions.points
    far = torch.stack([(points - torch.tensor(c)).norm(dim=1) for c in centres]).amin(dim=0)
    coarser = (run.predictions.strides / 8).log2()
    z = (4 - far / 12 - coarser)[None, :, None].expand_as(run.predictions.logits)
    return replace(run.predictions, logits=z.clone(), quality=None), run.features


def test_a_fresh_branch_leaves_one_point_an_object():
    images = [torch.rand(3, 64, 64)] * 2
    detector = build("fcos").eval()
    for centres in ([(29.0, 41.0)], [(13.0, 10.0), (51.0, 50.0)]):
        predictions, features = bump(detector, images, centres)
        with torch.no_grad():
            selected = detector.select(features, predictions).logits.sigmoid()
        assert (predictions.logits.sigmoid()[..., 0] > 0.5).sum() > 20 * len(centres)
        assert (selected[..., 0] > 0.3).sum() == 2 * len(centres)


@pytest.mark.parametrize("order", [1, -1], ids=["fine to coarse", "coarse to fine"])
@pytest.mark.parametrize("anchors", [1, 2])
def test_depths_are_distances_to_the_maxima_of_the_same_class(anchors, order):
    strides, sizes = [8, 16, 64][::order], [(8, 12), (4, 6), (1, 2)][::order]
    generator = torch.Generator().manual_seed(anchors)
    grids = [3 * torch.randn(2, h, w, anchors, 3, generator=generator) for h, w in sizes]
    for i, made in enumerate(_depths(grids, strides)):
        assert made.shape == grids[i].shape
        for c in range(3):
            of_class = [z[1:, ..., c].permute(0, 3, 1, 2) for z in grids]
            for a in range(anchors):
                for y in range(sizes[i][0]):
                    for x in range(sizes[i][1]):
                        _, here, _, *beyond = loop(of_class, strides, i, a, y, x)
                        there = [j for j in (i - 1, i + 1) if 0 <= j < 3]
                        other = [beyond[0] if j < i else beyond[1] for j in there]
                        expected = sum(min(0.0, d) for d in (here, *other))
                        assert made[1, y, x, a, c] == pytest.approx(expected, abs=1e-5)


@each_kind
def test_quality_can_choose_the_point_of_an_object_and_rank_no_objects(kind):
    images, _ = scene(SIZES)
    detector = build(kind, class_score=True).eval()
    with torch.no_grad():
        run = EndToEndDetector(detector.adapter).eval().run(images)
        plain = replace(run.predictions, quality=torch.zeros(run.predictions.logits.shape[:2]))
        # One point of each image has a far better quality than all others: it is the one that is left around it.
        best = plain.logits.shape[1] // 3
        quality = plain.quality - 9.0
        quality[:, best] = 9.0
        selected = detector.select(run.features, replace(plain, quality=quality))
    assert selected.quality is None
    kept = selected.logits.sigmoid() / plain.logits.sigmoid()
    torch.testing.assert_close(kept[:, best], torch.full_like(kept[:, best], 0.8808), atol=1e-3, rtol=0)


def test_where_the_filter_is_opened_neighbours_keep_their_scores():
    images = [torch.rand(3, 64, 64)] * 2
    detector = build("fcos").eval()
    predictions, features = bump(detector, images, [(29.0, 41.0)])
    detector.selection.output.bias.data[1] = -6.0  # of "sharper": e⁻⁶ · 128 = 0.32
    with torch.no_grad():
        selected = detector.select(features, predictions).logits.sigmoid()
    kept = selected / predictions.logits.sigmoid()
    assert kept[predictions.logits > 3].min() > 0.6


def test_calibration_changes_no_order():
    images, _ = scene(SIZES)
    detector = build("tiny").eval()
    with torch.no_grad():
        plain, before = plain_predictions(detector, images), detector.run(images).predictions
        detector.selection.calibration.data = torch.tensor([-0.05, -0.2])
        after = detector.run(images).predictions
    maxima = before.logits.sigmoid() / ranking_logits(plain).sigmoid() > 0.88
    best_first = before.logits[maxima].argsort(descending=True)
    assert len(best_first) > 20
    assert (after.logits[maxima][best_first].diff() <= 1e-5).all()
    assert (after.logits[maxima] < before.logits[maxima] - 0.5).all()


# --- what it reads ----------------------------------------------------------------------------------------------------


def loop(best: list[Tensor], strides: list[int], i: int, a: int, y: int, x: int) -> list[float]:
    """The five numbers of one point of the only image, cell by cell."""
    z, (height, width) = float(best[i][0, a, y, x]), best[i].shape[-2:]

    def highest(level: int, rows: range, columns: range) -> float:
        h, w = best[level].shape[-2:]
        places = [(r, c) for r in rows for c in columns if 0 <= r < h and 0 <= c < w]
        return max(float(best[level][0, :, r, c].max()) for r, c in places)

    numbers = [z / 4]
    numbers += [z - highest(i, range(y - k, y + k + 1), range(x - k, x + k + 1)) for k in (1, 2)]
    for j in (i - 1, i + 1):
        if not 0 <= j < len(best):
            numbers.append(z - highest(i, range(y, y + 1), range(x, x + 1)))
        elif strides[j] < strides[i]:  # the finer cells that lie in this one
            r = strides[i] // strides[j]
            numbers.append(z - highest(j, range(r * y, r * y + r), range(r * x, r * x + r)))
        else:  # the coarser cell that this one lies in
            h, w = best[j].shape[-2:]
            numbers.append(
                z - highest(j, range(y * h // height, y * h // height + 1), range(x * w // width, x * w // width + 1))
            )
    return numbers


@pytest.mark.parametrize("order", [1, -1], ids=["fine to coarse", "coarse to fine"])
@pytest.mark.parametrize("anchors", [1, 2])
def test_score_maps_are_distances_to_the_maxima_around(anchors, order):
    strides, sizes = [8, 16, 64][::order], [(8, 12), (4, 6), (1, 2)][::order]
    generator = torch.Generator().manual_seed(anchors)
    best = [torch.randn(1, anchors, h, w, generator=generator) for h, w in sizes]
    for i, made in enumerate(_score_maps(best, strides)):
        assert made.shape == (1, 5 * anchors, *sizes[i])
        for a in range(anchors):
            for y in range(sizes[i][0]):
                for x in range(sizes[i][1]):
                    expected = torch.tensor(loop(best, strides, i, a, y, x))
                    torch.testing.assert_close(made[0, a::anchors, y, x], expected)


@pytest.mark.parametrize("sizes", [((7, 9), (4, 5), (2, 3)), ((5, 5), (3, 3), (1, 1))])
def test_odd_sizes_are_brought_to_one_another(sizes):
    best = [torch.randn(2, 1, h, w) for h, w in sizes]
    assert [x.shape for x in _score_maps(best, [8, 16, 32])] == [(2, 5, h, w) for h, w in sizes]


def test_no_gradient_runs_into_the_scores_it_reads():
    detector = stirred(build("tiny"))
    run = EndToEndDetector(detector.adapter).run(random_images(), [None, None])
    logits = run.predictions.logits.detach().requires_grad_(True)
    features = [x.detach() for x in run.features]
    selected = detector.selection(features, replace(run.predictions, logits=logits, quality=None)).logits
    (gradient,) = torch.autograd.grad(selected.sum(), logits)
    # logit of σ(z) s, where s = σ(e) is a number: its slope is (1 − σ(z)) / (1 − σ(z) s).
    p, q = logits.detach().sigmoid(), selected.detach().sigmoid()
    torch.testing.assert_close(gradient, (1 - p) / (1 - q))


# --- what learns ------------------------------------------------------------------------------------------------------


@each_kind
def test_a_frozen_detector_stays_as_it_is_while_the_branch_learns(kind):
    detector = build(kind)
    detector.model.requires_grad_(False)
    before, images_and_targets = snapshot(detector.model), scene(((64, 64),) * 2)
    optimizer = torch.optim.Adam([p for p in detector.parameters() if p.requires_grad], lr=1e-2)
    history = []
    for _ in range(12):
        losses = detector(*images_and_targets)
        optimizer.zero_grad()
        losses["classification"].backward()
        optimizer.step()
        history.append(float(losses["classification"].detach()))
    assert history[-1] < 0.9 * history[0]
    assert all(
        torch.equal(x, before[name]) for name, x in snapshot(detector.model).items() if "num_batches" not in name
    )


@pytest.mark.parametrize("kind", ["fcos", "tiny"])
def test_a_quality_branch_learns_where_it_is_a_part_of_the_score_and_is_frozen_elsewhere(kind):
    for detector, learns in (
        (build(kind), True),
        (build(kind, class_score=True), False),
        (EndToEndDetector(MAKERS[kind](1)), False),
    ):
        backward(detector(*scene(SIZES)))
        unused = {id(p) for p in detector.adapter.unused_parameters()}
        assert unused
        assert all((p.grad is not None) is learns for p in detector.parameters() if id(p) in unused)
        assert set(gradients(detector)) == {name for name, p in detector.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["fcos", "retinanet"])
def test_it_is_a_part_of_the_student_and_of_no_teacher(kind):
    detector = stirred(build(kind))
    assert any(name.startswith("selection.") for name in detector.state_dict())
    assert not any("selection" in name for name in detector.model.state_dict())
    teacher = CrossHeadDistiller(small_fcos(2), detector).teacher
    assert not any("selection" in name for name, _ in teacher.named_parameters())
    twin = copy.deepcopy(detector).eval()
    assert twin.selection.model is twin.model
    images, _ = scene(SIZES)
    torch.testing.assert_close(twin(images), detector.eval()(images))


def test_distillation_and_an_auxiliary_head_are_what_they_were():
    student = small_fcos(1)
    torch.manual_seed(0)
    auxiliary = AuxiliaryHead(student)
    images, targets = scene(SIZES)
    losses = []
    for selection in (None, SelectionBranch(student)):
        detector = EndToEndDetector(student, auxiliary=auxiliary, selection=selection)
        losses.append(CrossHeadDistiller(detector, small_fcos(2))(images, targets))
    without, with_branch = losses
    assert set(without) == set(with_branch)
    for name in without:
        if name.startswith(("distill_", "auxiliary_")):
            torch.testing.assert_close(with_branch[name], without[name])
    assert with_branch["classification"] != without["classification"]


def test_it_reads_maps_that_a_head_edits_afterwards():
    class Edits(TinyAdapter):
        def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
            return super().head([x.relu_() for x in features], image_size)

    class Copies(TinyAdapter):
        def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
            return super().head([x.relu() for x in features], image_size)

    found = []
    for kind in (Edits, Copies):
        torch.manual_seed(0)
        adapter = kind(TinyNetwork())
        detector = stirred(EndToEndDetector(adapter, selection=SelectionBranch(adapter))).eval()
        image = random_images(1)
        found.append((detector(image)[0]["scores"], TensorDetector(detector)(torch.stack(image))[1][0]))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(*found[0])


def test_levels_of_unequal_channels_have_a_convolution_each():
    class Uneven(TinyAdapter):
        def features(self, batch: Any) -> list[Tensor]:
            first, *rest = super().features(batch)
            return [first.repeat(1, 2, 1, 1), *rest]

        def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
            return super().head([features[0][:, :8], *features[1:]], image_size)

    adapter = Uneven(TinyNetwork())
    detector = EndToEndDetector(adapter, selection=SelectionBranch(adapter))
    assert [x.in_channels for x in detector.selection.lateral] == [16, 8, 8]
    targets = [Target(boxes=torch.tensor([[8.0, 8, 40, 40]]), labels=torch.tensor([1]))] * 2
    assert torch.isfinite(total(detector(random_images(), targets)))


def test_half_precision_gives_the_same_scores():
    images, _ = scene(SIZES)
    detector = stirred(build("fcos")).eval()
    exact = detector(images)
    with torch.autocast("cpu", torch.bfloat16):
        rough = detector(images)
    torch.testing.assert_close(rough[0]["scores"], exact[0]["scores"], atol=0.03, rtol=0.1)


def test_a_map_of_one_cell_of_one_image_works():
    images, targets = scene(((64, 64),))
    assert torch.isfinite(total(build("retinanet")(images, targets)))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_detector_without_grids_is_refused():
    class NoGrid(TinyAdapter):
        def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
            return replace(super().head(features, image_size), levels=None)

    with pytest.raises(DetectorError, match="no grids"):
        SelectionBranch(NoGrid(TinyNetwork()))


def test_a_branch_of_another_detector_and_a_bad_width_are_refused():
    with pytest.raises(DetectorError, match=r"EndToEndDetector\(model, selection=SelectionBranch\(model\)\)"):
        EndToEndDetector(small_fcos(1), selection=SelectionBranch(small_fcos(1)))
    for width in (0, 4, 30):
        with pytest.raises(OptionError, match="multiples of 8"):
            SelectionBranch(small_fcos(1), width=width)
    with pytest.raises(DetectorError, match="no grids"):
        SelectionBranch(Bare(nn.Conv2d(3, 4, 1)))


class Bare(TinyAdapter):
    """Predicts at points, not on grids."""

    def features(self, batch: Any) -> list[Tensor]:
        return [self.model(batch.images[..., ::8, ::8])]

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        n, (h, w) = len(features[0]), features[0].shape[-2:]
        points = torch.rand(h * w, 2)
        return DensePredictions(torch.zeros(n, h * w, 3), torch.zeros(n, h * w, 4), points, torch.full((h * w,), 8.0))


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fcos", "retinanet"])
def test_an_onnx_file_detects_what_the_detector_detects(kind, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    from crosskd_assign.export import export_onnx

    model = MAKERS[kind](1, levels=3)
    detector = stirred(EndToEndDetector(model, selection=SelectionBranch(model), top_k=20)).eval()
    export_onnx(detector, tmp_path / "model.onnx")  # verified there against the detector, for several sizes
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    image = scene(((200, 260),))[0][0]
    _, scores, _ = session.run(["boxes", "scores", "labels"], {"images": image[None].numpy()})
    torch.testing.assert_close(torch.from_numpy(scores)[0], detector([image])[0]["scores"], atol=1e-3, rtol=0)
