"""Data sets that lack some of a detector's classes: what they do not have is not trained, and no background."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from crosskd_assign import AuxiliaryHead, EndToEndDetector, OneToOneLoss, SelectionBranch
from crosskd_assign.errors import OptionError, TargetError
from crosskd_assign.losses import of_classes
from tests.makers.small_models import backward, scene, small_fcos

CLASSES = (1, 3)


def steps(
    classes: tuple[int, ...] | None, *, whole: bool = False, ranking: float = 0.3
) -> tuple[dict[str, Tensor], Any, Any]:
    """Losses of a detector of four labels, and gradients of the class logits' bias of both its heads."""
    torch.manual_seed(0)
    model: Any = small_fcos(1, classes=4)
    images, targets = scene(((64, 64),) * 2, boxes=(2, 1))
    for target in targets:
        target["labels"] = torch.where(target["labels"] % 2 == 0, 1, 3)
    auxiliary = AuxiliaryHead(model, classes=classes)
    detector = EndToEndDetector(
        model,
        loss=OneToOneLoss(ranking=ranking, classes=classes),
        auxiliary=auxiliary,
        selection=SelectionBranch(model) if whole else None,
    ).train()
    losses = detector(images, targets)
    backward(losses)
    grads = [
        head.classification_head.cls_logits.bias.grad
        for head in (model.head, auxiliary.head)  # type: ignore[union-attr]
    ]
    return {name: loss.detach() for name, loss in losses.items()}, *grads


@pytest.mark.parametrize("whole", [False, True], ids=["plain", "selection"])
def test_no_gradient_reaches_a_class_that_the_data_lack(whole):
    # Without the ranking term, whose candidates are the best of all classes that there are.
    _, *grads = steps(CLASSES, whole=whole, ranking=0.0)
    _, *every = steps(None, whole=whole, ranking=0.0)
    for some, all_of_them in zip(grads, every, strict=True):
        others = [label for label in range(len(some)) if label not in CLASSES]
        assert others
        assert some[others].abs().max() == 0
        assert all_of_them[others].abs().min() > 0  # as background
        torch.testing.assert_close(some[list(CLASSES)], all_of_them[list(CLASSES)])


def test_all_classes_are_what_none_are():
    count = small_fcos(1, classes=4).head.classification_head.num_classes
    torch.testing.assert_close(steps(tuple(range(count)))[:1], steps(None)[:1], rtol=0, atol=1e-6)


def test_labels_and_logits_stay_together():
    logits = torch.arange(8.0).reshape(1, 2, 4)
    kept, labels = of_classes(logits, torch.tensor([3, 1, 3]), (3, 1))
    assert kept.tolist() == [[[3, 1], [7, 5]]]
    assert labels.tolist() == [0, 1, 0]


@pytest.mark.parametrize("classes", [(), (1, 1), (-1,), (True,)])
@pytest.mark.parametrize("kind", [OneToOneLoss, lambda **options: AuxiliaryHead(small_fcos(1), **options)])
def test_classes_that_cannot_be_are_refused(kind, classes):
    with pytest.raises(OptionError, match="Expected different labels from 0 up"):
        kind(classes=classes)


def test_what_targets_and_detector_contradict_is_refused():
    with pytest.raises(OptionError, match="labels below 4, the number of class logits, but got 7"):
        of_classes(torch.zeros(1, 1, 4), torch.tensor([1]), (1, 7))
    with pytest.raises(TargetError, match=r"labels among classes=\(1, 3\), but got 2"):
        of_classes(torch.zeros(1, 1, 4), torch.tensor([1, 2]), (1, 3))
