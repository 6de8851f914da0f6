"""From dense predictions to detections: the top k, and for one-to-many detectors NMS."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .detectors import DetectorAdapter
from .geometry import at_least_float32, clip
from .structures import Batch, DensePredictions, Detection
from .validation import validate_classes

__all__ = ["one_to_many_detections", "suppress", "top_detections"]


def top_detections(
    predictions: DensePredictions,
    k: int,
    *,
    one_class_per_point: bool = False,
    classes: Iterable[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Select the ``k`` best (point, class) pairs of every image; this replaces NMS.

    Args:
        predictions: Predictions of N images.
        k: Pairs to keep; fewer if there are fewer.
        one_class_per_point: Let each point compete with its best class only, the lower one of a tie, so that a point
            gives one detection at most.
        classes: Labels that compete; the others are left out before the best are selected. None: all.

    Returns:
        ``scores (N, k)`` descending, ``boxes (N, k, 4)`` in pixels of the batch image, ``labels (N, k)``.

    Raises:
        OptionError: ``classes`` are no labels of the detector.

    Example:
        >>> logits = torch.tensor([[[0.0, 3.0], [1.0, -5.0]]])
        >>> boxes, points, strides = torch.zeros(1, 2, 4), torch.zeros(2, 2), torch.ones(2)
        >>> _, _, labels = top_detections(DensePredictions(logits, boxes, points, strides), 2)
        >>> labels.tolist()
        [[1, 0]]
    """
    # 1. The classes that compete: all, those of the filter, and of these each point's best alone.
    logits, chosen, best = predictions.logits, None, None
    if classes is not None:
        chosen = torch.tensor(validate_classes(classes, predictions.num_classes), device=logits.device)
        logits = logits.index_select(-1, chosen)
    if one_class_per_point:
        best = logits.argmax(dim=-1, keepdim=True)  # (N, A, 1)
        logits = logits.gather(-1, best)
    _, a, c = logits.shape

    # 2. A pair among the k best has a point among the k best points: a full sort of A · C values is never needed.
    points = logits.amax(dim=-1).topk(_at_most(k, a), dim=1).indices  # (N, p)
    candidates = logits.gather(1, points[..., None].expand(-1, -1, c)).flatten(1)  # (N, p · C)
    logits, index = candidates.topk(_at_most(k, candidates.shape[1]), dim=1)

    # 3. Their boxes and labels.
    point = points.gather(1, torch.div(index, c, rounding_mode="floor"))  # (N, k)
    boxes = predictions.boxes.gather(1, point[..., None].expand(-1, -1, 4))
    labels = index % c if best is None else best[..., 0].gather(1, point)
    return at_least_float32(logits).sigmoid(), boxes, labels if chosen is None else chosen[labels]


def _at_most(k: int, size: int) -> int:
    """``min``, which leaves a size open that a tracer has left open."""
    return min(k, size) if isinstance(size, int) else torch.sym_min(k, size)


def suppress(detection: Detection, iou_threshold: float = 0.6, *, top_k: int = 100) -> Detection:
    """Apply class-wise non-maximum suppression to one image's detections; at most ``top_k`` remain, best first.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 10, 10]])
        >>> found = Detection(boxes=boxes, scores=torch.tensor([0.9, 0.8]), labels=torch.tensor([1, 1]))
        >>> suppress(found)["scores"].tolist() == [found["scores"][0]]
        True
    """
    from torchvision.ops import batched_nms  # noqa: PLC0415  # seconds to import, and only comparisons need it

    keep = batched_nms(detection["boxes"].float(), detection["scores"], detection["labels"], iou_threshold)[:top_k]
    return {"boxes": detection["boxes"][keep], "scores": detection["scores"][keep], "labels": detection["labels"][keep]}


def one_to_many_detections(
    adapter: DetectorAdapter,
    predictions: DensePredictions,
    batch: Batch,
    *,
    nms_threshold: float | None = 0.6,
    top_k: int = 100,
    candidates: int = 1000,
    one_class_per_point: bool = False,
    classes: Iterable[int] | None = None,
) -> list[Detection]:
    """Detect as one-to-many detectors do, scored by √(class · quality), as FCOS is, or by class without quality.

    Args:
        adapter: The detector.
        predictions: The predictions of its head, or of another's on its features.
        batch: The images they were made from.
        nms_threshold: IoU above which the weaker box of a class is suppressed; None leaves NMS out.
        top_k: Detections returned for an image.
        candidates: Detections that enter NMS.
        one_class_per_point: As in `top_detections`, before NMS. It does not take the place of NMS across classes: that
            drops what other points report of an object, this what the same point reports under further classes.
        classes: As in `top_detections`, before NMS.

    Returns:
        N detections in the coordinates of the images that came in.

    Example:
        >>> from torchvision.models.detection import fcos_resnet50_fpn
        >>> from crosskd_assign import adapt
        >>> adapter = adapt(fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=64)).eval()
        >>> batch, _ = adapter.preprocess([torch.rand(3, 64, 64)])
        >>> predictions = adapter.head(adapter.features(batch), batch.image_size)
        >>> len(one_to_many_detections(adapter, predictions, batch, nms_threshold=None, top_k=7)[0]["boxes"])
        7
    """
    if predictions.quality is not None:
        score = (predictions.logits.float().sigmoid() * predictions.quality.float().sigmoid()[..., None]).sqrt()
        predictions = DensePredictions(score.logit(), predictions.boxes, predictions.points, predictions.strides)
    count = top_k if nms_threshold is None else candidates
    scores, boxes, labels = top_detections(predictions, count, one_class_per_point=one_class_per_point, classes=classes)
    detections: list[Detection] = [
        # Clipped first: boxes that reach out of the picture overlap less outside it than in.
        {"boxes": clip(b, size), "scores": s, "labels": label}
        for b, s, label, size in zip(boxes, scores, labels, batch.sizes, strict=True)
    ]
    if nms_threshold is not None:
        detections = [suppress(detection, nms_threshold, top_k=top_k) for detection in detections]
    return adapter.restore(detections, batch)
