"""The tokens stay whose importance is at least a share θ of the largest one: min-p, a share that adapts by itself.

    keep i ∈ V where S_i ≥ θ · max_{j∈V} S_j

Where one word stands out few tokens stay, where many are about as important many do. The rule is min-p sampling's, of
importances in the place of probabilities.
"""

from jaxtyping import Float
from torch import Tensor

from tokprune_exp.encoder.layout import Layout
from tokprune_exp.encoder.trace import Decision
from tokprune_exp.pruning.retainers.base import prunable_and_protected
from tokprune_exp.pruning.retainers.ratio import SelfAdapting
from tokprune_exp.pruning.selection import ranks


class MinP(SelfAdapting):
    """Keeps the protected tokens and the prunable ones within reach of the most important one, which always stays.

    The knob is θ: 1 keeps the most important token (and its equals), 0 keeps all. An importance of 0 or below reaches
    no other bar.
    """

    knob_ends = (1.0, 0.0)

    def forward(
        self, importance: Float[Tensor, "batch grid"], hidden: Float[Tensor, "*tokens dim"], layout: Layout, layer: int
    ) -> Decision:
        """Keep what reaches the bar of its own sequence."""
        prunable, protected = prunable_and_protected(layout)
        height = importance.detach().double().clamp(min=0).masked_fill(~prunable, 0.0)
        is_best = ranks(importance, prunable) == 0
        reaches = (height > 0) & (height >= self.knob * height.amax(1, keepdim=True))
        keep = protected | (prunable & (reaches | is_best | (self.knob == 0)))
        return Decision(importance, keep, self.gate(importance, keep, layout))
