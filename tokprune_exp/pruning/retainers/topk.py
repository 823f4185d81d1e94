"""Forward top-k: a share of the tokens stays that falls from layer to layer; the baseline of LTP and STTABT."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tokprune_exp.encoder.layout import Layout
from tokprune_exp.encoder.trace import Decision
from tokprune_exp.pruning.retainers.base import LayerRetainer, prunable_and_protected
from tokprune_exp.pruning.selection import kept_count, ranks


class TopKSchedule(LayerRetainer):
    """Layer l (1-based) keeps the ⌈r_l·n⌉ most important tokens; n counts the real, prunable tokens of the text.

    r_l = 1 − (1 − ratio)·l/L falls linearly to `ratio`, the share that leaves the last layer; `shares` gives every
    layer's share itself instead. The first token always stays and is not counted.

    The knob multiplies all shares, which are cut at 1: with `shares` as given it is 1.
    """

    knob_ends = (0.0, 10.0)

    shares: Tensor

    def __init__(
        self,
        dim: int,
        layers: int,
        ratio: float = 0.2,
        shares: list[float] | None = None,
        keeps_separators: bool = False,
    ) -> None:
        super().__init__(dim, layers, keeps_separators)
        if not 0 < ratio <= 1:
            raise ValueError(f"retainer.ratio={ratio} must be above 0 and at most 1")
        if shares is not None and (len(shares) != layers or not all(0 < share <= 1 for share in shares)):
            raise ValueError(
                f"retainer.shares={shares}: give {layers} shares, one for each layer, above 0 and at most 1"
            )
        self.ratio, self.given_shares = ratio, shares
        linear = 1 - (1 - ratio) * torch.arange(1, layers + 1, dtype=torch.float64) / layers
        chosen = linear if shares is None else torch.tensor(shares, dtype=torch.float64)
        self.register_buffer("shares", chosen, persistent=False)
        self.has_knob(1.0)

    def prunes_at(self, layer: int) -> bool:
        """At every layer."""
        return True

    def forward(
        self, importance: Float[Tensor, "batch grid"], hidden: Float[Tensor, "*tokens dim"], layout: Layout, layer: int
    ) -> Decision:
        """Keep the best of what earlier layers left."""
        prunable, protected = prunable_and_protected(layout)
        share = (self.shares[layer] * self.knob).clamp(max=1.0)
        count = kept_count(share, layout.sequences.prunable.sum(1))
        return Decision(importance, protected | (prunable & (ranks(importance, prunable) < count[:, None])))

    def settings(self) -> dict[str, Any]:
        """Return the constructor arguments besides `dim` and `layers`."""
        return {"ratio": self.ratio, "shares": self.given_shares, **super().settings()}
