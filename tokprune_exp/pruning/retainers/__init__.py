"""Retainers: importances → which tokens stay, hard (a boolean mask) and, to learn from, a gate or a soft mask."""

from tokprune_exp.pruning.retainers.backtracking import Backtracking
from tokprune_exp.pruning.retainers.base import KeepAll, LayerRetainer, Plan, Planner, Retainer
from tokprune_exp.pruning.retainers.concrete import Concrete
from tokprune_exp.pruning.retainers.min_p import MinP
from tokprune_exp.pruning.retainers.nucleus import Nucleus
from tokprune_exp.pruning.retainers.ratio import AdaptiveRatio, RandomRatio, RatioRetainer, SelfAdapting, StaticRatio
from tokprune_exp.pruning.retainers.threshold import LearnedThreshold, ManualThreshold
from tokprune_exp.pruning.retainers.topk import TopKSchedule

__all__ = [
    "AdaptiveRatio",
    "Backtracking",
    "Concrete",
    "KeepAll",
    "LayerRetainer",
    "LearnedThreshold",
    "ManualThreshold",
    "MinP",
    "Nucleus",
    "Plan",
    "Planner",
    "RandomRatio",
    "RatioRetainer",
    "Retainer",
    "SelfAdapting",
    "StaticRatio",
    "TopKSchedule",
]
