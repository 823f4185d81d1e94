"""STTABT, Algorithm 1: from the classified token back to the first layer, the tokens that were attended to most.

    i^{L+1} = {[CLS]},  s^{L+1} = 1
    for l = L … 1:
        a_j   = (p·s_j^{l+1} + 1 − p)·A_prob^l[j, :]     for the tokens j in i^{l+1}, mean of the heads
        c     = mean_j a_j
        i^l   = top-k(c) ∪ i^{l+1}                       keys of layer l; its queries and outputs are i^{l+1}
        s^l   = c on i^l, scaled to sum 1

The official code finds the union of one sequence at a time; here boolean masks serve any batch size.
"""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tokprune_exp.encoder.layout import Layout
from tokprune_exp.encoder.trace import Decision
from tokprune_exp.pruning.retainers.base import Plan, Planner
from tokprune_exp.pruning.selection import kept_count, ranks


class Backtracking(Planner):
    """Attention back-tracking with a fixed k per layer; the knob is k.

    `k` is a share of the real tokens (`k_base: valid`), or, as in the official code, of the longest text of the batch
    (`padded`: then a text's answer depends on the batch it stands in, and no budget is exact).
    """

    knob_ends = (0.0, 1.0)

    def __init__(
        self,
        dim: int,
        layers: int,
        k: float = 0.4,
        propagation: float = 0.1,
        k_base: Literal["valid", "padded"] = "valid",
        keeps_separators: bool = False,
    ) -> None:
        super().__init__(dim, layers, keeps_separators)
        if not 0 < k <= 1:
            raise ValueError(f"retainer.k={k} must be above 0 and at most 1")
        if not 0 <= propagation <= 1:
            raise ValueError(f"retainer.propagation={propagation} must lie between 0 and 1")
        if k_base not in ("valid", "padded"):
            raise ValueError(f"retainer.k_base={k_base}: valid or padded")
        self.k, self.propagation, self.k_base = k, propagation, k_base
        self.has_knob(k)

    def plan(self, scores: list[Float[Tensor, "batch heads grid grid"]], layout: Layout) -> Plan:
        """Run Algorithm 1 on the attention of every layer."""
        valid = layout.sequences.valid
        needed, share = only_first(valid), only_first(valid).float()
        steps = [Decision(share, needed)]
        for score in reversed(scores):
            owner = needed.nonzero()[:, 0]
            weight = (self.propagation * share + 1 - self.propagation)[needed]
            attention = score.transpose(1, 2)[needed].softmax(-1).mean(1)  # A_prob of the rows that are needed
            importance = attention.new_zeros(share.shape).index_add(0, owner, weight[:, None] * attention)
            importance = importance / needed.sum(1, keepdim=True)
            needed = self.most_attended(importance, valid) | needed
            if self.keeps_separators:
                needed = needed | (layout.sequences.protected & valid)
            share = importance * needed / (importance * needed).sum(1, keepdim=True).clamp(min=1e-12)
            steps.append(Decision(importance, needed))
        return Plan(steps[::-1])

    def most_attended(
        self, importance: Float[Tensor, "batch tokens"], valid: Bool[Tensor, "batch tokens"]
    ) -> Bool[Tensor, "batch tokens"]:
        """Return the k most important of the real tokens."""
        base = valid.sum(1) if self.k_base == "valid" else torch.full_like(valid.sum(1), valid.shape[1])
        return valid & (ranks(importance, valid) < kept_count(self.knob, base)[:, None])

    def settings(self) -> dict[str, Any]:
        """Return the constructor arguments besides `dim` and `layers`."""
        return {"k": self.k, "propagation": self.propagation, "k_base": self.k_base, **super().settings()}


def only_first(valid: Bool[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
    """Return the mask of the first token alone: what the classifier reads."""
    first = torch.zeros_like(valid)
    first[:, 0] = True
    return first
