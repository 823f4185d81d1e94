"""Every loss term as a pure function, with its equation; and the weights of each method's overall objective.

AD-TP (slides): L = (1−α)·L_CE + α·L_logit + β·L_IG + γ·(L_ARP + L_TSP).
LTP (eq. 13):   L = L_CE + λ·(1/L) Σ_l ‖M̃^l‖₁.
STTABT (eq. 6): L = L_CE + λ_p Σ_l (θ^l − θ_init)² + λ_mask (mean m − p_init)², the mean over m^1 … m^L.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from tokprune_exp.attribution import normalise_over_sequence
from tokprune_exp.encoder.trace import PruningTrace
from tokprune_exp.pruning.selection import kept_count

SMALLEST_MASS = 1e-12
"""A sequence without attribution (nothing prunable, or no gradient) holds nothing, not 0/0."""
CODE_LENGTH = 128
"""LTP's code pads every sequence to this length, and takes means over it."""


@dataclass(frozen=True)
class ADTPLoss:
    """The weights of AD-TP's terms; each field is a key of `conf/loss/adtp.yaml`."""

    alpha: float = 0.8
    """α, teacher's logits against gold labels."""
    beta: float = 1.0
    """β, distance of the student's attributions from the teacher's."""
    gamma: float = 1.0
    """γ, the retainer's two losses."""
    temperature: float = 2.0
    """τ of the logits' distillation."""
    kappa_max: float = 1.0
    """κ at the end of training: 0 teacher's attributions only, 1 moves all the way to the student's own."""
    budget_weight: float = 0.0
    """μ, holds the expected ratio of a batch at ρ*."""
    listwise_weight: float = 0.0
    """Adds a ranking term to L_TSP."""

    def __post_init__(self) -> None:
        """Refuse weights outside their bounds."""
        for name in ("alpha", "kappa_max"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"loss.{name}={getattr(self, name)} must lie between 0 and 1")
        for name in ("beta", "gamma", "budget_weight", "listwise_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name}={getattr(self, name)} must not be negative")
        if self.temperature <= 0:
            raise ValueError(f"loss.temperature={self.temperature} must be above 0")


@dataclass(frozen=True)
class LTPLoss:
    """The weights of LTP's terms; each field is a key of `conf/loss/ltp.yaml`."""

    lam: float = 0.05
    """λ, weight of the number of tokens."""
    penalty: Literal["paper", "code"] = "paper"
    """How tokens are counted: eq. 13, or the official code's mean."""
    budget_weight: float = 10.0
    """μ, weight of the squared distance from the budget; takes λ's place when there is one."""

    def __post_init__(self) -> None:
        """Refuse weights outside their bounds."""
        for name in ("lam", "budget_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name}={getattr(self, name)} must not be negative")
        if self.penalty not in ("paper", "code"):
            raise ValueError(f"loss.penalty={self.penalty}: paper or code")


@dataclass(frozen=True)
class STTABTLoss:
    """The weights of Concrete masking (STTABT, eq. 6); each field is a key of `conf/loss/sttabt.yaml`."""

    lam_theta: float = 1e-3
    """λ_p, keeps θ near where it started."""
    lam_mask: float = 1e-3
    """λ_mask, keeps the mean mask near p_init."""
    mask_layers: Literal["paper", "code"] = "paper"
    """Which masks are averaged: m^1 … m^L, every layer's input (eq. 6), or the official code's m^2 … m^{L+1}."""
    budget_weight: float = 10.0
    """μ, weight of the squared distance from the budget; takes λ_mask's place when there is one."""

    def __post_init__(self) -> None:
        """Refuse weights outside their bounds."""
        for name in ("lam_theta", "lam_mask", "budget_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"loss.{name}={getattr(self, name)} must not be negative")
        if self.mask_layers not in ("paper", "code"):
            raise ValueError(f"loss.mask_layers={self.mask_layers}: paper or code")


def task_loss(
    logits: Float[Tensor, "batch outputs"], labels: Int[Tensor, " batch"] | Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Compute L_CE of each example: cross-entropy, or the squared error when labels are scores."""
    if labels.is_floating_point():
        return (logits[:, 0] - labels).square()
    return F.cross_entropy(logits, labels, reduction="none")


def logit_distillation(
    student: Float[Tensor, "batch outputs"], teacher: Float[Tensor, "batch outputs"], temperature: float
) -> Float[Tensor, ""]:
    """Compute L_logit = −mean_B Σ_c softmax(z_t/τ)_c log softmax(z_s/τ)_c, without a factor τ² (AD-KD, loss.py).

    A single output is a score: mean (z_s/τ − z_t/τ)².
    """
    if student.shape[1] == 1:
        return F.mse_loss(student / temperature, teacher / temperature)
    return -((teacher / temperature).softmax(-1) * (student / temperature).log_softmax(-1)).sum(-1).mean()


def attribution_distance(
    student: Float[Tensor, "batch tokens"], teacher: Float[Tensor, "batch tokens"], valid: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, ""]:
    """Compute L_IG = mean_B Σ_{i valid} (A_s,i − A_t,i)² / n (docs/adtp.md 2)."""
    return ((student - teacher).square().masked_fill(~valid, 0.0).sum(1) / valid.sum(1)).mean()


def joint_attribution(
    teacher: Float[Tensor, "batch tokens"],
    student: Float[Tensor, "batch tokens"],
    kappa: float,
    tokens: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, "batch tokens"]:
    """Compute a_c = (1−κ)·A_t + κ·A_s, scaled to unit norm over the given tokens; a target, so without gradient."""
    return normalise_over_sequence((1 - kappa) * teacher + kappa * student, tokens).detach()


def saliency_loss(
    saliency: Float[Tensor, "batch tokens"],
    target: Float[Tensor, "batch tokens"],
    prunable: Bool[Tensor, "batch tokens"],
    listwise_weight: float = 0.0,
) -> Float[Tensor, ""]:
    """Compute L_TSP = mean_B Σ_{i∈V} (S_i/‖S‖₂ − a_c,i)² / |V| (docs/adtp.md 4).

    `target` has unit norm over V too: with the unprunable [CLS] inside the norm, S could never equal it.
    `listwise_weight` adds KL(softmax(a_c·√|V|) ‖ softmax(Ŝ·√|V|)), which asks for the order rather than the values.
    """
    unit = normalise_over_sequence(saliency, prunable)
    count = prunable.sum(1).clamp(min=1)
    loss = ((unit - target).square().masked_fill(~prunable, 0.0).sum(1) / count).mean()
    if listwise_weight:
        scale = count[:, None].sqrt()
        wanted, given = (
            (x * scale).masked_fill(~prunable, float("-inf")).log_softmax(-1).masked_fill(~prunable, 0.0)
            for x in (target, unit)
        )
        divergence = (wanted.exp() * (wanted - given)).masked_fill(~prunable, 0.0).sum(1)
        loss = loss + listwise_weight * divergence.mean()
    return loss


def token_penalty(trace: PruningTrace, penalty: str = "paper") -> Float[Tensor, ""]:
    """Compute (1/L) Σ_l ‖M̃^l‖₁ of the soft masks, summed over the tokens, mean over the batch (LTP, eq. 13).

    `code` is the official code's Σ_l mean(M̃^l) over a sequence padded to 128 tokens, without the padding's own share:
    L/128 times the paper's, so that a λ found for one does not fit the other.
    """
    tokens = torch.stack([one.soft.sum(1) for one in trace.decisions if one.soft is not None]).sum(0).mean()
    return tokens / (len(trace.layers) if penalty == "paper" else CODE_LENGTH)


def mean_mask(
    masks: list[Float[Tensor, "batch tokens"]], lengths: Int[Tensor, " batch"], layers: str = "paper"
) -> Float[Tensor, ""]:
    """Compute mean_B 1/L Σ_{l=1…L} Σ_t m_t^l / n of soft masks m^1 … m^{L+1}, over the n real tokens (STTABT, eq. 6).

    `code` is the official code's m^2 … m^{L+1}: without what enters the first layer, and with the last mask, which is
    [CLS] alone whatever θ is.
    """
    counted = masks[:-1] if layers == "paper" else masks[1:]
    return torch.stack([mask.sum(1) / lengths for mask in counted]).mean()


def mass_by_ratio(
    attribution: Float[Tensor, "batch tokens"],
    prunable: Bool[Tensor, "batch tokens"],
    ratios: Float[Tensor, " ratios"],
) -> Float[Tensor, "batch ratios"]:
    """Compute the share of the attribution of V that its top ⌈r_c|V|⌉ tokens hold, for every candidate ratio r_c."""
    ordered = attribution.masked_fill(~prunable, 0.0).sort(dim=1, descending=True).values.cumsum(1)
    size = prunable.sum(1)
    counts = torch.stack([kept_count(float(ratio), size) for ratio in ratios], dim=1)
    held = ordered.gather(1, (counts - 1).clamp(min=0))
    return held / ordered[:, -1:].clamp(min=SMALLEST_MASS)


def smallest_sufficient_ratio(mass: Float[Tensor, "batch ratios"], eta: float) -> Int[Tensor, " batch"]:
    """Compute y = min{c : mass_c ≥ η}: how concentrated the attribution is (docs/adtp.md 5)."""
    return (mass < eta).sum(1).clamp(max=mass.shape[1] - 1)


def calibrate_eta(mass: Float[Tensor, "examples ratios"], ratios: Float[Tensor, " ratios"], target: float) -> float:
    """Find η by bisection so that the mean pseudo-labelled ratio over a training set is ρ* = `target`.

    The mean grows with η in steps; where none of them is ρ*, the nearest is taken.
    """

    def excess(eta: float) -> float:
        return float(ratios[smallest_sufficient_ratio(mass, eta)].double().mean()) - target

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return min(low, high, key=lambda eta: abs(excess(eta)))


def budget_loss(ratio_logits: Float[Tensor, "batch ratios"], ratios: Tensor, target: float) -> Float[Tensor, ""]:
    """Compute (mean_B Σ_c q_c r_c − ρ*)², the term that holds the expected ratio at its budget."""
    return ((ratio_logits.softmax(-1) @ ratios).mean() - target).square()
