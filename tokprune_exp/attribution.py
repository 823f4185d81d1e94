"""Integrated gradients of token embeddings, and how AD-TP turns them into one number per token.

    IG_ij = (e_ij − e'_ij) · 1/m Σ_{k=1..m} ∂F(E' + k/m (E − E')) / ∂e_ij          (AD-TP slides)
    a_i   = ‖ IG_i· ‖₂ over all dimensions (student) or the K largest (teacher)
    A_i   = a_i / ‖a‖₂ over the real tokens of the sequence                         ("dual normalisation")

with F = log p(gold class), or the score itself in regression. The sequence is normalised by its L2 norm and not by its
sum because only unit vectors give the mean squared errors of the slides' Table 5 (docs/adtp.md 1).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SQUARED_NORM_FLOOR = 1e-20
"""A sequence without any gradient gets attribution 0, not 0/0."""


@dataclass(frozen=True)
class Attribution:
    """How attributions are computed; config node `method.attribution`."""

    steps: int = 1
    """m, points of the right Riemann sum; 1 is gradient × (input − baseline) at the input itself."""
    top_k: int | None = None
    """K, dimensions of the teacher's attribution that count; null: all."""
    baseline: Literal["pad", "zero"] = "pad"
    """E': the embedding of the padding token at each position, or zero (AD-KD)."""

    def __post_init__(self) -> None:
        """Refuse values outside their bounds."""
        if self.steps < 1:
            raise ValueError(f"method.attribution.steps={self.steps} must be at least 1")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"method.attribution.top_k={self.top_k} must be at least 1, or null for all dimensions")
        if self.baseline not in ("pad", "zero"):
            raise ValueError(f"method.attribution.baseline={self.baseline}: pad or zero")


def gold_score(
    logits: Float[Tensor, "batch outputs"], labels: Int[Tensor, " batch"] | Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Return F of each example: log p(gold class), or the predicted score when labels are scores."""
    if labels.is_floating_point():
        return logits[:, 0]
    return logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]


def integrated_gradients(
    score: Callable[[Float[Tensor, "batch tokens dim"]], Float[Tensor, " batch"]],
    embeddings: Float[Tensor, "batch tokens dim"],
    baseline: Float[Tensor, "batch tokens dim"],
    steps: int = 1,
    create_graph: bool = False,
) -> Float[Tensor, "batch tokens dim"]:
    """Compute integrated gradients of `score` by a right Riemann sum with m = `steps` points.

    With `create_graph` the result can be differentiated again, with respect to the parameters behind `score`.
    """
    path = embeddings - baseline
    gradients = torch.zeros_like(embeddings)
    for k in range(1, steps + 1):
        point = baseline + (k / steps) * path
        if not point.requires_grad:
            point = point.requires_grad_()
        # examples do not touch each other, so the gradient of the sum is the gradient of each
        (gradient,) = torch.autograd.grad(score(point).sum(), point, create_graph=create_graph)
        gradients = gradients + gradient
    return path * gradients / steps


def token_magnitude(
    attributions: Float[Tensor, "batch tokens dim"], top_k: int | None = None
) -> Float[Tensor, "batch tokens"]:
    """Compute a_i, the L2 norm over a token's dimensions, or over the `top_k` of largest magnitude."""
    if top_k is not None and top_k < attributions.shape[-1]:
        attributions = attributions.abs().topk(top_k, dim=-1).values
    return torch.linalg.vector_norm(attributions, dim=-1)


def normalise_over_sequence(
    values: Float[Tensor, "batch tokens"], tokens: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens"]:
    """Scale the values of the given tokens to unit L2 norm in each sequence; all others become 0."""
    values = values.masked_fill(~tokens, 0.0)
    return values / (values.square().sum(1, keepdim=True) + SQUARED_NORM_FLOOR).sqrt()
