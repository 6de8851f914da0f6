"""A selection branch: which of the points that see one object is *the* one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from . import functional
from .detectors import DetectorAdapter, Probe, adapt, probe_detector
from .errors import DetectorError, OptionError
from .geometry import at_least_float32
from .structures import DensePredictions

__all__ = ["SelectionBranch", "ranking_logits"]

_SCORE_MAPS = 5  # of each anchor, see `_score_maps`
_GROUPS = 8  # of the norm
# How the branch begins; found on held-out images of three data sets, see docs/results.md.
_SHARPNESS = 128.0  # of the filter; 64 and 256 are level. 0.02 logits below a neighbour is worth 0.4 of its score
_OPENNESS = 2.0  # logit of the factor at a maximum, σ(2) = 0.88: there is something to learn in both directions
# The filter takes no more than 5 from e, to σ(−3) = 0.05. Without a bound, one object whose best point is filtered out
# outweighs all others in the loss, and the branch learns to let duplicates through.
_BOUND = -5.0
_QUICK = 10.0  # times the learning rate, for the two numbers that all scores share


class SelectionBranch(nn.Module):
    """A small branch that sees every score beside its neighbours' and multiplies it.

    A one-to-many head scores many points of an object alike. The branch multiplies the score p that the detector ranked
    by (`ranking_logits`) by a factor σ(e), and e is a sum of two:

    - A filter of maxima: k · d, at least −5, where d ≤ 0 is the distance of the class's logit to the maxima of its
      3 × 3 neighbours, of the next coarser and of the next finer level. Of an object's points the best keeps its score.
    - A logit that three small convolutions predict at each point from the neck's maps and the scores around it. They
      predict how sharp the filter is at that point, k, too: crowds need it less.

    They begin at the filter alone: **a detector with a fresh branch has nearly no duplicates, before any training**.
    Training adds what the filter lacks. Two learned numbers, a scale and a shift of the logit of p, turn scores of one
    kind of training into those of the other; they change no order.

    It is a part of the student, given to ``EndToEndDetector(…, selection=…)``: in ``parameters()``, checkpoints,
    detections and exports, not in ``detector.model.state_dict()``. A teacher has none. No gradient runs from e into the
    scores that it reads. The detector itself may stay frozen.

    Sources: the filter is the 3D max filtering of POTO (Wang et al., CVPR 2021), as a factor; a branch that selects is
    the idea of PSS (Zhou et al., "Object Detection Made Simpler by Eliminating Heuristic NMS", 2021). The numbers that
    it begins with are our own (docs/results.md).

    Args:
        model: The detector it is a branch of: torchvision's FCOS or RetinaNet, or a `DetectorAdapter` that predicts on
            grids (`DensePredictions.levels`), equally many anchors a cell on each level.
        width: Channels of the branch, a multiple of 8.
        class_score: Take the class probability for p, and √(class · quality) in the filter only. A quality branch tells
            which point of an object is best; of two objects the better one need not be the surer one. It is worth 3 AP
            on small objects of circuit boards, and costs up to 1.2 elsewhere (docs/results.md): take it where your
            detector has more AP with NMS ranked by class alone. Quality is frozen then.

    Raises:
        OptionError: ``width`` is no multiple of 8.
        DetectorError: The detector predicts on no grids of its maps, or on levels of unequal numbers of anchors.
        UnknownDetectorError: No built-in adapter fits the model.

    Example:
        >>> from torchvision.models.detection import fcos_resnet50_fpn
        >>> from crosskd_assign import EndToEndDetector
        >>> model = fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=64)
        >>> detector = EndToEndDetector(model.requires_grad_(False), selection=SelectionBranch(model))
        >>> sum(p.numel() for p in detector.parameters() if p.requires_grad)
        85380
    """

    def __init__(self, model: nn.Module | DetectorAdapter, *, width: int = 32, class_score: bool = False) -> None:
        super().__init__()
        self.class_score = class_score
        # 1. What the detector looks like.
        if width < _GROUPS or width % _GROUPS:
            raise OptionError(
                expected=f"width in multiples of {_GROUPS}",
                got=f"{width}",
                where="constructor argument",
                fix="choose one of these; 32 is usual",
            )
        adapter = adapt(model)
        probe = probe_detector(adapter)
        self.anchors = _anchors(probe, type(adapter).__name__)
        self.edits_features = probe.edits_features
        self._hidden = (adapter.model,)  # in a tuple, nn.Module does not register it

        # 2. Levels of equal channels share all weights; others are brought to one width first.
        channels = [level.channels for level in probe.levels]
        shared = len(set(channels)) == 1
        self.lateral = nn.ModuleList() if shared else nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        inputs = (channels[0] if shared else width) + _SCORE_MAPS * self.anchors + 1

        # 3. The branch: two logits an anchor, which begin at 0.
        self.trunk = nn.Sequential(
            nn.Conv2d(inputs, width, 3, padding=1),
            _GroupNorm(_GROUPS, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
        )
        self.output = nn.Conv2d(width, 2 * self.anchors, 3, padding=1)
        for parameter in self.output.parameters():
            nn.init.zeros_(parameter)

        # 4. Scale, as a logarithm, and shift of all scores.
        self.calibration = nn.Parameter(torch.zeros(2))
        self.to(probe.features[0])  # device and dtype

    @property
    def model(self) -> nn.Module:
        """The network it is a branch of."""
        return self._hidden[0]

    def forward(self, features: Sequence[Tensor], predictions: DensePredictions) -> DensePredictions:
        """Multiply the scores of predictions; their logits become those of the product.

        Args:
            features: The neck's maps ``(N, *, H, W)``, one a level.
            predictions: What the head predicts on them, on grids.

        Returns:
            Predictions without a quality branch, which has had its part.
        """
        # 1. The score of every class on the grids, and the best one's; what is read of them has no gradient.
        scores = ranking_logits(predictions)  # (N, A, C)
        levels = predictions.levels or ()
        strides = [level.stride for level in levels]
        sizes = [level.height * level.width * level.anchors for level in levels]
        grids = [  # (N, H, W, anchors, C)
            at_least_float32(x).reshape(-1, level.height, level.width, self.anchors, x.shape[-1])
            for level, x in zip(levels, torch.split(scores.detach(), sizes, dim=1), strict=True)
        ]
        maps = _score_maps([x.amax(dim=-1).permute(0, 3, 1, 2) for x in grids], strides)

        # 2. The factor of each point and class: what the branch predicts there, and the filter.
        factors = []
        for i, (x, own, depth) in enumerate(zip(features, maps, _depths(grids, strides), strict=True)):
            neck = self.lateral[i](x) if len(self.lateral) else x
            number = torch.full_like(own[:, :1], float(i))
            together = torch.cat([neck, own.to(neck.dtype), number.to(neck.dtype)], dim=1)
            predicted = at_least_float32(self.output(self.trunk(together))).permute(0, 2, 3, 1)[..., None]
            opened, sharper = torch.split(predicted, self.anchors, dim=3)  # (N, H, W, anchors, 1)
            filtered = (_SHARPNESS * sharper.clamp(-6, 2).exp() * depth).clamp(min=_BOUND)
            factor = _OPENNESS + opened + filtered
            factors.append(factor.flatten(1, 3))  # (N, H · W · anchors, C)

        # 3. The product, with the scores that training wants.
        scale, shift = (_QUICK * at_least_float32(self.calibration)).unbind()
        own = predictions.logits if self.class_score else scores
        own = at_least_float32(own) * scale.exp() + shift
        logits = functional.product_logits(own, torch.cat(factors, dim=1))
        return replace(predictions, logits=logits, quality=None)

    @override
    def extra_repr(self) -> str:
        return f"anchors={self.anchors}, class_score={self.class_score}"


class _GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm``, which refuses a map of one cell of one image; its groups have several channels here."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def ranking_logits(predictions: DensePredictions) -> Tensor:
    """Compute the logits ``(N, A, C)`` of the score a detector ranks by: √(class · quality), or the class alone.

    Example:
        >>> p = DensePredictions(torch.zeros(1, 1, 2), torch.zeros(1, 1, 4), torch.zeros(1, 2), torch.ones(1))
        >>> ranking_logits(replace(p, quality=torch.zeros(1, 1))).sigmoid()
        tensor([[[0.5000, 0.5000]]])
    """
    if predictions.quality is None:
        return predictions.logits
    product = functional.product_logits(predictions.logits, predictions.quality[..., None])
    # The score is p = exp(½ log σ(product)), its logit log p − log(1 − p).
    log_p = F.logsigmoid(product) / 2
    return log_p - torch.log1p(-log_p.exp().clamp(max=1 - 1e-7))


def _anchors(probe: Probe, name: str) -> int:
    """How many predictions each cell has.

    Raises:
        DetectorError: There are no grids, of other sizes than the maps, or they have unequal numbers of anchors.
    """
    levels = probe.predictions.levels or ()
    grids = [(level.height, level.width) for level in levels]
    maps = [tuple(x.shape[-2:]) for x in probe.features]
    if grids != maps or len({level.anchors for level in levels}) != 1:
        raise DetectorError(
            expected=f"predictions on grids of the maps, {maps}, with as many anchors on each level",
            got=f"{grids or 'no grids'}, anchors {[level.anchors for level in levels]}",
            where=f"{name}.head().levels",
            fix="build predictions with DensePredictions.from_sides(…, levels) or one of its kin",
        )
    return levels[0].anchors


def _score_maps(best: Sequence[Tensor], strides: Sequence[float]) -> list[Tensor]:
    """Five maps for each anchor: the score, and its distance to the maxima around it, here and on the next levels.

    Args:
        best: Logit of the best class, ``(N, anchors, H, W)`` for each level.
        strides: Stride of each level in pixels.

    Returns:
        ``(N, 5 · anchors, H, W)`` for each level.
    """
    cells = [z.amax(dim=1, keepdim=True) for z in best]
    maps = []
    for i, z in enumerate(best):
        near = [F.max_pool2d(cells[i], k, stride=1, padding=k // 2) for k in (3, 5)]
        # Where there is no next level, the cell itself stands for it.
        next_ones = [
            _brought(cells[j], round(strides[i] / strides[j]), z) if 0 <= j < len(best) else cells[i]
            for j in (i - 1, i + 1)
        ]
        maps.append(torch.cat([z / 4, *(z - maximum for maximum in (*near, *next_ones))], dim=1))
    return maps


def _depths(grids: Sequence[Tensor], strides: Sequence[float]) -> list[Tensor]:
    """How far each score lies below the maxima around it, of its class, here and on the next levels; at most 0.

    Args:
        grids: Logits ``(N, H, W, anchors, C)`` for each level.
        strides: Stride of each level in pixels.

    Returns:
        ``(N, H, W, anchors, C)`` for each level, the sum of the distances.
    """
    cells = [z.amax(dim=3).permute(0, 3, 1, 2) for z in grids]  # channels last, which pools 30 times as fast on a CPU
    depths = []
    for i, z in enumerate(grids):
        depth = z - _beside(F.max_pool2d(cells[i], 3, stride=1, padding=1))
        for j in (i - 1, i + 1):
            if 0 <= j < len(grids):
                maximum = _brought(cells[j], round(strides[i] / strides[j]), cells[i])
                depth = depth + (z - _beside(maximum)).clamp(max=0)
        depths.append(depth)
    return depths


def _beside(maximum: Tensor) -> Tensor:
    return maximum.permute(0, 2, 3, 1)[..., None, :]  # (N, H, W, 1, C), beside the anchors


def _brought(cells: Tensor, ratio: int, like: Tensor) -> Tensor:
    """Bring the maxima of another level to the size of this one; ``ratio`` of its cells make one here, 0 if coarser."""
    if ratio > 1:
        cells = F.max_pool2d(cells, ratio, stride=ratio, ceil_mode=True)
    return F.interpolate(cells, size=like.shape[-2:], mode="nearest")
