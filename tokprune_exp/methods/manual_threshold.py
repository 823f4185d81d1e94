"""LTP's manual baseline: thresholds that rise linearly from layer to layer and are not learned (LTP, IV-D)."""

from tokprune_exp.methods.hard import HardPruning


class ManualThreshold(HardPruning):
    """The retainer `manual_threshold` keeps s^l > θ^(L)·l/L; the weights are trained under it."""
