"""A loss term that is exactly 0 again and again stops the run with a sentence."""

import arms
import pytest
import training


def silent(self, features, predictions, batch):
    return {"imitation": features[0][:0].sum()}


@pytest.mark.parametrize(("checks", "code"), [(3, 2), (1000, 0)])
def test_a_silent_distillation_loss_is_noticed(
    workshop, teacher, no_pictures, tmp_path, monkeypatch, capsys, checks, code
):
    monkeypatch.setattr(training, "DEAD_CHECKS", checks)
    monkeypatch.setattr(arms.StandardisedImitation, "distillation_losses", silent)
    options = {"arm": "feature-imitation", "teacher": teacher, "batch_size": 4}
    assert workshop.train(tmp_path / "run", **options) == code
    if code:
        assert "exactly 0 at 3 checks in a row (imitation, step 3)" in capsys.readouterr().err
