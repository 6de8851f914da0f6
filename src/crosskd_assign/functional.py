"""The losses as pure functions, each usable alone.

All of them work in float32 at least, whatever autocast says, take logits rather than probabilities, and return a
scalar that is connected to the graph even when nothing is matched. ``normalizer`` divides the sum; use
`mean_over_ranks` on it so that the gradient does not depend on how a batch is split over processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .fused import background_focal_sum, quality_focal_sum
from .geometry import at_least_float32, generalized_iou, iou
from .structures import Assignment

__all__ = [
    "align_statistics",
    "cross_head_box_loss",
    "cross_head_classification_loss",
    "cross_head_distribution_loss",
    "cross_head_quality_loss",
    "distillation_normalizer",
    "feature_imitation_loss",
    "mean_over_ranks",
    "one_to_one_box_loss",
    "one_to_one_classification_loss",
    "one_to_one_ranking_loss",
    "product_logits",
    "task_aware_metric",
    "teacher_confidence",
]


def task_aware_metric(logits: Tensor, boxes: Tensor, targets: Tensor, *, alpha: float, beta: float) -> Tensor:
    """Classification quality times localisation quality, m = σ(z)^alpha · IoU(b, g)^beta in 0…1.

    Source: alpha + beta = 1 is POTO's (Wang et al., "End-to-End Object Detection with Fully Convolutional Network",
    CVPR 2021, eq. 4), (1, 6) TOOD's (Feng et al., ICCV 2021, eq. 2).

    Args:
        logits: ``(…,)`` logit z of the object's class at each point; its dtype is that of the powers.
        boxes: ``(…, 4)`` predicted boxes b.
        targets: ``(…, 4)`` the object's box g.
        alpha: Exponent of the class score.
        beta: Exponent of the IoU.

    Returns:
        ``(…,)``; in half precision most values would underflow to 0, so callers pass float32.
    """
    return (alpha * F.logsigmoid(logits)).exp() * iou(boxes, targets).to(logits.dtype) ** beta


def one_to_one_classification_loss(
    logits: Tensor,
    assignment: Assignment,
    labels: Tensor,
    *,
    normalizer: Tensor | float,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """Sigmoid focal loss with one positive per object; every other point and class is background.

    Σ over background of (1 − α) pᵞ softplus(z) plus Σ over matched pairs of α (1 − p)ᵞ softplus(−z), p = σ(z). The
    background term runs over everything and the M matched entries are corrected, so no dense target is ever built.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, eq. 5; α and γ are its defaults.

    Args:
        logits: ``(N, A, C)`` class logits.
        assignment: The M matched pairs.
        labels: ``(M,)`` int64, the class of each matched pair.
        normalizer: Divisor of the sum.
        alpha: Weight of the positives, 0…1.
        gamma: Focusing exponent, at least 0.

    Returns:
        A scalar.
    """
    background = (1 - alpha) * background_focal_sum(logits, gamma)
    matched = at_least_float32(logits[assignment.image, assignment.point, labels])  # (M,)
    # Powers as exponentials: p ** gamma has no derivative where p underflows to 0 and gamma < 1.
    positive = alpha * (gamma * F.logsigmoid(-matched)).exp() * F.softplus(-matched)
    negative = (1 - alpha) * (gamma * F.logsigmoid(matched)).exp() * F.softplus(matched)
    return (background + (positive - negative).sum()) / normalizer


def one_to_one_box_loss(
    boxes: Tensor, assignment: Assignment, matched_boxes: Tensor, *, normalizer: Tensor | float
) -> Tensor:
    """Σ over matched pairs of 1 − GIoU.

    Args:
        boxes: ``(N, A, 4)`` decoded boxes.
        assignment: The M matched pairs.
        matched_boxes: ``(M, 4)`` ground truth of each pair.
        normalizer: Divisor of the sum.

    Returns:
        A scalar, connected to the graph when M is 0.
    """
    predicted = at_least_float32(boxes[assignment.image, assignment.point])  # (M, 4)
    return (1 - generalized_iou(predicted, matched_boxes.to(predicted.dtype))).sum() / normalizer


def one_to_one_ranking_loss(
    logits: Tensor,
    boxes: Tensor,
    assignment: Assignment,
    labels: Tensor,
    matched_boxes: Tensor,
    *,
    normalizer: Tensor | float,
    iou_threshold: float = 0.6,
    candidates: int = 300,
) -> Tensor:
    """Σ over matched pairs of log(1 + Σ_j exp(z_j − z)): the pair against its duplicates j.

    Duplicates are what NMS would have to remove: among the image's ``candidates`` best (point, class) pairs those of
    the object's class, matched to no object, whose predicted box has an IoU with the object above ``iou_threshold``.
    It is the cross-entropy of picking the matched point out of them: the focal loss asks each of them to be low, this
    asks them to be lower than the one. Its gradient lowers duplicates and never raises the matched point's own score,
    which would put objects with many duplicates before others (docs/results.md).

    Args:
        logits: ``(N, A, C)`` class logits; no gradient flows into those of the matched pairs.
        boxes: ``(N, A, 4)`` decoded boxes; no gradient flows into them.
        assignment: The M matched pairs.
        labels: ``(M,)`` int64, the class of each matched pair.
        matched_boxes: ``(M, 4)`` ground truth of each pair.
        normalizer: Divisor of the sum.
        iou_threshold: IoU of a duplicate, 0…1; 0.6 is the NMS threshold of torchvision's FCOS.
        candidates: Pairs of an image that are looked at.

    Returns:
        A scalar, connected to the graph when M is 0.
    """
    _, a, c = logits.shape
    image = assignment.image
    best = logits.detach().flatten(1).topk(min(candidates, a * c), dim=1).indices  # (N, k)
    point, label = torch.div(best, c, rounding_mode="floor"), best % c
    own = torch.zeros_like(logits, dtype=torch.bool)
    own[image, assignment.point, labels] = True
    free = ~own.flatten(1).gather(1, best)  # (N, k)
    predicted = at_least_float32(boxes.detach().gather(1, point[..., None].expand(-1, -1, 4)))  # (N, k, 4)
    overlap = iou(predicted[image], matched_boxes.to(predicted.dtype)[:, None])  # (M, k)
    rival = free[image] & (label[image] == labels[:, None]) & (overlap > iou_threshold)
    matched = at_least_float32(logits.detach()[image, assignment.point, labels])  # (M,)
    others = at_least_float32(logits.flatten(1).gather(1, best))[image]  # (M, k)
    gap = torch.where(rival, others - matched[:, None], -torch.inf)
    return F.softplus(torch.cat([gap, gap.new_full((len(gap), 1), -60.0)], dim=1).logsumexp(dim=1)).sum() / normalizer


def teacher_confidence(teacher_logits: Tensor) -> Tensor:
    """How sure the teacher is that a point shows an object: w = max over classes of σ(z_t), ``(N, A)``."""
    return at_least_float32(teacher_logits.amax(dim=-1)).sigmoid()


def product_logits(first: Tensor, second: Tensor) -> Tensor:
    """The logit of σ(first) · σ(second).

    σ(x) σ(y) has the odds 1 / (e⁻ˣ + e⁻ʸ + e⁻ˣ⁻ʸ), so that the logarithm is never left and any magnitude is exact.

    Args:
        first: Logits.
        second: Logits that broadcast with them.
    """
    x, y = at_least_float32(first), at_least_float32(second)
    return -torch.logaddexp(torch.logaddexp(-x, -y), -x - y)


def distillation_normalizer(confidence: Tensor, threshold: float = 0.05) -> Tensor:
    """N = max(1, mean over ranks of Σ w·1[w > threshold]), a scalar.

    It depends on the teacher alone. A normaliser made of the student's positives would scale the loss by the number of
    positives per object, 5 to 28 times between one-to-many and one-to-one; the threshold keeps the sum from being
    mostly background.

    Args:
        confidence: ``(N, A)`` of `teacher_confidence`.
        threshold: Confidence below which a point does not count.
    """
    total = torch.where(confidence > threshold, confidence, 0).sum()
    return mean_over_ranks(total).clamp(min=1)


def cross_head_classification_loss(
    cross_logits: Tensor, teacher_logits: Tensor, *, normalizer: Tensor | float, gamma: float = 1.0
) -> Tensor:
    """Σ |σ(z_x) − q|ᵞ · BCE(z_x, q) with q = σ(z_t): zero, with zero gradient, where the two agree (γ > 0).

    Source: quality focal loss, Li et al., "Generalized Focal Loss", NeurIPS 2020, eq. 2, on soft labels; γ = 1 as in
    CrossKD (Wang et al., CVPR 2024). γ = 0 is plain binary cross-entropy.

    Args:
        cross_logits: ``(N, A, C)`` of the teacher's head on the student's features.
        teacher_logits: ``(N, A, C)`` of the teacher's head on its own features; no gradient flows into it.
        normalizer: Divisor of the sum.
        gamma: 0, or at least 1 (in between, the gradient is infinite where the two agree).

    Returns:
        A scalar.

    Raises:
        PredictionError: The logits differ in shape or device.
    """
    return quality_focal_sum(cross_logits, teacher_logits, gamma) / normalizer


def cross_head_box_loss(
    cross_boxes: Tensor, teacher_boxes: Tensor, confidence: Tensor, *, normalizer: Tensor | float
) -> Tensor:
    """Σ w · (1 − GIoU(b_x, b_t)).

    Args:
        cross_boxes: ``(N, A, 4)`` of the teacher's head on the student's features.
        teacher_boxes: ``(N, A, 4)`` of the teacher's head on its own features; no gradient flows into it.
        confidence: ``(N, A)`` weights w of `teacher_confidence`.
        normalizer: Divisor of the sum.

    Returns:
        A scalar.
    """
    overlap = generalized_iou(at_least_float32(cross_boxes), at_least_float32(teacher_boxes.detach()))
    return (confidence.detach() * (1 - overlap)).sum() / normalizer


def cross_head_distribution_loss(
    cross_bins: Tensor,
    teacher_bins: Tensor,
    confidence: Tensor,
    *,
    normalizer: Tensor | float,
    temperature: float = 1.0,
) -> Tensor:
    """Σ w · T² · mean over sides of KL(softmax(d_t / T) ‖ softmax(d_x / T)): zero where the two agree.

    For heads that predict each side of a box as a distribution over distance bins. Source: localisation distillation,
    Zheng et al., CVPR 2022, eq. 3; T = 1 as in CrossKD (Wang et al., CVPR 2024).

    Args:
        cross_bins: ``(N, A, 4, R)`` logits of R bins, of the teacher's head on the student's features.
        teacher_bins: ``(N, A, 4, R)`` of the teacher's head on its own features; no gradient flows into it.
        confidence: ``(N, A)`` weights w of `teacher_confidence`.
        normalizer: Divisor of the sum.
        temperature: T, above 0.

    Returns:
        A scalar.
    """
    student = F.log_softmax(at_least_float32(cross_bins) / temperature, dim=-1)
    teacher = F.log_softmax(at_least_float32(teacher_bins.detach()) / temperature, dim=-1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1).mean(dim=-1)  # (N, A)
    return temperature**2 * (confidence.detach() * divergence).sum() / normalizer


def cross_head_quality_loss(
    cross_quality: Tensor, teacher_quality: Tensor, confidence: Tensor, *, normalizer: Tensor | float
) -> Tensor:
    """Σ w · BCE(o_x, σ(o_t)) on ``(N, A)`` quality logits; arguments as in `cross_head_box_loss`."""
    target = at_least_float32(teacher_quality.detach()).sigmoid()
    entropy = F.binary_cross_entropy_with_logits(at_least_float32(cross_quality), target, reduction="none")
    return (confidence.detach() * entropy).sum() / normalizer


def feature_imitation_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], eps: float = 1e-5) -> Tensor:
    """Σ over maps of the mean over channels of 1 − r, r being Pearson's correlation of a channel with the teacher's.

    Computed as half the mean squared difference of both maps, standardised per channel over the batch; unlike the
    cross-head losses it hears the background, too, and no head.

    Source: PKD, Cao et al., "General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
    NeurIPS 2022, eq. 3.

    Args:
        student: Maps ``(N, *, H, W)``, each of the shape of the teacher's.
        teacher: Maps ``(N, *, H, W)``; no gradient flows into them.
        eps: Added to the variances, so that a constant channel counts as zero.

    Returns:
        A scalar.
    """
    pairs = zip(student, teacher, strict=True)
    return torch.stack([F.mse_loss(_standardized(s, eps), _standardized(t.detach(), eps)) for s, t in pairs]).sum() / 2


def _standardized(x: Tensor, eps: float) -> Tensor:
    x = at_least_float32(x)
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0, keepdim=True)
    return (x - mean) * (var + eps).rsqrt()


def align_statistics(student: Tensor, teacher: Tensor, eps: float = 1e-5) -> Tensor:
    """Give the student's feature map the teacher's mean and standard deviation, per channel over the whole batch.

    Computed in float32 with biased variance and ``eps`` inside the root, so that a 1 × 1 map of a single image is fine;
    the teacher's statistics are constants.

    Source: adaptive instance normalisation, Huang and Belongie, ICCV 2017, eq. 8, with statistics over N, H and W as
    CrossKD takes them.

    Args:
        student: ``(N, *, H, W)``.
        teacher: ``(N, *, H', W')`` with the same number of channels.
        eps: Added to both variances.

    Returns:
        ``(N, *, H, W)`` in the dtype of ``student``.
    """
    x, reference = at_least_float32(student), at_least_float32(teacher.detach())
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0, keepdim=True)
    reference_var, reference_mean = torch.var_mean(reference, dim=(0, 2, 3), correction=0, keepdim=True)
    gain = ((reference_var + eps) / (var + eps)).sqrt()
    return ((x - mean) * gain + reference_mean).to(student.dtype)


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a scalar over all processes of the default group; the value itself where there is none. No gradient."""
    value = value.detach()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value
