"""Heads that are split by their adapter, and splits, entries and weights that cannot work."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from crosskd_assign import CrossHeadDistiller, CrossHeadLoss, DensePredictions, errors
from tests.distillation.test_entry import fcos
from tests.makers.builders import TinyAdapter, tiny_detector
from tests.makers.small_models import backward, gradients, scene, small_fcos, small_retinanet

# --- heads that are split elsewhere -----------------------------------------------------------------------------------


class SplitTiny(TinyAdapter):
    """One tower for both branches, split in front of an activation which may work in place; see also ``broken``."""

    broken = False
    max_entry = 1

    def head_stem(self, features: list[Tensor], k: int) -> dict[str, list[Tensor]]:
        if isinstance(self.model.tower[2], nn.ReLU) and self.model.tower[2].inplace:
            features = [nn.functional.relu(x, inplace=True) for x in features]
        else:
            features = [x.relu() for x in features]
        return {"tower": [self.model.tower[1](self.model.tower[0](x)) for x in features]}

    def head_rest(self, maps: dict[str, list[Tensor]], k: int, image_size: tuple[int, int]) -> DensePredictions:
        whole = self.model.tower
        try:
            self.model.tower = nn.Sequential(nn.Identity() if self.broken else whole[2])
            return super().head(maps["tower"], image_size)
        finally:
            self.model.tower = whole

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        if self.broken:
            return super().head(features, image_size)
        return self.head_rest(self.head_stem(features, 1), 1, image_size)


def split_tiny(seed: int, *, inplace: bool) -> SplitTiny:
    adapter = SplitTiny(tiny_detector(seed).model)
    adapter.model.tower[2] = nn.ReLU(inplace)
    return adapter


@pytest.mark.parametrize("alignment", ["statistics", "none"])
@pytest.mark.parametrize("entry", [0, 1])
@pytest.mark.parametrize("worker", ["student", "teacher"])
def test_parts_that_work_in_place_edit_no_maps_that_others_need(worker, entry, alignment):
    images, targets = scene(((64, 64), (64, 64)))
    results = []
    for inplace in (False, True):
        student = split_tiny(1, inplace=inplace and worker == "student")
        teacher = split_tiny(2, inplace=inplace and worker == "teacher")
        distiller = CrossHeadDistiller(student, teacher, entry=entry, alignment=alignment)
        losses = distiller(images, targets)
        backward(losses)
        results.append((losses, gradients(student)))
    torch.testing.assert_close(results[1], results[0])


# --- what cannot work says so -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [-1, 1.5, "2"])
def test_an_entry_that_is_no_number_of_convolutions_is_refused(entry):
    with pytest.raises(errors.OptionError, match="entry of 0 or more"):
        CrossHeadDistiller(fcos(1), fcos(2), entry=entry)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (fcos, lambda: fcos(2, convs=2), r"entry of at most 2, but got 3 \(teacher FCOSAdapter\)"),
        (lambda: fcos(1, convs=2), fcos, r"entry of at most 2, but got 3 \(student FCOSAdapter\)"),
        (tiny_detector, fcos, r"entry of 0, because this head cannot be split.*student TinyAdapter"),
        (fcos, tiny_detector, r"entry of 0, because this head cannot be split.*teacher TinyAdapter"),
    ],
    ids=["shallow teacher", "shallow student", "student in one piece", "teacher in one piece"],
)
def test_an_entry_deeper_than_a_head_is_refused_with_the_deepest_one(student, teacher, message):
    with pytest.raises(errors.IncompatibleDetectorsError, match=message):
        CrossHeadDistiller(student(), teacher(), entry=3)


def test_heads_of_other_branches_are_refused():
    with pytest.raises(errors.IncompatibleDetectorsError, match=r"equal branches.*'tower'.*'classification', 'regress"):
        CrossHeadDistiller(split_tiny(1, inplace=False), fcos(2), entry=1)
    CrossHeadDistiller(split_tiny(1, inplace=False), fcos(2), entry=0)


def test_a_split_that_loses_something_is_refused():
    student = split_tiny(1, inplace=False)
    student.broken = True
    with pytest.raises(errors.DetectorError, match=r"head_rest\(head_stem\(\)\) to equal head\(\).*SplitTiny"):
        CrossHeadDistiller(student, split_tiny(2, inplace=False), entry=1)


class LostLevel(SplitTiny):
    def head_stem(self, features: list[Tensor], k: int) -> dict[str, list[Tensor]]:
        return {name: maps[:-1] for name, maps in super().head_stem(features, k).items()}


def test_a_split_that_loses_a_level_is_refused():
    with pytest.raises(errors.DetectorError, match=r"3 maps for each branch.*LostLevel\.head_stem\(\)"):
        CrossHeadDistiller(LostLevel(tiny_detector(1).model), split_tiny(2, inplace=False), entry=1)


def test_a_head_says_itself_that_it_cannot_be_split():
    adapter = tiny_detector()
    batch, _ = adapter.preprocess(scene()[0])
    for call in (lambda: adapter.head_stem([], 1), lambda: adapter.head_rest({}, 1, batch.image_size)):
        with pytest.raises(errors.DetectorError, match=r"can be split.*TinyAdapter.*max_entry"):
            call()


class Binned(TinyAdapter):
    """A head that also predicts distance bins."""

    def head(self, features: list[Tensor], image_size: tuple[int, int]) -> DensePredictions:
        predictions = super().head(features, image_size)
        bins = predictions.logits.mean(-1)[..., None, None].expand(*predictions.logits.shape[:2], 4, 5)
        return replace(predictions, distribution=bins)


@pytest.mark.parametrize(
    ("option", "good", "bad"),
    [
        ("quality", lambda: fcos(2), lambda: small_retinanet(2)),
        ("distribution", lambda: Binned(tiny_detector(2).model), lambda: tiny_detector(2)),
    ],
)
def test_a_weight_on_a_branch_that_the_teacher_lacks_is_refused_at_once(option, good, bad):
    student, loss = small_fcos(1, levels=3), CrossHeadLoss(**{option: 1.0})
    match = rf"a head that predicts {option}, but got none \(teacher .*{option} weight at 0"
    with pytest.raises(errors.IncompatibleDetectorsError, match=match):
        CrossHeadDistiller(student, bad(), loss=loss)
    distiller = CrossHeadDistiller(student, good(), loss=loss)
    assert f"distill_{option}" in distiller(*scene())
    with pytest.raises(errors.IncompatibleDetectorsError, match=match):
        distiller.attach_teacher(bad())
    distiller.attach_teacher(good())
    CrossHeadDistiller(student, bad())
