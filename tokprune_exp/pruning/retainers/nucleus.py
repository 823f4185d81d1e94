"""The fewest tokens that hold a share η of the importance stay: top-p, a share that adapts to the text by itself.

    ordered by falling importance, k = min{k : Σ_{i≤k} S_(i) ≥ η · Σ_{i∈V} S_i}

This is what AD-TP's ratio is taught by (`mass`, docs/adtp.md 5) with the predicted saliency S in the place of the
attribution a_c: nothing is left to predict. Where importance sits on few words, few tokens stay.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from tokprune_exp.encoder.layout import Layout
from tokprune_exp.encoder.trace import Decision
from tokprune_exp.pruning.retainers.base import prunable_and_protected
from tokprune_exp.pruning.retainers.ratio import SelfAdapting
from tokprune_exp.pruning.selection import ranks


class Nucleus(SelfAdapting):
    """Keeps the protected tokens and the fewest prunable ones that hold the share η of what V holds, at least one.

    The knob is η.
    """

    def forward(
        self, importance: Float[Tensor, "batch grid"], hidden: Float[Tensor, "*tokens dim"], layout: Layout, layer: int
    ) -> Decision:
        """Keep the nucleus of each sequence; an importance below 0 holds nothing."""
        prunable, protected = prunable_and_protected(layout)
        mass = importance.detach().double().clamp(min=0).masked_fill(~prunable, 0.0)
        order = ranks(importance, prunable)
        held = torch.empty_like(mass).scatter(1, order, mass).cumsum(1)
        count = 1 + (held < self.knob * held[:, -1:]).sum(1)
        keep = protected | (prunable & (order < count[:, None]))
        return Decision(importance, keep, self.gate(importance, keep, layout))
