"""A pruning is a scorer and a retainer: together they answer the encoder's question which tokens go on."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tokprune_exp.encoder.encoder import PrunedEncoder, PruningRule
from tokprune_exp.encoder.layout import Layout
from tokprune_exp.encoder.trace import Bar, Decision, Place, PruningTrace
from tokprune_exp.pruning.retainers import (
    AdaptiveRatio,
    Backtracking,
    Concrete,
    KeepAll,
    LayerRetainer,
    LearnedThreshold,
    ManualThreshold,
    MinP,
    Nucleus,
    Planner,
    RandomRatio,
    Retainer,
    StaticRatio,
    TopKSchedule,
)
from tokprune_exp.pruning.scorers import (
    ApproxAttention,
    AttentionMass,
    AttentionSource,
    ExactAttention,
    RandomScores,
    Scorer,
    TokenSaliency,
    TokenScorer,
)

SCORERS: dict[str, type[Scorer]] = {
    "token_saliency": TokenSaliency,
    "attention_mass": AttentionMass,
    "random": RandomScores,
    "approx_attention": ApproxAttention,
    "exact_attention": ExactAttention,
}
RETAINERS: dict[str, type[Retainer]] = {
    "keep_all": KeepAll,
    "static": StaticRatio,
    "random": RandomRatio,
    "adaptive": AdaptiveRatio,
    "nucleus": Nucleus,
    "min_p": MinP,
    "learned_threshold": LearnedThreshold,
    "manual_threshold": ManualThreshold,
    "topk": TopKSchedule,
    "backtracking": Backtracking,
    "concrete": Concrete,
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

    def decide(self, hidden: Tensor, layout: Layout, received: Tensor | None, layer: int, place: Place) -> Decision:
        """Keep what was prescribed."""
        return Decision(self.keep.float(), self.keep)


@dataclass(frozen=True)
class LayerByLayer:
    """A pruning that chooses in one layer after the other, from what the encoder knows by then."""

    scorer: TokenScorer
    retainer: LayerRetainer

    @property
    def place(self) -> Place:
        """Where in a layer this scorer can say what is important."""
        return "after" if self.scorer.reads_attention else "before"

    def decides(self, layer: int, place: Place) -> bool:
        """Whether tokens are chosen at this place of the encoder."""
        return place == self.place and self.retainer.prunes_at(layer)

    @cached_property
    def bars(self) -> list[Bar] | None:
        """What `decide` asks for in each layer, if that is attention received above a threshold and nothing else."""
        scorer, retainer = self.scorer, self.retainer
        if not (isinstance(scorer, AttentionMass) and isinstance(retainer, ManualThreshold)):
            return None
        if isinstance(retainer, LearnedThreshold) and retainer.is_relaxed:
            return None
        norm = scorer.constant if scorer.normalisation == "constant" else 0
        return [Bar(threshold, norm) for threshold in retainer.thresholds.tolist()]

    def bar(self, layer: int) -> Bar | None:
        """Return the bar of a layer, by which fast layers choose."""
        return None if self.bars is None else self.bars[layer]

    def decide(
        self,
        hidden: Float[Tensor, "*tokens dim"],
        layout: Layout,
        received: Float[Tensor, "batch grid"] | None,
        layer: int,
        place: Place,
    ) -> Decision:
        """Score the alive tokens, then choose among them; in fp32, since bf16 would make ties."""
        with in_float32(hidden.device.type):
            hidden, received = hidden.float(), None if received is None else received.float()
            return self.retainer(self.scorer(hidden, layout, received), hidden, layout, layer)


def in_float32(device: str) -> AbstractContextManager[object]:
    """Switch autocast off where it is on."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class Pruning(nn.Module):
    """A scorer with a retainer; the scorer's kind says when the choice is made."""

    def __init__(self, scorer: Scorer, retainer: Retainer) -> None:
        super().__init__()
        for part, registry in ((scorer, SCORERS), (retainer, RETAINERS)):
            if type(part) not in registry.values():
                raise ValueError(f"{type(part).__name__} is not in SCORERS or RETAINERS, so no model could be saved")
        if isinstance(scorer, AttentionSource) != isinstance(retainer, Planner):
            raise ValueError(
                f"{type(scorer).__name__} and {type(retainer).__name__} do not fit: scorer=approx_attention or "
                f"exact_attention goes with retainer=backtracking or concrete, and no other"
            )
        self.scorer, self.retainer = scorer, retainer

    def attach(self, encoder: PrunedEncoder) -> None:
        """Let the scorer build what depends on the encoder's sizes, when a classifier is put together."""
        self.scorer.attach(encoder)

    def rule(self, encoder: PrunedEncoder, embeddings: Float[Tensor, "*tokens dim"], layout: Layout) -> PruningRule:
        """Return what the encoder asks on this batch: a plan for all layers, or the parts that decide in each layer."""
        if not isinstance(self.retainer, Planner):
            return self.layerwise
        assert isinstance(self.scorer, AttentionSource)
        scores = self.scorer.scores(encoder, embeddings, layout)
        with in_float32(embeddings.device.type):
            return self.retainer.plan([one.float() for one in scores], layout)

    @property
    def layerwise(self) -> LayerByLayer:
        """The two parts where each layer decides for itself."""
        assert isinstance(self.scorer, TokenScorer) and isinstance(self.retainer, LayerRetainer)
        return LayerByLayer(self.scorer, self.retainer)

    def macs(self, trace: PruningTrace) -> Int[Tensor, " batch"]:
        """Count the multiply-adds of scoring and choosing, per sequence: the overhead of pruning."""
        if isinstance(self.scorer, AttentionSource):
            return self.scorer.macs(trace.lengths)
        scorer, retainer = self.layerwise.scorer, self.layerwise.retainer
        total = trace.lengths * 0
        for number in range(len(trace.layers)):
            if retainer.prunes_at(number):
                before = trace.layers[number - 1].outputs if number else trace.valid
                total = total + before.sum(1) * scorer.macs_per_token() + retainer.macs_per_sequence()
        return total
