"""`check_adapter` names what is wrong with an adapter, says nothing against a good one, and leaves no trace."""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crosskd_assign import DetectorAdapter, EndToEndDetector, adapt
from crosskd_assign.errors import DetectorError, ImageError, TargetError
from crosskd_assign.structures import Target
from crosskd_assign.testing import CHECKS, AdapterReport, check_adapter
from tests.makers import odd_behaviour as worse
from tests.makers import odd_detectors as odd
from tests.makers.builders import tiny_detector
from tests.makers.small_models import MAKERS, scene, small_fcos, snapshot

SIZES = ((64, 64), (64, 64))


def pictures(sizes: Any = SIZES) -> tuple[list[Tensor], list[Target]]:
    images, targets = scene(sizes)
    targets[0]["labels"][:] = 2
    return images, targets


def outcomes(report: AdapterReport) -> dict[str, str]:
    return {check.name: check.outcome for check in report.checks}


def sentence(report: AdapterReport, name: str) -> str:
    return next(check.sentence for check in report.checks if check.name == name)


# --- good adapters ----------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    **{kind: lambda make=make: adapt(make(max_size=160)) for kind, make in MAKERS.items()},
    "fcos with batch norm": lambda: adapt(small_fcos(norm="batch")),
    "fcos of three levels": lambda: adapt(small_fcos(levels=3)),
    "in training mode": lambda: adapt(small_fcos().train()),
    "wrapped already": lambda: EndToEndDetector(small_fcos()).adapter,
    "frozen": lambda: adapt(small_fcos().requires_grad_(False)),
    "tiny": tiny_detector,
    "tiny with batch norm": lambda: tiny_detector(batch_norm=True),
    "of these tests": odd.build,
}


@pytest.mark.parametrize(
    "sizes",
    [SIZES, *(pytest.param(s, marks=pytest.mark.slow) for s in [((96, 150),), ((64, 90), (75, 64), (80, 80))])],
    ids=str,
)
@pytest.mark.parametrize("kind", GOOD)
def test_a_good_adapter_is_found_good(kind, sizes):
    report = check_adapter(GOOD[kind](), *pictures(sizes))
    assert report.ok, str(report)
    assert [check.name for check in report.checks] == [check.name for check in CHECKS]
    skipped = {name for name, outcome in outcomes(report).items() if outcome == "skipped"}
    assert skipped == ({"unused parameters"} if kind == "frozen" else set()), str(report)
    report.raise_for_problems()


def test_without_targets_only_these_are_left_out():
    report = check_adapter(odd.build(), pictures()[0])
    assert report.ok
    assert {name for name, outcome in outcomes(report).items() if outcome == "skipped"} == {"targets"}


# --- bad ones ---------------------------------------------------------------------------------------------------------

BAD: list[tuple[type[odd.Good], str, str]] = [
    (odd.DictOfMaps, "features", r"list of maps, but got dict \(DictOfMaps\.features\(\)\)"),
    (odd.NoGraph, "gradient", r"maps with a gradient.*NoGraph\.features\(\)\[0\].*no_grad"),
    (odd.OneMapDetached, "gradient", r"OneMapDetached\.features\(\)\[0\]"),
    (odd.NotNormalised, "normalisation", r"ignore them.*self\.normalize\(batch\)"),
    (odd.NormalisedInPlace, "normalisation", r"batch\.images unchanged.*work on a copy"),
    (odd.NormalisedTwice, "normalisation", r"Batch\.images in 0…1, but got -2…2.*preprocess"),
    (odd.SameStrideTwice, "strides", r"stride of its own.*\[8\.0, 8\.0, 16\.0, 32\.0\]"),
    (odd.TransposedMaps, "places", r"corner of the image.*images or maps transposed"),
    (odd.MirroredImages, "places", r"images or maps mirrored"),
    (odd.ResizedWithoutBoxes, "boxes and images", r"painted rectangle.*resize and pad boxes as you do images"),
    (odd.NeverRestored, "boxes and images", r"NeverRestored\.restore\(\)"),
    (odd.LabelsFromZero, "targets", r"a label in 0…1, but got 2 \(targets\[0\].*more classes"),
    (odd.OddSizesFail, "sizes", r"must match the size.*odd_detectors\.py, line \d+, in features.*size_divisible"),
    (odd.LostPoints, "head", r"boxes of shape \(2, 168, 4\) for 168 points, but got \(2, 167, 4\)"),
    (odd.PlainTuple, "head", r"DensePredictions, but got tuple"),
    (odd.NotANumber, "finite", r"NaN or infinite \(NotANumber\.head\(\)\.boxes\)"),
    (odd.PointsInCells, "points", r"looks like cells.*multiply by the stride"),
    (odd.StridesInCells, "points", r"strides of the maps, \[8\.0, 16\.0, 32\.0\], in pixels, but got \[1\.0\]"),
    (odd.PointsOfOtherLevels, "points", r"points that levels describe.*on_grid"),
    (odd.LogitsBackwards, "order", r"logits of stride 16, but got those of stride 8.*order of features\(\)"),
    (odd.ColumnByColumn, "order", r"looks like column by column.*row by row, x fastest"),
    (odd.LogitsColumnByColumn, "order", r"column by column \(LogitsColumnByColumn\.head\(\)\.logits"),
    (odd.BottomUp, "order", r"looks like bottom up"),
    (odd.AnchorByAnchor, "order", r"looks like anchor by anchor.*permute\(0, 3, 4, 1, 2\)"),
    (odd.Shuffled, "order", r"as if shuffled"),
    (odd.IgnoresItsMaps, "order", r"logits that depend on features\(\)\[0\]"),
    (odd.BoxesInStrides, "boxes", r"looks like strides.*multiply them by the stride"),
    (odd.BoxesInFractions, "boxes", r"looks like fractions of the image.*width"),
    (odd.CentreAndSize, "boxes", r"looks like cx, cy, w, h \("),
    (odd.CornerAndSize, "boxes", r"looks like x, y, w, h \("),
    (odd.RowsFirst, "boxes", r"looks like y1, x1, y2, x2"),
    (odd.OffsetsOnly, "boxes", r"looks like offsets from their points.*add the points"),
    (odd.NegativeSides, "boxes", r"x1 < x2.*corners the wrong way round.*exp or relu"),
    (worse.RawWhileTraining, "training mode", r"decode boxes to pixels in both modes"),
    (worse.AnotherTypeWhileTraining, "training mode", r"DensePredictions in both modes, but got tuple"),
    (worse.BoxesDetached, "gradient", r"boxes with a gradient to the maps.*BoxesDetached\.head\(\)\.boxes"),
    (worse.Remembers, "arguments", r"another features\(\) call.*remember nothing"),
    (worse.Random, "arguments", r"equal predictions on equal maps"),
    (worse.ImagesMixed, "batches", r"depend on no other image"),
    (worse.AlwaysTraining, "batches", r"norms in evaluation mode"),
    (worse.SplitWrongly, "entry", r"head_rest\(head_stem\(maps, k\), k, size\).*k=1"),
    (worse.UnusedBranch, "unused parameters", r"none for auxiliary\.weight, auxiliary\.bias.*DistributedDataParallel"),
    (worse.UsedDeclaredUnused, "unused parameters", r"one for sides\.weight, sides\.bias.*leave them out"),
    (worse.ForeignUnused, "unused parameters", r"parameters of the model, but got 2 of something else"),
    (worse.PartsInAList, "parts", r"a dict of modules, but got list"),
    (worse.PartsOfOtherNames, "parts", r"backbone, neck and head alone, but got trunk"),
    (worse.ScalesBoxesInPlace, "boxes and images", r"images and targets unchanged.*work on copies"),
    (worse.NoListWithoutTargets, "preprocess", r"a list of 0 targets for 0, but got NoneType.*carry the targets along"),
    (worse.EmptyPart, "parts", r"a neck that is a part of the model, but got Identity without any"),
    (worse.PartsSwapped, "parts", r"the neck to be what features\(\) runs.*does not depend on"),
    (worse.PartsInTheHead, "parts", r"the head to be what head\(\) runs.*does not depend on"),
    (worse.PartsOfAnother, "parts", r"a neck that is a part of the model.*parameters of something else"),
    (worse.KeepsGraph, "copy", r"a copy, but got RuntimeError: Only Tensors created explicitly.*in an attribute"),
    (worse.RunsAnother, "copy", r"runs the original's.*self\.model"),
    (worse.FixedType, "dtype", r"RuntimeError.*new_tensor"),
]


@pytest.mark.parametrize(
    "sizes", [SIZES, pytest.param(((70, 96),), marks=pytest.mark.slow)], ids=["square", "one oblong image"]
)
@pytest.mark.parametrize(("kind", "check", "words"), BAD, ids=[kind.__name__ for kind, _, _ in BAD])
def test_a_fault_is_named_and_nothing_else_is_but_what_follows_from_it(kind, check, words, sizes):
    report = check_adapter(odd.build(kind), *pictures(sizes))
    wrong = [problem.name for problem in report.problems]
    follows = {"IgnoresItsMaps": ["order", "gradient"]}
    assert wrong == follows.get(kind.__name__, [check]), str(report)
    if sizes == SIZES:
        assert re.search(words, sentence(report, check)), sentence(report, check)
        assert "Fix: " in sentence(report, check)
    (problem, *_) = report.problems
    parts = f"Expected {problem.expected}, but got {problem.got} ({problem.where}). Fix: {problem.fix}."
    assert problem.sentence == parts


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_mean": (123.7, 116.3, 103.5), "image_std": (58.4, 57.1, 57.4)}, "divide them by 255"),
        ({"image_std": (0.0, 0.2, 0.2)}, "divide them by 255"),
    ],
)
def test_a_normalisation_of_another_range_is_named(options, words):
    report = check_adapter(odd.build(**options), *pictures())
    assert words in sentence(report, "normalisation")
    assert "normalisation" in [problem.name for problem in report.problems]


@pytest.mark.parametrize(
    ("kind", "check", "words"),
    [
        (odd.SidesInPixels, "boxes", "boxes are as large at stride 32 as at 8"),
        (worse.NoNeck, "parts", "names no neck or head; inherit() copies backbone and neck by default"),
    ],
)
def test_what_is_no_fault_is_a_note(kind, check, words):
    report = check_adapter(odd.build(kind), *pictures())
    assert report.ok, str(report)
    assert outcomes(report)[check] == "note"
    assert words in sentence(report, check)


def test_a_head_that_edits_its_maps_is_right_and_the_report_mentions_it():
    report = check_adapter(odd.build(worse.EditsMaps), *pictures())
    assert report.ok, str(report)
    assert "edits its maps in place" in sentence(report, "head")


METHODS = {
    "preprocess": "preprocess",
    "features": "features",
    "head": "head",
    "restore": "boxes and images",
    "parts": "parts",
    "unused_parameters": "unused parameters",
}


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_that_raises_is_reported_with_the_line_and_never_crashes(method):
    adapter = odd.build(worse.Raises)
    adapter.where = method  # type: ignore[attr-defined]
    report = check_adapter(adapter, *pictures())
    assert METHODS[method] in [problem.name for problem in report.problems]
    text = sentence(report, METHODS[method])
    assert f"ZeroDivisionError: {method} is broken (odd_behaviour.py, line " in text
    assert "second line" not in text
    assert len(report.checks) == len(CHECKS)


@pytest.mark.parametrize("result", [None, [torch.zeros(2, 3, 4, 4).long()]], ids=str)
@pytest.mark.parametrize("method", ["features", "head", "preprocess", "parts", "unused_parameters", "restore"])
def test_nonsense_from_any_method_is_reported(method, result):
    adapter = odd.build()
    setattr(adapter, method, lambda *_: result)
    report = check_adapter(adapter, *pictures())
    assert not report.ok, str(report)


def test_images_too_small_to_tell_places_apart_skip_what_needs_them():
    for sizes, padding, skips in [((24, 24), 8, {"order", "places"}), ((16, 16), 32, {"places"})]:
        report = check_adapter(odd.build(size_divisible=padding), *pictures((sizes, sizes)))
        assert report.ok, str(report)
        assert {name for name, outcome in outcomes(report).items() if outcome == "skipped"} == skips
        assert "give larger images" in sentence(report, "places" if len(skips) == 1 else "order")


def test_images_and_targets_that_are_none_are_the_callers_fault():
    images, targets = pictures()
    with pytest.raises(ImageError, match=r"images\[1\]"):
        check_adapter(odd.build(), [images[0], (255 * images[1]).byte()])
    with pytest.raises(TargetError, match="2 targets"):
        check_adapter(odd.build(), images, targets[:1])


def test_a_check_comes_after_those_it_builds_on():
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    for i, check in enumerate(CHECKS):
        assert set(check.after) <= set(names[:i]), check.name


# --- the report -------------------------------------------------------------------------------------------------------


def test_a_report_reads_well():
    report = check_adapter(odd.build(odd.BoxesInStrides), *pictures())
    lines = str(report).splitlines()
    assert lines[0] == f"BoxesInStrides: {len(CHECKS)} checks, 1 problem"
    assert max(map(len, lines)) <= 110
    assert [line.split()[0] for line in lines[1:] if not line.startswith("   ")].count("WRONG") == 1
    for check in report.checks:
        assert check.sentence
        assert f" {check.name} " in str(report)
    with pytest.raises(DetectorError) as caught:
        report.raise_for_problems()
    assert str(caught.value) == str(report)
    good = check_adapter(odd.build(), *pictures())
    assert str(good).startswith(f"Good: {len(CHECKS)} checks, no problems\n")
    assert "WRONG" not in str(good)


# --- no trace ---------------------------------------------------------------------------------------------------------


def attributes(adapter: DetectorAdapter) -> list[dict[str, Any]]:
    hidden = {"_parameters", "_buffers", "_modules"}
    return [{k: v for k, v in vars(m).items() if k not in hidden} for m in adapter.modules()]


@pytest.mark.parametrize(
    "kind",
    [odd.Good, worse.Remembers, odd.NotANumber, worse.AlwaysTraining, worse.KeepsGraph, odd.OddSizesFail, worse.Raises],
)
def test_the_adapter_and_the_random_state_come_out_as_they_went_in(kind):
    adapter = odd.build(kind)
    for stage in adapter.model.body:  # statistics that are worth keeping
        norm: Any = stage[1]
        norm.running_mean.uniform_()
    adapter.model.tower.eval()
    adapter.model.classes.requires_grad_(False)
    for i, parameter in enumerate(adapter.model.sides.parameters()):
        parameter.grad = torch.full_like(parameter, float(i))
    if kind is worse.Raises:
        adapter.where = "head"  # type: ignore[attr-defined]
    images, targets = pictures()
    kept = [x.clone() for x in [*images, *(t["boxes"] for t in targets), *(t["labels"] for t in targets)]]
    state, modes, plain = snapshot(adapter), [m.training for m in adapter.modules()], attributes(adapter)
    learning = [p.requires_grad for p in adapter.parameters()]
    grads = [p.grad for p in adapter.parameters()]
    values = [None if g is None else g.clone() for g in grads]
    seeds = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    check_adapter(adapter, images, targets)

    torch.testing.assert_close(snapshot(adapter), state, atol=0, rtol=0)
    assert [m.training for m in adapter.modules()] == modes
    assert attributes(adapter) == plain
    assert [p.requires_grad for p in adapter.parameters()] == learning
    assert all(p.grad is g for p, g in zip(adapter.parameters(), grads, strict=True))
    after = [p.grad for p in adapter.parameters()]
    torch.testing.assert_close([g for g in after if g is not None], [v for v in values if v is not None])
    torch.testing.assert_close([*images, *(t["boxes"] for t in targets), *(t["labels"] for t in targets)], kept)
    assert torch.equal(torch.get_rng_state(), seeds[0])
    assert random.getstate() == seeds[1]
    assert np.random.get_state()[1].tolist() == seeds[2]


def test_it_says_the_same_whatever_mode_it_is_called_in():
    images, targets = pictures()
    expected = str(check_adapter(odd.build(), images, targets))
    torch.manual_seed(99)
    with torch.no_grad():
        assert str(check_adapter(odd.build(), images, targets)) == expected
    with torch.inference_mode():
        adapter = odd.build()
        adapter.eval()
    assert str(check_adapter(odd.build(), images, targets)) == expected
    assert isinstance(adapter, nn.Module)
