"""Distillation: a frozen one-to-many teacher and a one-to-one student."""

from __future__ import annotations

from .aligner import Alignment, FeatureAligner, MatchedLevel
from .cross_head import CrossHeadDistiller
from .distiller import Distiller
from .inherit import Inheritance, inherit
from .schedule import Decay, fade

__all__ = [
    "Alignment",
    "CrossHeadDistiller",
    "Decay",
    "Distiller",
    "FeatureAligner",
    "Inheritance",
    "MatchedLevel",
    "fade",
    "inherit",
]
