"""STTABT, Concrete masking: back-tracking whose number of tokens is learned, one θ per layer.

    Ã_t   = mean_h Φ((a_ht − μ_ht)/σ_ht)                        eq. 3, a: scores before the softmax, over the real keys
    b     = Σ_t m_t^{l+1}·(p·s_t^{l+1} + 1 − p)·Ã_t / Σ_t m_t^{l+1}     eq. 4
    s     = ε + (1 − ε)·b/max b                                 eq. 4, printed 1 − ε·b/max b + ε: the order inverted
    m^l   = max(m^{l+1}, σ((logit p_θ + logit s)/τ))            eq. 5, p_θ = σ(θ^l); m^{L+1} is [CLS] alone
    hard  m^l ≥ 1/2, that is s ≥ 1 − p_θ

In the soft stage a token is attended to in proportion to m: attention weights are exp(score)·m, renormalised. At m of 0
and 1 this is the hard model exactly. `relaxation: code` also multiplies by m what every linear layer puts out, as the
official code does: by m^l for keys and values, by m^{l+1} for queries and all that follows.
"""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tokprune_exp.encoder.layout import Layout
from tokprune_exp.encoder.trace import Decision
from tokprune_exp.pruning.retainers.backtracking import only_first
from tokprune_exp.pruning.retainers.base import Plan, Planner, Relaxable

SMALL = 1e-7


class Concrete(Relaxable, Planner):
    """Learns p_θ of every layer through the concrete mask (inside `relaxed()`; outside it the mask is hard).

    The knob is added to every θ.
    """

    knob_ends = (-20.0, 20.0)

    def __init__(
        self,
        dim: int,
        layers: int,
        theta_init: float = 0.0,
        propagation: float = 0.1,
        temperature: float = 0.1,
        floor: float = 0.01,
        relaxation: Literal["gated", "code"] = "gated",
        keeps_separators: bool = False,
    ) -> None:
        super().__init__(dim, layers, keeps_separators)
        if not 0 <= propagation <= 1:
            raise ValueError(f"retainer.propagation={propagation} must lie between 0 and 1")
        if temperature <= 0:
            raise ValueError(f"retainer.temperature={temperature} must be above 0")
        if not 0 < floor < 1:
            raise ValueError(f"retainer.floor={floor} must lie between 0 and 1")
        if relaxation not in ("gated", "code"):
            raise ValueError(f"retainer.relaxation={relaxation}: gated or code")
        self.relaxation = relaxation
        self.theta_init, self.propagation, self.temperature, self.floor = theta_init, propagation, temperature, floor
        self.theta = nn.Parameter(torch.full((layers,), float(theta_init)))
        self.has_knob(0.0)

    @property
    def kept_probabilities(self) -> Float[Tensor, " layers"]:
        """p_θ of every layer: about the share of the tokens that are keys there."""
        return (self.theta + self.knob.to(self.theta.dtype)).sigmoid()

    def plan(self, scores: list[Float[Tensor, "batch heads grid grid"]], layout: Layout) -> Plan:
        """Run eqs. 3 to 5 from the last layer back to the first."""
        valid = layout.sequences.valid
        mask = share = only_first(valid).float()
        steps = [(share, mask)]
        for theta, score in zip(self.theta.flip(0), reversed(scores), strict=True):
            weight = mask * (self.propagation * share + 1 - self.propagation)
            asking = mask > 0  # the other rows weigh nothing
            owner = asking.nonzero()[:, 0]
            asked = weight[asking][:, None] * uniform_scores(score.transpose(1, 2)[asking], valid[owner])
            back = asked.new_zeros(mask.shape).index_add(0, owner, asked) / (mask.sum(1, keepdim=True) + SMALL)
            share = (self.floor + (1 - self.floor) * back / (back.amax(1, keepdim=True) + SMALL)) * valid
            logit = theta + self.knob.to(theta.dtype) + (share + SMALL).log() - (1 - share + SMALL).log()
            mask = torch.maximum(mask, (logit / self.temperature).sigmoid() * valid)
            if self.keeps_separators:
                mask = torch.maximum(mask, (layout.sequences.protected & valid).float())
            if not self.is_relaxed:
                mask = (mask >= 0.5).float()
            steps.append((share, mask))
        steps.reverse()
        if not self.is_relaxed:
            return Plan([Decision(importance, mask > 0.5) for importance, mask in steps])
        # the layout multiplies the gates of one layer after the other: the quotient leaves m^l in force in layer l
        before = [valid.float(), *(mask for _, mask in steps)]
        return Plan(
            [
                Decision(
                    importance,
                    valid,
                    gate=mask / former.clamp(min=SMALL),
                    soft=mask,
                    multiplies=self.relaxation == "code",
                )
                for (importance, mask), former in zip(steps, before, strict=False)
            ]
        )

    def settings(self) -> dict[str, Any]:
        """Return the constructor arguments besides `dim` and `layers`."""
        return {
            "theta_init": self.theta_init,
            "propagation": self.propagation,
            "temperature": self.temperature,
            "floor": self.floor,
            "relaxation": self.relaxation,
            **super().settings(),
        }


def uniform_scores(
    score: Float[Tensor, "rows heads tokens"], keys: Bool[Tensor, "rows tokens"]
) -> Float[Tensor, "rows tokens"]:
    """Compute rows of Ã (eq. 3): scores standardised over the real keys, through Φ, then the mean of the heads."""
    there, count = keys[:, None, :], keys.sum(1)[:, None, None]
    finite = score.masked_fill(~there, 0.0)
    mean = finite.sum(-1, keepdim=True) / count
    deviation = (finite - mean) * there
    variance = deviation.square().sum(-1, keepdim=True) / count
    standard = deviation / (variance + SMALL**2).sqrt().clamp(min=SMALL)
    return torch.special.ndtr(standard).mean(1) * keys
