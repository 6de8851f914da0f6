"""The score thresholds that a detector is used with: where they come from, and what they keep."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import Self

from crosskd_assign.diagnostics import Thresholds
from crosskd_assign.structures import Detection

__all__ = ["CUTS_PAGE", "USUAL", "ScoreThresholds"]

CUTS_PAGE = "docs/troubleshooting.md#further-objects-may-have-been-dropped"  # what explains `warn_of_cuts`


@dataclass(frozen=True)
class ScoreThresholds:
    """Least scores of what is shown: one for all classes, and one for each where it was chosen.

    Attributes:
        overall: That of labels without one of their own.
        chosen_on: What it was chosen on, in words; empty where nothing was.
        per_label: That of a label.
    """

    overall: float
    chosen_on: str = ""
    per_label: Mapping[int, float] = field(default_factory=dict)

    @classmethod
    def of_best_f1(cls, thresholds: Thresholds, chosen_on: str) -> Self | None:
        """Take over thresholds that were found; None where no detection was right, so that there is none."""
        if math.isnan(thresholds.overall.score):
            return None
        return cls(thresholds.overall.score, chosen_on, {label: x.score for label, x in thresholds.per_class.items()})

    @classmethod
    def from_flat(cls, values: Any) -> Self:
        """Read what `as_flat` has written.

        Raises:
            TypeError: It is something else.
            ValueError: A label is no number.
        """
        if not isinstance(values, Mapping) or not isinstance(values.get("per_label"), Mapping):
            raise TypeError("thresholds without per_label")
        numbers = [values.get("overall"), *values["per_label"].values()]
        if not all(type(number) in (int, float) for number in numbers):
            raise TypeError("thresholds that are no numbers")
        per_label = {int(label): float(score) for label, score in values["per_label"].items()}
        return cls(float(values["overall"]), str(values.get("chosen_on", "")), per_label)

    def as_flat(self) -> dict[str, Any]:
        """List everything by name, as ``model.json`` has it."""
        per_label = {str(label): score for label, score in self.per_label.items()}
        return {"overall": self.overall, "per_label": per_label, "chosen_on": self.chosen_on}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Self | None:
        """Read them from an exported file, if it has them.

        Raises:
            TypeError: It has something else.
            ValueError: Likewise.
        """
        if "score_threshold" not in metadata:
            return None
        values = {"overall": float(metadata["score_threshold"]), "chosen_on": metadata.get("thresholds_chosen_on", "")}
        return cls.from_flat({**values, "per_label": json.loads(metadata.get("score_thresholds", "{}"))})

    def as_metadata(self) -> dict[str, str]:
        """List them as an exported file has them."""
        flat = self.as_flat()
        return {
            "score_threshold": repr(self.overall),
            "score_thresholds": json.dumps(flat["per_label"]),
            "thresholds_chosen_on": self.chosen_on,
        }

    def of(self, label: int) -> float:
        """Return the threshold of a label."""
        return self.per_label.get(label, self.overall)

    def cuts(self, detection: Detection, top_k: int, labels: Iterable[int]) -> bool:
        """Say whether ``top_k`` may have dropped, of one image, what a threshold would have kept.

        What is dropped scores at most as much as the last one that is kept. So it may be an object of a class whose
        threshold is no higher, if the image shows that class at all: if it is among the detections that are kept.

        Args:
            detection: Detections of the image, best first.
            top_k: Most that there can be.
            labels: Those that are shown.
        """
        scores, found = detection["scores"], {*detection["labels"].tolist()} & {*labels}
        return len(scores) >= top_k and any(float(scores[-1]) >= self.of(label) for label in found)

    def warn_of_cuts(self, cut: int, images: int, top_k: int) -> str:
        """Write what to do where `cuts` is true of some images."""
        return (
            f"in {cut} of {images} images all {top_k} detections that --top-k allows score above the threshold of a "
            f"class among them ({self}), so further objects may have been dropped; raise --top-k, for an exported file "
            "that of export.py"
        )

    def __str__(self) -> str:
        overall = f"{self.overall:.2f}"
        own = [f"{score:.2f}" for score in sorted(self.per_label.values())]
        each = f", by class {' to '.join(dict.fromkeys([own[0], own[-1]]))}" if set(own) - {overall} else ""
        origin = f", the best F1 on {self.chosen_on}" if self.chosen_on else ""
        return f"{overall}{each}{origin}"


# Of a detector that came without, as one of an earlier version did.
USUAL = ScoreThresholds(0.3)
