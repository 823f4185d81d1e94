"""A share of the tokens stays, at one layer: the same for all, random, or adapted to the text (AD-TP).

`layer` is where it prunes, 0-based: before that layer (0: at the embeddings, AD-TP's place), or inside it with a scorer
that reads attention.
"""

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from tokprune_exp.encoder.layout import Layout
from tokprune_exp.encoder.trace import Decision
from tokprune_exp.pruning.retainers.base import LayerRetainer, prunable_and_protected
from tokprune_exp.pruning.selection import keep_top, uniform_noise


class RatioRetainer(LayerRetainer):
    """Keeps the protected tokens and some of the most important of the prunable ones; subclasses choose how many.

    Where it is a share ρ, ⌈ρ·|V|⌉ stay, so the share of all real tokens that stays, the retention, is above ρ: by the
    rounding and by [CLS], most in short texts.

    With a `gate_temperature` τ the choice itself is trained by the task: in training, the mask carries the gradient of
    p_i = σ((Ŝ_i − Ŝ_(k))/τ), where Ŝ is the importance scaled to mean square 1 over V and Ŝ_(k) its smallest kept value
    (straight-through, docs/adtp.md 6). Null: only losses on the importance itself teach the scorer.
    """

    knob_ends = (0.0, 1.0)
    """The knob is ρ, if a subclass does not say otherwise."""
    first_knob: ClassVar[float | None] = None
    """Where it starts; None: at `ratio`."""

    def __init__(
        self,
        dim: int,
        layers: int,
        ratio: float = 0.3,
        layer: int = 0,
        keeps_separators: bool = False,
        gate_temperature: float | None = None,
    ) -> None:
        super().__init__(dim, layers, keeps_separators)
        if layer < 0:
            raise ValueError(f"retainer.layer={layer} must be 0 or more")
        if not 0 < ratio <= 1:
            raise ValueError(f"retainer.ratio={ratio} must be above 0 and at most 1")
        if gate_temperature is not None and gate_temperature <= 0:
            raise ValueError(f"retainer.gate_temperature={gate_temperature} must be above 0, or null for no gate")
        self.ratio, self.layer, self.gate_temperature = ratio, layer, gate_temperature
        self.has_knob(ratio if self.first_knob is None else self.first_knob)

    @property
    def has_gate(self) -> bool:
        """Whether in training its mask carries a gradient for the tokens that are dropped."""
        return self.gate_temperature is not None

    def prunes_at(self, layer: int) -> bool:
        """At the one layer."""
        return layer == self.layer

    def keep(
        self,
        importance: Float[Tensor, "batch grid"],
        ratio: Float[Tensor, "..."] | float,
        layout: Layout,
    ) -> Tensor:
        """Return the keep mask for one ratio, or for one per sequence."""
        return keep_top(importance, ratio, *prunable_and_protected(layout))

    def gate(
        self, importance: Float[Tensor, "batch grid"], keep: Bool[Tensor, "batch grid"], layout: Layout
    ) -> Float[Tensor, "batch grid"] | None:
        """Return the mask with the gradient of a sigmoid around the smallest kept importance; None if unused."""
        if self.gate_temperature is None or not self.training:
            return None
        prunable, _ = prunable_and_protected(layout)
        mean_square = importance.square().masked_fill(~prunable, 0.0).sum(1) / prunable.sum(1).clamp(min=1)
        scaled = importance / (mean_square[:, None] + 1e-12).sqrt()
        smallest_kept = scaled.masked_fill(~(keep & prunable), float("inf")).amin(1, keepdim=True).detach()
        soft = ((scaled - smallest_kept) / self.gate_temperature).sigmoid().masked_fill(~prunable, 0.0)
        return keep + (soft - soft.detach())

    def settings(self) -> dict[str, Any]:
        """Return the constructor arguments besides `dim`."""
        return {
            "ratio": self.ratio,
            "layer": self.layer,
            "gate_temperature": self.gate_temperature,
            **super().settings(),
        }


class SelfAdapting(RatioRetainer):
    """Keeps of each sequence as much as its importances ask for, with nothing that predicts how much.

    `ratio` is the ρ* whose cost, were it the same for all texts, a training holds the knob at.
    """

    first_knob = 0.5


class StaticRatio(RatioRetainer):
    """The same ρ for every sequence (AD-TP, Table 4: static)."""

    def forward(
        self, importance: Float[Tensor, "batch grid"], hidden: Float[Tensor, "*tokens dim"], layout: Layout, layer: int
    ) -> Decision:
        """Keep the share ρ of each sequence."""
        keep = self.keep(importance, self.knob, layout)
        return Decision(importance, keep, self.gate(importance, keep, layout))


class RandomRatio(RatioRetainer):
    """A random ρ per sequence, uniform around the mean `ratio` (AD-TP, Table 4: random)."""

    def __init__(
        self,
        dim: int,
        layers: int,
        ratio: float = 0.3,
        layer: int = 0,
        seed: int = 0,
        keeps_separators: bool = False,
        gate_temperature: float | None = None,
    ) -> None:
        super().__init__(dim, layers, ratio, layer, keeps_separators, gate_temperature)
        self.seed = seed

    def forward(
        self, importance: Float[Tensor, "batch grid"], hidden: Float[Tensor, "*tokens dim"], layout: Layout, layer: int
    ) -> Decision:
        """Draw ρ in [mean − w, mean + w], the widest range that fits into (0, 1]."""
        half_width = torch.minimum(self.knob, 1 - self.knob)
        noise = uniform_noise(layout.sequences.fingerprint, 1, self.seed)[:, 0]
        keep = self.keep(importance, self.knob + (2 * noise - 1) * half_width, layout)
        return Decision(importance, keep, self.gate(importance, keep, layout))

    def settings(self) -> dict[str, Any]:
        """Return the constructor arguments besides `dim`."""
        return {"seed": self.seed, **super().settings()}


class AdaptiveRatio(RatioRetainer):
    """AD-TP's adaptive retention ratio predictor: q = softmax(W g + b) over r_c = c/C.

    `ratio` is the mean ρ* that its training aims at. The slides read g from the [CLS] *embedding*, which before the
    first layer is the same vector for every text, so the ratio would be a constant; hence `summary: mean` (of the
    hidden states) by default, and `cls` is refused at layer 0 (docs/adtp.md).

    In training, `explores` makes the ratio a Gumbel sample with a straight-through gate, so that
    the task loss can teach W (docs/adtp.md 5).

    The slides take ρ at the argmax of q, which need not average as its labels did. Here ρ is a quantile of q, the
    smallest r_c with Σ_{c'≤c} q_c' ≥ knob: at 1/2 the median, and for another mean cost a lower or higher one, the same
    for all texts, so that q still says who gets more, and nobody gets a ratio that q gives no weight.
    """

    first_knob = 0.5

    def __init__(
        self,
        dim: int,
        layers: int,
        ratio: float = 0.3,
        candidates: int = 10,
        summary: Literal["mean", "cls", "cls_mean"] = "mean",
        layer: int = 0,
        keeps_separators: bool = False,
        gate_temperature: float | None = None,
    ) -> None:
        super().__init__(dim, layers, ratio, layer, keeps_separators, gate_temperature)
        if summary not in ("mean", "cls", "cls_mean"):
            raise ValueError(f"retainer.summary={summary}: mean, cls or cls_mean")
        if summary == "cls" and layer == 0:
            raise ValueError(
                "retainer.summary=cls with retainer.layer=0: the [CLS] embedding is the same for every text, so the "
                "ratio would be a constant; use summary=mean, or prune at layer 1 or later"
            )
        if candidates < 2:
            raise ValueError(f"retainer.candidates={candidates} must be at least 2")
        self.dim, self.candidates, self.summary = dim, candidates, summary
        self.classifier = nn.Linear(dim * (2 if summary == "cls_mean" else 1), candidates)
        self.explores = False
        self.gumbel_temperature = 1.0

    @property
    def has_gate(self) -> bool:
        """Also where the ratio is a sample."""
        return self.explores or super().has_gate

    @property
    def ratios(self) -> Float[Tensor, " ratios"]:
        """The candidate list r_c = c/C."""
        return torch.arange(1, self.candidates + 1, device=self.knob.device) / self.candidates

    def choice(self, logits: Float[Tensor, "batch ratios"]) -> Int[Tensor, " batch"]:
        """Return the index of each sequence's ratio."""
        below = logits.softmax(-1).cumsum(-1) < self.knob
        return below.sum(-1).clamp(max=self.candidates - 1)

    def forward(
        self, importance: Float[Tensor, "batch grid"], hidden: Float[Tensor, "*tokens dim"], layout: Layout, layer: int
    ) -> Decision:
        """Predict ρ per sequence and keep that share."""
        parts = []
        if self.summary != "mean":
            parts.append(layout.first(hidden))
        if self.summary != "cls":
            parts.append(layout.mean(hidden))
        logits = self.classifier(torch.cat(parts, dim=-1)).float()
        if not (self.explores and self.training):
            ratio = self.ratios[self.choice(logits)]
            keep = self.keep(importance, ratio, layout)
            return Decision(importance, keep, self.gate(importance, keep, layout), logits)
        # gate_i = Σ_c w_c · 1[i is among the top ⌈r_c |V|⌉], w one-hot in value, soft in gradient
        weights = F.gumbel_softmax(logits, tau=self.gumbel_temperature, hard=True)
        kept_by_ratio = [self.keep(importance, float(ratio), layout) for ratio in self.ratios]
        gate = torch.einsum("bc,cbn->bn", weights, torch.stack(kept_by_ratio).to(weights.dtype))
        return Decision(importance, gate.detach() > 0.5, gate, logits)

    def settings(self) -> dict[str, Any]:
        """Return the constructor arguments besides `dim`."""
        return {"candidates": self.candidates, "summary": self.summary, **super().settings()}

    def macs_per_sequence(self) -> int:
        """Count the linear layer."""
        return self.classifier.in_features * self.candidates
