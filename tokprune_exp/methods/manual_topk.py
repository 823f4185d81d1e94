"""Forward top-k: layer by layer the most attended tokens stay, with a share that is given (LTP, STTABT: baseline)."""

from tokprune_exp.methods.hard import HardPruning


class ManualTopK(HardPruning):
    """The retainer `topk` keeps ⌈r_l·n⌉ tokens after layer l; the weights are trained under it."""
