"""The losses as pure functions, each usable alone.

All of them work in float32 at least, also under autocast, take logits rather than probabilities, and return a
scalar that is connected to the graph even when nothing is matched. ``normalizer`` divides the sum; use
`distributed.normalizer_over_ranks` on it so that the gradient does not depend on how a batch is split over processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed import Statistics, channel_statistics, normalizer_over_ranks
from .geometry import at_least_float32, generalized_iou, iou
from .kernels import background_focal_sum, quality_focal_sum
from .structures import Assignment

__all__ = [
    "align_statistics",
    "cross_head_box_loss",
    "cross_head_classification_loss",
    "cross_head_distribution_loss",
    "cross_head_quality_loss",
    "distillation_normalizer",
    "feature_imitation_loss",
    "one_to_many_box_loss",
    "one_to_many_classification_loss",
    "one_to_one_box_loss",
    "one_to_one_classification_loss",
    "one_to_one_ranking_loss",
    "product_logits",
    "sigmoid_logits",
    "task_aware_metric",
    "teacher_confidence",
]

_LOG_NOTHING = -60.0  # exp of it is below float32's resolution beside 1
_FINITE = (-3e38, 3e38)  # infinity less itself would be NaN


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

    Example:
        >>> box = torch.tensor([0.0, 0.0, 4.0, 4.0])
        >>> half = torch.tensor([0.0, 0.0, 4.0, 2.0])
        >>> task_aware_metric(torch.tensor(0.0), box, half, alpha=0.5, beta=0.5)
        tensor(0.5000)
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

    Example:
        >>> pair = Assignment(*torch.tensor([[0], [2], [0]]), torch.ones(1), torch.tensor([False]))
        >>> logits = torch.full((1, 4, 2), -9.0)
        >>> logits[0, 2, 1] = 9.0  # as it should be
        >>> one_to_one_classification_loss(logits, pair, torch.tensor([1]), normalizer=1.0).item() < 1e-6
        True
    """
    return one_to_many_classification_loss(
        logits, assignment, labels, 1.0, normalizer=normalizer, alpha=alpha, gamma=gamma
    )


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

    Example:
        >>> pair = Assignment(*torch.tensor([[0], [2], [0]]), torch.ones(1), torch.tensor([False]))
        >>> boxes = torch.tensor([0.0, 0.0, 4.0, 4.0]).expand(1, 3, 4)
        >>> one_to_one_box_loss(boxes, pair, torch.tensor([[0.0, 0.0, 4.0, 2.0]]), normalizer=1.0)
        tensor(0.5000)
    """
    return one_to_many_box_loss(boxes, assignment, matched_boxes, 1.0, normalizer=normalizer)


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

    Example:
        >>> pair = Assignment(*torch.tensor([[0], [2], [0]]), torch.ones(1), torch.tensor([False]))
        >>> logits, boxes = torch.zeros(1, 3, 1), torch.tensor([0.0, 0.0, 4.0, 4.0]).expand(1, 3, 4)  # two duplicates
        >>> one_to_one_ranking_loss(logits, boxes, pair, torch.tensor([0]), boxes[0, :1], normalizer=1.0)
        tensor(1.0986)
    """
    # 1. The candidates: the image's best (point, class) pairs.
    _, a, c = logits.shape
    image = assignment.image
    best = logits.detach().flatten(1).topk(min(candidates, a * c), dim=1).indices  # (N, k)
    point, label = torch.div(best, c, rounding_mode="floor"), best % c

    # 2. Duplicates among them: unmatched, of the object's class, over the object.
    own = torch.zeros_like(logits, dtype=torch.bool)
    own[image, assignment.point, labels] = True
    free = ~own.flatten(1).gather(1, best)  # (N, k)
    predicted = at_least_float32(boxes.detach().gather(1, point[..., None].expand(-1, -1, 4)))  # (N, k, 4)
    overlap = iou(predicted[image], matched_boxes.to(predicted.dtype)[:, None])  # (M, k)
    duplicate = free[image] & (label[image] == labels[:, None]) & (overlap > iou_threshold)

    # 3. log(1 + Σ exp(z_j − z)) as softplus(logsumexp(z_j − z)).
    matched = at_least_float32(logits.detach()[image, assignment.point, labels])  # (M,)
    others = at_least_float32(logits.flatten(1).gather(1, best))[image]  # (M, k)
    gap = torch.where(duplicate, others - matched[:, None], -torch.inf)
    # One more term, too small to count: the logsumexp of nothing would be −∞, whose gradient is NaN.
    gap = torch.cat([gap, gap.new_full((len(gap), 1), _LOG_NOTHING)], dim=1)  # (M, k + 1)
    return F.softplus(gap.logsumexp(dim=1)).sum() / normalizer


def one_to_many_classification_loss(
    logits: Tensor,
    assignment: Assignment,
    labels: Tensor,
    weights: Tensor | float,
    *,
    normalizer: Tensor | float,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Tensor:
    """Sigmoid focal loss with many positives per object, each weighted between positive and background.

    Σ over background of (1 − α) pᵞ softplus(z) plus Σ over matched pairs of w · α (1 − p)ᵞ softplus(−z) +
    (1 − w) · (1 − α) pᵞ softplus(z), p = σ(z). With w = 1 it is `one_to_one_classification_loss`.

    Source: the focal loss (Lin et al., ICCV 2017, eq. 5) between both classes of a soft label; the weights are those of
    `TaskAwareOneToManyAssigner`.

    Args:
        logits: ``(N, A, C)`` class logits.
        assignment: The M matched pairs; a box may have many points, a point has one box.
        labels: ``(M,)`` int64, the class of each matched pair.
        weights: ``(M,)`` in 0…1, or one number for all.
        normalizer: Divisor of the sum.
        alpha: Weight of the positives, 0…1.
        gamma: Focusing exponent, at least 0.

    Returns:
        A scalar, connected to the graph when M is 0.

    Example:
        >>> none = torch.zeros(0, dtype=torch.int64)
        >>> nothing = Assignment(none, none, none, none.float(), none.bool())
        >>> one_to_many_classification_loss(torch.zeros(1, 4, 2), nothing, none, none.float(), normalizer=8.0)
        tensor(0.1300)
    """
    background = (1 - alpha) * background_focal_sum(logits, gamma)
    matched = at_least_float32(logits[assignment.image, assignment.point, labels])  # (M,)
    # Powers as exponentials: p ** gamma has no derivative where p underflows to 0 and gamma < 1.
    positive = alpha * (gamma * F.logsigmoid(-matched)).exp() * F.softplus(-matched)
    negative = (1 - alpha) * (gamma * F.logsigmoid(matched)).exp() * F.softplus(matched)
    return (background + (weights * (positive - negative)).sum()) / normalizer


def one_to_many_box_loss(
    boxes: Tensor, assignment: Assignment, matched_boxes: Tensor, weights: Tensor | float, *, normalizer: Tensor | float
) -> Tensor:
    """Σ over matched pairs of w · (1 − GIoU).

    Args:
        boxes: ``(N, A, 4)`` decoded boxes.
        assignment: The M matched pairs.
        matched_boxes: ``(M, 4)`` ground truth of each pair.
        weights: ``(M,)`` in 0…1, or one number for all.
        normalizer: Divisor of the sum.

    Returns:
        A scalar, connected to the graph when M is 0.

    Example:
        >>> zero = torch.tensor([0])
        >>> pair = Assignment(zero, zero, zero, torch.ones(1), torch.tensor([False]))
        >>> box = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
        >>> one_to_many_box_loss(box[None], pair, box, torch.ones(1), normalizer=1.0).item() < 1e-6
        True
    """
    predicted = at_least_float32(boxes[assignment.image, assignment.point])  # (M, 4)
    overlap = generalized_iou(predicted, matched_boxes.to(predicted.dtype))
    return (weights * (1 - overlap)).sum() / normalizer


def teacher_confidence(teacher_logits: Tensor) -> Tensor:
    """How sure the teacher is that a point shows an object: w = max over classes of σ(z_t), ``(N, A)``.

    Example:
        >>> teacher_confidence(torch.tensor([[[-3.0, 0.0], [-9.0, -9.0]]])).round(decimals=2)
        tensor([[0.5000, 0.0000]])
    """
    return at_least_float32(teacher_logits.amax(dim=-1)).sigmoid()


def product_logits(first: Tensor, second: Tensor) -> Tensor:
    """The logit of σ(first) · σ(second).

    σ(x) σ(y) has the odds 1 / (e⁻ˣ + e⁻ʸ + e⁻ˣ⁻ʸ), so that the logarithm is never left and any magnitude is exact,
    infinite ones included.

    Args:
        first: Logits.
        second: Logits that broadcast with them.

    Example:
        >>> product_logits(torch.tensor(0.0), torch.tensor(0.0)).sigmoid()  # 0.5 · 0.5
        tensor(0.2500)
    """
    x, y = at_least_float32(first), at_least_float32(second)
    both = x + y
    # Two `torch.logaddexp` take 4 to 6 times as long on a CPU.
    shift = torch.minimum(torch.minimum(x, y), both).detach().clamp(*_FINITE)
    return shift - ((shift - x).exp() + (shift - y).exp() + (shift - both).exp()).log()


def sigmoid_logits(scores: Tensor) -> Tensor:
    """Compute logits whose sigmoid is the softmax of ``scores``: a score less the logsumexp of the others.

    The library scores every class by itself; with these, it scores as a softmax detector does. Drop the background's
    channel afterwards.

    Args:
        scores: ``(…, C)`` before the softmax.

    Example:
        >>> scores = torch.tensor([1.0, 2.0, 3.0])
        >>> torch.allclose(sigmoid_logits(scores).sigmoid(), scores.softmax(dim=0))
        True
    """
    log_p = at_least_float32(scores).log_softmax(dim=-1)
    best = log_p.argmax(dim=-1, keepdim=True)
    others = log_p.scatter(-1, best, float("-inf")).logsumexp(dim=-1, keepdim=True)
    # 1 − p loses all digits where p is nearly 1, which only the best can be: its odds are against the others' sum.
    small = log_p.scatter(-1, best, -1.0)
    return (small - torch.log1p(-small.exp())).scatter(-1, best, log_p.gather(-1, best) - others)


def distillation_normalizer(confidence: Tensor, threshold: float = 0.05) -> Tensor:
    """N = max(1, Σ over ranks of Σ w·1[w > threshold]) / ranks, a scalar.

    It depends on the teacher alone. A normaliser made of the student's positives would scale the loss by the number of
    positives per object, 5 to 28 times between one-to-many and one-to-one; the threshold keeps the sum from being
    mostly background.

    Args:
        confidence: ``(N, A)`` of `teacher_confidence`.
        threshold: Confidence below which a point does not count.

    Example:
        >>> distillation_normalizer(torch.tensor([[0.9, 0.8, 0.01]]))
        tensor(1.7000)
    """
    total = torch.where(confidence > threshold, confidence, 0).sum()
    return normalizer_over_ranks(total)


def cross_head_classification_loss(
    cross_logits: Tensor, teacher_logits: Tensor, *, normalizer: Tensor | float, gamma: float = 1.0
) -> Tensor:
    """``Σ |σ(z_x) − q|ᵞ · BCE(z_x, q)`` with q = σ(z_t): zero, with zero gradient, where the two agree (γ > 0).

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

    Example:
        >>> logits = torch.tensor([[[0.0, 2.0]]])
        >>> cross_head_classification_loss(logits, logits, normalizer=1.0).item()
        0.0
        >>> cross_head_classification_loss(logits, -logits, normalizer=1.0).item() > 1
        True
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

    Example:
        >>> cross, teacher = torch.tensor([[[0.0, 0.0, 4.0, 2.0]]]), torch.tensor([[[0.0, 0.0, 4.0, 4.0]]])
        >>> cross_head_box_loss(cross, teacher, torch.tensor([[0.8]]), normalizer=1.0)
        tensor(0.4000)
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

    Example:
        >>> flat, peak = torch.zeros(1, 1, 4, 2), torch.tensor([9.0, -9.0]).expand(1, 1, 4, 2)
        >>> cross_head_distribution_loss(flat, peak, torch.ones(1, 1), normalizer=1.0)  # log 2
        tensor(0.6931)
    """
    student = F.log_softmax(at_least_float32(cross_bins) / temperature, dim=-1)
    teacher = F.log_softmax(at_least_float32(teacher_bins.detach()) / temperature, dim=-1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1).mean(dim=-1)  # (N, A)
    return temperature**2 * (confidence.detach() * divergence).sum() / normalizer


def cross_head_quality_loss(
    cross_quality: Tensor, teacher_quality: Tensor, confidence: Tensor, *, normalizer: Tensor | float
) -> Tensor:
    """Σ w · BCE(o_x, σ(o_t)) on ``(N, A)`` quality logits; arguments as in `cross_head_box_loss`.

    Example:
        >>> cross, teacher = torch.zeros(1, 1), torch.full((1, 1), 9.0)
        >>> cross_head_quality_loss(cross, teacher, torch.tensor([[0.5]]), normalizer=1.0)  # 0.5 · log 2
        tensor(0.3466)
    """
    target = at_least_float32(teacher_quality.detach()).sigmoid()
    entropy = F.binary_cross_entropy_with_logits(at_least_float32(cross_quality), target, reduction="none")
    return (confidence.detach() * entropy).sum() / normalizer


def feature_imitation_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], eps: float = 1e-5) -> Tensor:
    """Σ over maps of the mean over channels of 1 − r, r being Pearson's correlation of a channel with the teacher's.

    Computed as half the mean squared difference of both maps, standardised per channel over the batch; unlike the
    cross-head losses it counts the background, too, and needs no head.

    Source: PKD, Cao et al., "General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
    NeurIPS 2022, eq. 3.

    Args:
        student: Maps ``(N, *, H, W)``, each of the shape of the teacher's.
        teacher: Maps ``(N, *, H, W)``; no gradient flows into them.
        eps: Added to the variances, so that a constant channel counts as zero.

    Returns:
        A scalar.

    Example:
        >>> x = torch.linspace(0, 1, 16).view(1, 1, 4, 4)
        >>> [round(feature_imitation_loss([x], [y]).item(), 2) for y in (3 * x + 1, -x)]  # r = 1, r = −1
        [0.0, 2.0]
    """
    # 1. Statistics of all maps, over all ranks.
    # Converted once: gradients in half precision would be rounded before they are summed.
    student, teacher = [at_least_float32(x) for x in student], [at_least_float32(x.detach()) for x in teacher]
    known = channel_statistics([*student, *teacher], across_ranks=True)

    # 2. The mean over the whole batch: this rank's mean, weighted by its share where ranks hold maps of other sizes.
    losses = []
    for s, t, of_s, of_t in zip(student, teacher, known[: len(student)], known[len(student) :], strict=True):
        share = s.numel() / s.shape[1] / of_s.values
        losses.append(share * F.mse_loss(_standardized(s, of_s, eps), _standardized(t, of_t, eps)))
    return torch.stack(losses).sum() / 2


def _standardized(x: Tensor, known: Statistics, eps: float) -> Tensor:
    return (x - known.mean) * (known.variance + eps).rsqrt()


def align_statistics(
    student: Tensor, teacher: Tensor, eps: float = 1e-5, *, known: tuple[Statistics, Statistics] | None = None
) -> Tensor:
    """Give the student's feature map the teacher's mean and standard deviation, per channel over the whole batch.

    Computed in float32 with biased variance and ``eps`` inside the root, so that a 1 × 1 map of a single image is fine;
    the teacher's statistics are constants.

    Source: adaptive instance normalisation, Huang and Belongie, ICCV 2017, eq. 8, with statistics over N, H and W as
    CrossKD takes them.

    Args:
        student: ``(N, *, H, W)``.
        teacher: ``(N, *, H', W')`` with the same number of channels.
        eps: Added to both variances.
        known: Statistics of both, e.g. over all ranks; of these maps alone by default.

    Returns:
        ``(N, *, H, W)`` in the dtype of ``student``.

    Example:
        >>> x = torch.linspace(0, 1, 16).view(1, 1, 4, 4)
        >>> aligned = align_statistics(x, 3 * x + 1)
        >>> round(aligned.min().item(), 2), round(aligned.max().item(), 2)
        (1.0, 4.0)
    """
    x = at_least_float32(student)
    own, others = channel_statistics([x, teacher.detach()], across_ranks=False) if known is None else known
    gain = ((others.variance + eps) / (own.variance + eps)).sqrt()
    return ((x - own.mean) * gain + others.mean).to(student.dtype)
