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
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokprune_exp.encoder.layout import Layout
from tokprune_exp.encoder.trace import Decision
from tokprune_exp.pruning.retainers.base import Plan, Planner
from tokprune_exp.pruning.selection import kept_count, ranks

DYNAMIC_BOUNDS = (0.2, 0.95)
"""Least and largest share of the tokens that `dynamic` keeps, as in the official code."""


class Backtracking(Planner):
    """Attention back-tracking with one k for every layer; the knob is k.

    `k_base` says what k is: a share of the real tokens (`valid`), or, as the official code has it,

    * `padded`: a share of the longest text of the batch, so that a text's answer depends on the batch it stands in;
    * `tokens`: a number of tokens;
    * `dynamic`: a share of the largest importance, above which a token is one of the k, within `DYNAMIC_BOUNDS`.

    Only a share of the real tokens can be held at a budget.
    """

    def __init__(
        self,
        dim: int,
        layers: int,
        k: float = 0.4,
        propagation: float = 0.1,
        k_base: Literal["valid", "padded", "tokens", "dynamic"] = "valid",
        keeps_separators: bool = False,
    ) -> None:
        super().__init__(dim, layers, keeps_separators)
        if k_base not in ("valid", "padded", "tokens", "dynamic"):
            raise ValueError(f"retainer.k_base={k_base}: valid, padded, tokens or dynamic")
        if k_base == "tokens" and (k < 1 or k != int(k)):
            raise ValueError(f"retainer.k={k} with k_base=tokens is a number of tokens: a whole one, at least 1")
        if k_base != "tokens" and not 0 < k <= 1:
            raise ValueError(f"retainer.k={k} must be above 0 and at most 1; k_base=tokens makes it a number of tokens")
        if not 0 <= propagation <= 1:
            raise ValueError(f"retainer.propagation={propagation} must lie between 0 and 1")
        self.k, self.propagation, self.k_base = k, propagation, k_base
        self.knob_ends = (0.0, 1.0) if k_base == "valid" else None
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
        return valid & (ranks(importance, valid) < self.count(importance, valid)[:, None])

    def count(
        self, importance: Float[Tensor, "batch tokens"], valid: Bool[Tensor, "batch tokens"]
    ) -> Int[Tensor, " batch"]:
        """Return k of every text, as a number of tokens."""
        size = valid.sum(1)
        match self.k_base:
            case "valid":
                return kept_count(self.knob, size)
            case "padded":
                return kept_count(self.knob, torch.full_like(size, valid.shape[1]))
            case "tokens":
                return self.knob.long().expand_as(size)
            case "dynamic":
                least, most = (kept_count(share, size) for share in DYNAMIC_BOUNDS)
                above = importance > self.knob * importance.amax(1, keepdim=True)
                return (above & valid).sum(1).clamp(least, most)

    def settings(self) -> dict[str, Any]:
        """Return the constructor arguments besides `dim` and `layers`."""
        return {"k": self.k, "propagation": self.propagation, "k_base": self.k_base, **super().settings()}


def only_first(valid: Bool[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
    """Return the mask of the first token alone: what the classifier reads."""
    first = torch.zeros_like(valid)
    first[:, 0] = True
    return first
