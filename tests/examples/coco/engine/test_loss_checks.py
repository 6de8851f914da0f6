"""A loss term that is exactly 0 again and again stops the run with a sentence."""

import pytest
from coco_example.engine import loss_checks
from coco_example.models.distillers import StandardisedImitation


def silent(self, run):
    return {"features": run.features[0][:0].sum()}


@pytest.mark.parametrize(("checks", "code"), [(3, 2), (1000, 0)])
def test_a_silent_distillation_loss_is_noticed(
    workshop, teacher, no_pictures, tmp_path, monkeypatch, capsys, checks, code
):
    monkeypatch.setattr(loss_checks, "DEAD_CHECKS", checks)
    monkeypatch.setattr(StandardisedImitation, "distill", silent)
    options = {"arm": "feature-imitation", "teacher": teacher, "batch_size": 4}
    assert workshop.train(tmp_path / "run", **options) == code
    if code:
        assert "exactly 0 at 3 checks in a row (distill_features, step 3)" in capsys.readouterr().err
