"""Score a detector by COCO's protocol, without and with NMS, and count its duplicates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from coco_example.data.dataset import CocoDataset
from coco_example.data.reader import CocoIndex
from coco_example.data.values import Identifier, key_of
from coco_example.engine.distributed import ALONE, Worker
from coco_example.engine.loaders import loaded
from coco_example.evaluation.coco_metrics import CocoScores, coco_evaluate, coco_results
from coco_example.evaluation.onnx_detector import NMS_THRESHOLD, OnnxDetector
from coco_example.evaluation.operating_point import choose_thresholds
from coco_example.models.detectors import selection_of
from crosskd_assign import DensePredictions, DetectorAdapter
from crosskd_assign.detectors.probing import evaluation_mode
from crosskd_assign.diagnostics import DuplicateReport, Thresholds, duplicate_report
from crosskd_assign.postprocessing import one_to_many_detections
from crosskd_assign.structures import Batch, Detection, Target
from crosskd_assign.validation import validate_option

__all__ = ["NMS_THRESHOLD", "Detector", "Evaluation", "Found", "detect", "evaluate", "on_cpu", "score", "table"]

Ranking = Literal["class", "class_quality"]


@dataclass(frozen=True)
class Detector:
    """A detector as it is scored and drawn: what predicts, and what its detections are ranked by.

    Attributes:
        adapter: The detector.
        ranking: "class" for one that was trained with one positive an object; "class_quality", where the quality branch
            counts in the score, for one that was trained with many.
        top_k: Detections of an image, which is the limit of its AP, too.
        one_class_per_point: Whether each point reports its best class only.
        classes: Labels to detect; None for all.
    """

    adapter: DetectorAdapter
    ranking: Ranking = "class"
    top_k: int = 100
    one_class_per_point: bool = False
    classes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        validate_option("top_k", self.top_k, low=1)

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.adapter.parameters()).device

    @torch.no_grad()
    def predict(self, images: Sequence[Tensor]) -> tuple[DensePredictions, Batch]:
        """Compute dense predictions, with the quality branch only where it is part of the score."""
        batch = self.preprocess(images)
        return self.predict_on(batch), batch

    @torch.no_grad()
    def predict_on(self, batch: Batch) -> DensePredictions:
        """Predict on a batch, with the scores that detections get."""
        features = self.adapter.features(batch)
        branch = selection_of(self.adapter)
        if branch is not None and self.ranking == "class":  # on copies, which the head may edit
            predictions = self.adapter.head([x.clone() for x in features], batch.image_size)
            return branch(features, predictions)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped
        predictions = self.adapter.head(features, batch.image_size)
        return predictions if self.ranking == "class_quality" else replace(predictions, quality=None)

    def preprocess(self, images: Sequence[Tensor]) -> Batch:
        """Make the batch that the detector runs on."""
        batch, _ = self.adapter.preprocess(images)
        return batch

    def detect(self, images: Sequence[Tensor], *, nms_threshold: float | None = None) -> list[Detection]:
        """Detect objects in a few images, without NMS unless a threshold is given."""
        predictions, batch = self.predict(images)
        return self.select(predictions, batch, nms_threshold=nms_threshold)

    def detect_twice(
        self, images: Sequence[Tensor], *, nms_threshold: float, precision: torch.dtype = torch.float32
    ) -> tuple[list[Detection], list[Detection]]:
        """Predict once; select without and with NMS. Detections are on the CPU."""
        device = self.device
        with torch.autocast(device.type, precision) if precision != torch.float32 else nullcontext():
            predictions, batch = self.predict([image.to(device) for image in images])
        plain, suppressed = (
            [on_cpu(d) for d in self.select(predictions, batch, nms_threshold=threshold)]
            for threshold in (None, nms_threshold)
        )
        return plain, suppressed

    def select(self, predictions: DensePredictions, batch: Batch, *, nms_threshold: float | None) -> list[Detection]:
        """Select the best detections of every image; ten times as many enter NMS, if a threshold is given."""
        return one_to_many_detections(
            self.adapter,
            predictions,
            batch,
            nms_threshold=nms_threshold,
            top_k=self.top_k,
            candidates=max(1000, 10 * self.top_k),
            one_class_per_point=self.one_class_per_point,
            classes=self.classes,
        )


@dataclass(frozen=True)
class Evaluation:
    """Scores of one detector, and the score thresholds of the best F1 on the images."""

    plain: CocoScores
    nms: CocoScores
    duplicates: DuplicateReport
    duplicates_nms: DuplicateReport
    images: int
    thresholds: Thresholds
    thresholds_nms: Thresholds

    def as_dict(self) -> dict[str, Any]:
        """List numbers: ``ap`` and its kin without NMS, ``ap_nms`` and its kin with, ``duplicates`` per object.

        ``across_classes`` are reports of found objects under another class.
        """
        nms = {f"{name}_nms": value for name, value in self.nms.as_dict().items()}
        rates = {"duplicates": self.duplicates.rate, "duplicates_nms": self.duplicates_nms.rate}
        rates["across_classes"] = self.duplicates.rate_across_classes
        rates["across_classes_nms"] = self.duplicates_nms.rate_across_classes
        return {**self.plain.as_dict(), **nms, **rates, "margin": self.duplicates.margin, "images": self.images}

    def usable(self, *, with_nms: bool) -> Thresholds:
        """Return the thresholds for detections as they are used: with NMS, or without."""
        return self.thresholds_nms if with_nms else self.thresholds


@dataclass(frozen=True)
class Found:
    """What a detector found in images, on the CPU.

    Attributes:
        plain: Detections without NMS.
        suppressed: Detections with NMS.
        targets: What there was to find.
    """

    plain: list[Detection]
    suppressed: list[Detection]
    targets: list[Target]

    def image_ids(self, index: CocoIndex) -> list[Identifier]:
        """List the annotation file's ids of the images."""
        return [index.records[int(target["image_id"])].id for target in self.targets]


@torch.inference_mode()
def detect(
    detector: Detector | OnnxDetector,
    dataset: CocoDataset,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    workers: int = 0,
    precision: torch.dtype = torch.float32,
    nms_threshold: float = NMS_THRESHOLD,
    worker: Worker = ALONE,
) -> Found:
    """Detect objects in the first ``limit`` images, without and with NMS; options are those of `evaluate`."""
    # 1. Whole batches in the order of the index, dealt to the processes in turn: a batch has a size of its own.
    count = len(dataset) if limit is None else min(limit, len(dataset))
    dealt = [range(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]

    # 2. Predict once, select twice. An exported file has one precision, its own.
    done: list[list[tuple[Detection, Detection, Target]]] = []
    with (
        evaluation_mode(detector.adapter) if isinstance(detector, Detector) else nullcontext(),
        loaded(dataset, dealt[worker.rank :: worker.count], workers=workers) as batches,
    ):
        for images, targets in batches:
            if isinstance(detector, Detector):
                plain, suppressed = detector.detect_twice(images, nms_threshold=nms_threshold, precision=precision)
            else:
                plain, suppressed = detector.detect_twice(images, nms_threshold=nms_threshold)
            done.append(list(zip(plain, suppressed, targets, strict=True)))

    # 3. All of them, in the order of the index.
    shares = worker.gather(done)
    rows = [row for n in range(len(dealt)) for row in shares[n % worker.count][n // worker.count]]
    return Found([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows])


def evaluate(
    detector: Detector,
    index: CocoIndex,
    *,
    label_to_category: Mapping[int, Identifier] | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    workers: int = 0,
    precision: torch.dtype = torch.float32,
    nms_threshold: float = NMS_THRESHOLD,
    worker: Worker = ALONE,
) -> Evaluation:
    """Score a detector on an index. Its modes and the random state stay as they are.

    Several processes detect in a share of the images each; the first one scores, and all get the scores.

    Args:
        detector: The detector.
        index: Images and annotations.
        label_to_category: Category id of each of the detector's labels, where they are not the index's own.
        limit: Images to score; None for all.
        batch_size: Images at a time.
        workers: Loader processes.
        precision: Autocast dtype.
        nms_threshold: IoU above which NMS drops the weaker box of a class.
        worker: This process, where several evaluate the same detector.
    """
    found = detect(
        detector,
        CocoDataset(index),
        limit=limit,
        batch_size=batch_size,
        workers=workers,
        precision=precision,
        nms_threshold=nms_threshold,
        worker=worker,
    )
    return worker.first_does(partial(score, found, index, label_to_category=label_to_category, top_k=detector.top_k))


def score(
    found: Found, index: CocoIndex, *, label_to_category: Mapping[int, Identifier] | None = None, top_k: int = 100
) -> Evaluation:
    """Score what a detector found in images of an index.

    Args:
        found: Its detections.
        index: Images and annotations.
        label_to_category: Category id of each of the detector's labels, where they are not the index's own.
        top_k: Detections of an image that AP counts; never less than COCO's 100, which leaves out none of fewer.
    """
    # 1. Score both lists in the categories of the annotation file.
    categories = index.label_to_category if label_to_category is None else dict(label_to_category)
    ids = found.image_ids(index)
    scores = [
        coco_evaluate(
            index.annotations,
            coco_results(detections, ids, categories),
            image_ids=ids,
            max_detections=(1, 10, max(100, top_k)),
        )
        for detections in (found.plain, found.suppressed)
    ]

    # 2. Count duplicates against targets, whose labels are the index's own.
    own = {key_of(category): label for label, category in index.label_to_category.items()}
    translation = {label: own.get(key_of(category), -1) for label, category in categories.items()}
    reports = [
        duplicate_report([_relabelled(d, translation) for d in detections], found.targets)
        for detections in (found.plain, found.suppressed)
    ]

    # 3. Thresholds.
    thresholds = [
        choose_thresholds(detections, index.annotations, ids, categories)
        for detections in (found.plain, found.suppressed)
    ]
    return Evaluation(scores[0], scores[1], reports[0], reports[1], len(ids), thresholds[0], thresholds[1])


def on_cpu(detection: Detection) -> Detection:
    """Copy a detection to the CPU."""
    return {
        "boxes": detection["boxes"].cpu(),
        "scores": detection["scores"].cpu(),
        "labels": detection["labels"].cpu(),
    }


def _relabelled(detection: Detection, translation: Mapping[int, int]) -> Detection:
    labels = [translation.get(label, -1) for label in detection["labels"].tolist()]
    return {**detection, "labels": torch.tensor(labels, dtype=torch.int64)}


def table(rows: Sequence[tuple[str, CocoScores, DuplicateReport]]) -> str:
    """Write a table of AP, AP50, AP75, APs, APm, APl (per cent), and of duplicates for each found object."""
    width = max(len(name) for name, *_ in rows)
    head = f"{'':{width}}     AP   AP50   AP75    APs    APm    APl  duplicates  across classes"
    lines = [head]
    for name, s, duplicates in rows:
        numbers = (s.ap, s.ap50, s.ap75, s.ap_small, s.ap_medium, s.ap_large)
        cells = " ".join(f"{100 * value:6.1f}" for value in numbers)
        lines.append(f"{name:{width}} {cells}  {duplicates.rate:10.3f}  {duplicates.rate_across_classes:14.3f}")
    return "\n".join(lines).replace("   nan", "     –")
