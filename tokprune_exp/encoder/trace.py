"""What the encoder did with its tokens, layer by layer: the one record that losses, FLOPs, figures and pages read."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Place = Literal["before", "queries", "after"]
"""Where in a layer tokens can leave: before it (they are no keys either), as queries and outputs while they still serve
as keys, or after the attention (they have attended, but do not go on)."""


@dataclass
class Decision:
    """What a pruning decided at one place: importances, the tokens to keep, and how the choice can be learned.

    `gate`, with gradients, is what a token counts for as a key from here on, times the gates before: `keep` in value
    (straight-through), or between 0 and 1 where nothing is dropped, the soft mask itself (LTP, gated) or the quotient
    of two (a plan of Concrete masks). `ratio_logits` are an adaptive retainer's. `soft` is a mask between 0 and 1:
    without a gate, the layer's output is multiplied by it (LTP, eq. 12); where a plan `multiplies`, so is what each
    linear map of the layer puts out, besides the gate (STTABT's official code). `priced` is what a budget is priced
    with: `soft` or `keep` in value, with gradients for the thresholds alone. `threshold` is what the importance had to
    exceed, where one was in force.
    """

    importance: Float[Tensor, "batch tokens"]
    keep: Bool[Tensor, "batch tokens"]
    gate: Float[Tensor, "batch tokens"] | None = None
    ratio_logits: Float[Tensor, "batch ratios"] | None = None
    soft: Float[Tensor, "batch tokens"] | None = None
    multiplies: bool = False
    priced: Float[Tensor, "batch tokens"] | None = None
    threshold: Float[Tensor, ""] | float | None = None


@dataclass(frozen=True)
class Bar:
    """A choice in two numbers: those stay whose received attention, over `norm`, exceeds the threshold.

    With `norm` 0 it is divided by the tokens of its sequence.
    """

    threshold: float
    norm: int


@dataclass
class LayerTrace:
    """The three token sets of one layer and the importance they were chosen by.

    `keys` K is what the layer attended to, `queries` Q ⊇ `outputs` O what attended and what went on through the
    feed-forward block. All masks are in the coordinates of the padded batch, in both ways of running.
    """

    keys: Bool[Tensor, "batch tokens"]
    queries: Bool[Tensor, "batch tokens"]
    outputs: Bool[Tensor, "batch tokens"]
    decision: Decision | None = None

    @property
    def importance(self) -> Float[Tensor, "batch tokens"] | None:
        """What the tokens were chosen by, in a layer where they were."""
        return None if self.decision is None else self.decision.importance


@dataclass
class PruningTrace:
    """The layers' traces of one forward pass over a batch whose real tokens are `valid`."""

    valid: Bool[Tensor, "batch tokens"]
    layers: list[LayerTrace] = field(default_factory=list)
    entry: Decision | None = None
    """Which tokens enter the first layer, where each layer then decides on its queries (a plan)."""

    @property
    def decisions(self) -> list[Decision]:
        """What was decided, in the order of the layers where something was."""
        return [layer.decision for layer in self.layers if layer.decision is not None]

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Real tokens of each sequence."""
        return self.valid.sum(1)

    def counts(self, tokens: str) -> Int[Tensor, "batch layers"]:
        """|K|, |Q| or |O| of each sequence in each layer; `tokens` is keys, queries or outputs."""
        return torch.stack([getattr(layer, tokens).sum(1) for layer in self.layers], dim=1)

    @property
    def retention(self) -> Float[Tensor, "batch layers"]:
        """Share of the real tokens that leave each layer, |O| / n."""
        return self.counts("outputs") / self.lengths[:, None]
