"""The best detector of a run's evaluations, kept beside the last."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from coco_example.files import write_json
from coco_example.models.saved_model import ModelSpec, read_notes, save_model
from coco_example.models.score_thresholds import ScoreThresholds
from coco_example.options import Options

__all__ = ["BEST", "Best"]

BEST = "best"  # a folder in the run's


class Best:
    """Keeps the detector with the best AP in ``best/``, which every command takes as it takes the run's folder.

    AP is without NMS, but of a one-to-many detector with NMS. A detector as good as an earlier one takes its place.
    Step and score are in the file of the weights, which is replaced in one piece: they belong together whenever the run
    is killed, and a run that goes on knows them.

    Args:
        folder: The run's.
        spec: What its detector is.
        options: The run's; nothing is kept without evaluations on the way.
    """

    def __init__(self, folder: Path, spec: ModelSpec, options: Options) -> None:
        self.folder, self._spec, self._options = folder / BEST, spec, options
        self.enabled = options.training.eval_every > 0
        self.score = "ap_nms" if spec.one_to_many else "ap"

    def offer(
        self, network: nn.Module, scores: Mapping[str, float], step: int, thresholds: ScoreThresholds | None = None
    ) -> None:
        """Keep the detector of an evaluation, and the thresholds found there, if none before was better.

        Call it on one process.
        """
        if not self.enabled:
            return
        best, value = self.found(), scores[self.score]
        if best is not None and not value >= _number(best[self.score]):
            return
        self.folder.mkdir(exist_ok=True)
        write_json(self.folder / "config.json", self._options.as_flat())
        spec = replace(self._spec, thresholds=thresholds)
        save_model(self.folder, network, spec, {"step": f"{step}", self.score: repr(float(value))})

    def found(self) -> dict[str, Any] | None:
        """Return step and score of the detector that is kept; None if there is none, or none that can be read."""
        with suppress(OSError, ValueError, KeyError, SafetensorError):
            notes = read_notes(self.folder)
            return {"step": int(notes["step"]), self.score: float(notes[self.score])}
        return None


def _number(score: float) -> float:
    return -1.0 if math.isnan(score) else score  # a split without objects
