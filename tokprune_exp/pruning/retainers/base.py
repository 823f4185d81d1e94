"""What every retainer shares, and the one that keeps everything.

Every class takes the encoder's `dim` and `layers` first; its other arguments are its keys in `conf/retainer`. With a
scorer that reads hidden states it prunes before a layer, with one that reads attention inside it.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tokprune_exp.encoder.layout import Layout
from tokprune_exp.encoder.trace import Decision


class Retainer(nn.Module, ABC):
    """Chooses which of the alive tokens of each sequence go on, at one layer or at several.

    A retainer with `knob_ends` can meet a budget: `knob`, one number that is stored with the weights, moves its cost
    from the cheapest end to the dearest without another training (`methods/budget.py`).
    """

    prunes: ClassVar[bool] = True
    knob_ends: ClassVar[tuple[float, float] | None] = None
    """The knob at the fewest tokens and at the most."""

    knob: Tensor

    def __init__(self, dim: int, layers: int, keeps_separators: bool = False) -> None:
        super().__init__()
        self.keeps_separators = keeps_separators

    def has_knob(self, value: float) -> None:
        """Register the knob at its first value."""
        self.register_buffer("knob", torch.tensor(value, dtype=torch.float64))

    @abstractmethod
    def prunes_at(self, layer: int) -> bool:
        """Whether tokens are dropped at this 0-based layer."""

    @abstractmethod
    def forward(
        self, importance: Float[Tensor, "batch grid"], hidden: Float[Tensor, "*tokens dim"], layout: Layout, layer: int
    ) -> Decision:
        """Choose the tokens to keep at `layer`; hidden states are those before pruning."""

    def settings(self) -> dict[str, Any]:
        """Return the constructor arguments besides `dim` and `layers`, to be stored beside the weights."""
        return {"keeps_separators": self.keeps_separators}

    def macs_per_sequence(self) -> int:
        """Count the multiply-adds that one sequence costs at each layer where tokens are dropped."""
        return 0


class KeepAll(Retainer):
    """Keeps everything: the unpruned model."""

    prunes = False

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
