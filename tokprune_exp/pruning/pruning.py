"""A pruning is a scorer and a retainer: together they answer the encoder's question which tokens go on."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokprune_exp.encoder.encoder import Place
from tokprune_exp.encoder.layout import Layout
from tokprune_exp.encoder.trace import Decision, PruningTrace
from tokprune_exp.pruning.retainers import (
    AdaptiveRatio,
    KeepAll,
    LearnedThreshold,
    ManualThreshold,
    RandomRatio,
    Retainer,
    StaticRatio,
    TopKSchedule,
)
from tokprune_exp.pruning.scorers import AttentionMass, RandomScores, Scorer, TokenSaliency

SCORERS: dict[str, type[Scorer]] = {
    "token_saliency": TokenSaliency,
    "attention_mass": AttentionMass,
    "random": RandomScores,
}
RETAINERS: dict[str, type[Retainer]] = {
    "keep_all": KeepAll,
    "static": StaticRatio,
    "random": RandomRatio,
    "adaptive": AdaptiveRatio,
    "learned_threshold": LearnedThreshold,
    "manual_threshold": ManualThreshold,
    "topk": TopKSchedule,
}


@dataclass(frozen=True)
class Prescribed:
    """A pruning whose keep mask is given: for oracles and what-if questions."""

    keep: Bool[Tensor, "batch tokens"]
    layer: int = 0
    place: Place = "before"

    def decides(self, layer: int, place: Place) -> bool:
        """Prune at the given place only."""
        return (layer, place) == (self.layer, self.place)

    def decide(self, hidden: Tensor, layout: Layout, received: Tensor | None, layer: int) -> Decision:
        """Keep what was prescribed."""
        return Decision(self.keep.float(), self.keep)


class Pruning(nn.Module):
    """Any scorer with any retainer; the scorer's kind says when in a layer the choice is made."""

    def __init__(self, scorer: Scorer, retainer: Retainer) -> None:
        super().__init__()
        for part, registry in ((scorer, SCORERS), (retainer, RETAINERS)):
            if type(part) not in registry.values():
                raise ValueError(f"{type(part).__name__} is not in SCORERS or RETAINERS, so no model could be saved")
        self.scorer, self.retainer = scorer, retainer

    @property
    def place(self) -> Place:
        """Where in a layer this scorer can say what is important."""
        return "after" if self.scorer.reads_attention else "before"

    def decides(self, layer: int, place: Place) -> bool:
        """Whether tokens are chosen at this place of the encoder."""
        return self.retainer.prunes_at(layer) and place == self.place

    def decide(
        self,
        hidden: Float[Tensor, "*tokens dim"],
        layout: Layout,
        received: Float[Tensor, "batch grid"] | None,
        layer: int,
    ) -> Decision:
        """Score the alive tokens, then choose among them; in fp32, since bf16 would make ties."""
        with torch.autocast(hidden.device.type, enabled=False):
            hidden, received = hidden.float(), None if received is None else received.float()
            return self.retainer(self.scorer(hidden, layout, received), hidden, layout, layer)

    def macs(self, trace: PruningTrace) -> Int[Tensor, " batch"]:
        """Count the multiply-adds of scoring and choosing, per sequence: the overhead of pruning."""
        total = trace.lengths * 0
        for number in range(len(trace.layers)):
            if self.retainer.prunes_at(number):
                before = trace.layers[number - 1].outputs if number else trace.valid
                total = total + before.sum(1) * self.scorer.macs_per_token() + self.retainer.macs_per_sequence()
        return total
