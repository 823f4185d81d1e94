"""What every retainer shares, and the one that keeps everything.

Every class takes the encoder's `dim` and `layers` first; its other arguments are its keys in `conf/retainer`. With a
scorer that reads hidden states it prunes before a layer, with one that reads attention inside it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tokprune_exp.encoder.layout import Layout
from tokprune_exp.encoder.trace import Decision, Place


class Retainer(nn.Module, ABC):
    """Chooses which of the alive tokens of each sequence go on, at one layer or at several.

    A retainer with `knob_ends` can meet a budget: `knob`, one number that is stored with the weights, moves its cost
    from the cheapest end to the dearest without another training (`methods/budget.py`).
    """

    knob_ends: tuple[float, float] | None = None
    """The knob at the fewest tokens and at the most; None: no budget can be met."""

    knob: Tensor

    def __init__(self, dim: int, layers: int, keeps_separators: bool = False) -> None:
        super().__init__()
        self.keeps_separators = keeps_separators

    def has_knob(self, value: float) -> None:
        """Register the knob at its first value."""
        self.register_buffer("knob", torch.tensor(value, dtype=torch.float64))

    def settings(self) -> dict[str, Any]:
        """Return the constructor arguments besides `dim` and `layers`, to be stored beside the weights."""
        return {"keeps_separators": self.keeps_separators}


class LayerRetainer(Retainer):
    """Chooses from importances, at one layer after the other."""

    @abstractmethod
    def prunes_at(self, layer: int) -> bool:
        """Whether tokens are dropped at this 0-based layer."""

    @abstractmethod
    def forward(
        self, importance: Float[Tensor, "batch grid"], hidden: Float[Tensor, "*tokens dim"], layout: Layout, layer: int
    ) -> Decision:
        """Choose the tokens to keep at `layer`; hidden states are those before pruning."""

    def macs_per_sequence(self) -> int:
        """Count the multiply-adds that one sequence costs at each layer where tokens are dropped."""
        return 0


class Relaxable:
    """A retainer whose hard mask has a soft one, used inside `relaxed()` and nowhere else."""

    is_relaxed = False

    @contextmanager
    def relaxed(self) -> Iterator[None]:
        """Within this block the mask is differentiable."""
        self.is_relaxed = True
        try:
            yield
        finally:
            self.is_relaxed = False


@dataclass(frozen=True)
class Plan:
    """What every layer computes, known before the first one.

    `decisions[0]` are the keys of layer 1, `decisions[l]` the queries and outputs of layer l, the keys of layer l + 1.
    """

    decisions: list[Decision]

    def decides(self, layer: int, place: Place) -> bool:
        """Once before the first layer, then in every layer when the keys are there and the queries are not."""
        return place == "queries" or (place == "before" and layer == 0)

    def decide(self, hidden: Tensor, layout: Layout, received: Tensor | None, layer: int, place: Place) -> Decision:
        """Look it up."""
        return self.decisions[0 if place == "before" else layer + 1]


class Planner(Retainer):
    """Chooses from the attention of all layers, from the last one back to the first (STTABT)."""

    @abstractmethod
    def plan(self, scores: list[Float[Tensor, "batch heads grid grid"]], layout: Layout) -> Plan:
        """Decide for every layer from its attention scores before the softmax."""


class KeepAll(LayerRetainer):
    """Keeps everything: the unpruned model."""

    def __init__(self, dim: int, layers: int) -> None:
        super().__init__(dim, layers)

    def prunes_at(self, layer: int) -> bool:
        """Nowhere."""
        return False

    def forward(
        self, importance: Float[Tensor, "batch grid"], hidden: Float[Tensor, "*tokens dim"], layout: Layout, layer: int
    ) -> Decision:
        """Keep what is alive."""
        return Decision(importance, layout.alive)

    def settings(self) -> dict[str, Any]:
        """Return nothing: there is nothing to set."""
        return {}


def prunable_and_protected(layout: Layout) -> tuple[Bool[Tensor, "batch grid"], Bool[Tensor, "batch grid"]]:
    """Return V, the alive tokens that may go, and the alive ones that never do."""
    return layout.sequences.prunable & layout.alive, layout.sequences.protected & layout.alive
