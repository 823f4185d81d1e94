"""What every scorer shares."""

from abc import ABC, abstractmethod
from typing import Any

from torch import nn

from tokprune_exp.encoder.encoder import PrunedEncoder


class Scorer(nn.Module, ABC):
    """Says which tokens matter. Takes the encoder's `dim` first; its other arguments are its keys in `conf/scorer`."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the constructor arguments besides `dim`, to be stored beside the weights."""

    def attach(self, encoder: PrunedEncoder) -> None:
        """Build what depends on more of the encoder than its width, when the two are put together."""
