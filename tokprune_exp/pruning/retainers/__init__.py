"""Retainers: importances → which tokens stay, hard (a boolean mask) and, to learn from, a gate or a soft mask."""

from tokprune_exp.pruning.retainers.base import KeepAll, Retainer
from tokprune_exp.pruning.retainers.ratio import AdaptiveRatio, RandomRatio, RatioRetainer, StaticRatio
from tokprune_exp.pruning.retainers.threshold import LearnedThreshold, ManualThreshold
from tokprune_exp.pruning.retainers.topk import TopKSchedule

__all__ = [
    "AdaptiveRatio",
    "KeepAll",
    "LearnedThreshold",
    "ManualThreshold",
    "RandomRatio",
    "RatioRetainer",
    "Retainer",
    "StaticRatio",
    "TopKSchedule",
]
