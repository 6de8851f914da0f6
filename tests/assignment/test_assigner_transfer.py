"""The way through one transfer, which predictions on an accelerator take, gives what the way on a CPU gives."""

import pytest
import torch

from crosskd_assign import TaskAwareOneToOneAssigner
from crosskd_assign.assignment import lookup
from crosskd_assign.transfer import Transfer
from tests.makers.builders import GRIDS, KINDS, random_predictions, random_targets

FIELDS = ("image", "point", "target", "metric", "fallback")


@pytest.mark.parametrize("levels", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_pairs_packed_into_one_transfer_give_the_same_assignment(monkeypatch, levels, kind):
    assign = TaskAwareOneToOneAssigner()
    targets = random_targets((5, 0, 9), kind=kind)
    predictions = random_predictions(targets, levels)
    predictions.logits[0, ::7] = torch.nan
    expected = assign(predictions, targets)
    transfers = []

    class Recorded(Transfer):
        def wait(self) -> torch.Tensor:
            transfers.append(self)
            return super().wait()

    monkeypatch.setattr(lookup, "_is_host", lambda device: False)
    monkeypatch.setattr(lookup, "Transfer", Recorded)
    begun = assign.begin(predictions, targets)
    assert not transfers  # nothing is waited for yet
    found = begun()
    assert len(transfers) == 1
    assert (found.unmatched, found.non_finite) == (expected.unmatched, expected.non_finite)
    for field in FIELDS:
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), rtol=0, atol=0)
