"""LTP: at every layer the tokens stay whose importance exceeds the layer's threshold.

    keep     M^l = 1[s^l > θ^l]                          (LTP, eq. 8)
    start    θ^l = θ^(L)·l/L, rising from layer to layer (LTP, IV-D)
    soft     M̃^l = σ((s^l − θ^l)/T)                      (LTP, eq. 9)

With `rise: paper` l counts from 1. The official code counts from 0 (`rise: code`), so that its first layer has θ = 0,
never prunes and never learns, and the last one starts at θ^(L)·(L − 1)/L. In the official code the first token can be
pruned as a key while the classifier still reads it as a query; here it always stays, since what is read cannot be gone.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokprune_exp.encoder.layout import Layout
from tokprune_exp.encoder.trace import Decision
from tokprune_exp.pruning.retainers.base import LayerRetainer, Relaxable, prunable_and_protected


class ManualThreshold(LayerRetainer):
    """Thresholds that rise linearly and are not learned: LTP's own ablation.

    The knob is the logarithm of a common factor of all thresholds, so a budget keeps their profile over the layers.
    """

    knob_ends = (10.0, -10.0)

    start: Tensor

    def __init__(
        self,
        dim: int,
        layers: int,
        final_threshold: float = 0.01,
        rise: Literal["paper", "code"] = "paper",
        keeps_separators: bool = False,
    ) -> None:
        super().__init__(dim, layers, keeps_separators)
        if final_threshold <= 0:
            raise ValueError(f"retainer.final_threshold={final_threshold} must be above 0")
        if rise not in ("paper", "code"):
            raise ValueError(f"retainer.rise={rise}: paper or code")
        self.final_threshold, self.rise = final_threshold, rise
        first = 1 if rise == "paper" else 0
        self.register_buffer("start", final_threshold * torch.arange(first, layers + first) / layers)
        self.has_knob(0.0)

    @property
    def thresholds(self) -> Float[Tensor, " layers"]:
        """θ of every layer, in the unit of the importance."""
        return self.start * self.knob.exp().float()

    def prunes_at(self, layer: int) -> bool:
        """At every layer, but in the code's reading not at the first."""
        return self.rise == "paper" or layer > 0

    def forward(
        self, importance: Float[Tensor, "batch grid"], hidden: Float[Tensor, "*tokens dim"], layout: Layout, layer: int
    ) -> Decision:
        """Keep what lies above the threshold."""
        threshold = self.thresholds[layer]
        keep = layout.alive & (layout.sequences.protected | (importance > threshold))
        return Decision(importance, keep, threshold=threshold)

    def settings(self) -> dict[str, Any]:
        """Return the constructor arguments besides `dim` and `layers`."""
        return {"final_threshold": self.final_threshold, "rise": self.rise, **super().settings()}


class LearnedThreshold(Relaxable, ManualThreshold):
    """LTP's thresholds, learned through a relaxed mask (inside `relaxed()`; outside it the choice is hard).

    `relaxation: soft` is LTP: nothing is pruned, each layer's output is multiplied by M̃ (eq. 12). The soft and the hard
    model differ, for a multiplied token is still attended to. `gated` multiplies, in the attention of all later layers,
    what a token is worth by M̃: exp(score)·M̃, renormalised, and as a query it counts M̃ towards the importance of the
    others. At M̃ ∈ {0, 1} that is the hard model. `straight_through` prunes hard on the way forward and takes the
    gradient of `gated` on the way back (as LTMP does), so that training sees what is deployed.
    """

    def __init__(
        self,
        dim: int,
        layers: int,
        final_threshold: float = 0.01,
        temperature: float = 1e-3,
        relaxation: Literal["soft", "gated", "straight_through"] = "soft",
        rise: Literal["paper", "code"] = "paper",
        keeps_separators: bool = False,
    ) -> None:
        super().__init__(dim, layers, final_threshold, rise, keeps_separators)
        if temperature <= 0:
            raise ValueError(f"retainer.temperature={temperature} must be above 0")
        if relaxation not in ("soft", "gated", "straight_through"):
            raise ValueError(f"retainer.relaxation={relaxation}: soft, gated or straight_through")
        self.temperature, self.relaxation = temperature, relaxation
        self.offset = nn.Parameter(torch.zeros(layers))

    @property
    def thresholds(self) -> Float[Tensor, " layers"]:
        """θ of every layer: where it started plus what was learned."""
        return (self.start + self.offset) * self.knob.exp().float()

    def forward(
        self, importance: Float[Tensor, "batch grid"], hidden: Float[Tensor, "*tokens dim"], layout: Layout, layer: int
    ) -> Decision:
        """Keep what lies above the threshold, and how surely."""
        hard = super().forward(importance, hidden, layout, layer)
        if not self.is_relaxed:
            return hard
        soft, priced = self.mask(importance, layout, layer), self.mask(importance.detach(), layout, layer)
        if self.relaxation != "soft":  # the relaxed model is the hard one or nearly so: its cost is that of hard masks
            priced = hard.keep + (priced - priced.detach())
        if self.relaxation == "straight_through":
            return replace(hard, gate=hard.keep + (soft - soft.detach()), soft=soft, priced=priced)
        gate = soft if self.relaxation == "gated" else None
        return replace(hard, keep=layout.alive, gate=gate, soft=soft, priced=priced)

    def mask(self, importance: Float[Tensor, "batch grid"], layout: Layout, layer: int) -> Float[Tensor, "batch grid"]:
        """Compute M̃^l; 1 for tokens that always stay, 0 for those that are gone."""
        prunable, protected = prunable_and_protected(layout)
        above = ((importance - self.thresholds[layer]) / self.temperature).sigmoid()
        return torch.where(prunable, above, protected.to(above.dtype))

    def settings(self) -> dict[str, Any]:
        """Return the constructor arguments besides `dim` and `layers`."""
        return {"temperature": self.temperature, "relaxation": self.relaxation, **super().settings()}
