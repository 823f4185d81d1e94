"""Scorers per layer: what the encoder knows at one moment → an importance per token.

One that reads hidden states decides before the attention of a layer, one that reads the attention after it.
"""

from abc import abstractmethod
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from tokprune_exp.encoder.layout import Layout
from tokprune_exp.pruning.scorers.base import Scorer
from tokprune_exp.pruning.selection import uniform_noise


class TokenScorer(Scorer):
    """Gives each token an importance at one layer; larger is more important."""

    reads_attention: ClassVar[bool] = False

    @abstractmethod
    def forward(
        self, hidden: Float[Tensor, "*tokens dim"], layout: Layout, received: Float[Tensor, "batch grid"] | None
    ) -> Float[Tensor, "batch grid"]:
        """Compute the importance of every alive token, on the grid."""

    def macs_per_token(self) -> int:
        """Count the multiply-adds that scoring one token costs, beyond what the encoder computes anyway."""
        return 0


class TokenSaliency(TokenScorer):
    """AD-TP's token saliency predictor: S_i = act(w₂ᵀ ReLU(W₁ h_i + b₁) + b₂), docs/adtp.md 4.

    The slides draw an outer ReLU (`activation: relu`); it makes many exact ties at 0, so softplus is the default.
    At layer 0 it sees word and position only: a learned lexical saliency.
    """

    def __init__(
        self, dim: int, hidden_dim: int = 96, activation: Literal["softplus", "relu", "none"] = "softplus"
    ) -> None:
        super().__init__()
        if activation not in ("softplus", "relu", "none"):
            raise ValueError(f"scorer.activation={activation}: softplus, relu or none")
        if hidden_dim < 1:
            raise ValueError(f"scorer.hidden_dim={hidden_dim} must be at least 1")
        self.dim, self.hidden_dim, self.activation = dim, hidden_dim, activation
        self.inner = nn.Linear(dim, hidden_dim)
        self.outer = nn.Linear(hidden_dim, 1)

    def forward(
        self, hidden: Float[Tensor, "*tokens dim"], layout: Layout, received: Float[Tensor, "batch grid"] | None
    ) -> Float[Tensor, "batch grid"]:
        """Compute S_i from the hidden state of each token alone."""
        saliency = self.outer(F.relu(self.inner(hidden)))[..., 0].float()
        if self.activation != "none":
            saliency = F.softplus(saliency) if self.activation == "softplus" else F.relu(saliency)
        return layout.to_grid(saliency)

    def settings(self) -> dict[str, Any]:
        """Return the constructor arguments besides `dim`."""
        return {"hidden_dim": self.hidden_dim, "activation": self.activation}

    def macs_per_token(self) -> int:
        """Count the two linear layers."""
        return self.dim * self.hidden_dim + self.hidden_dim


class AttentionMass(TokenScorer):
    """Attention received, s_i = 1/(H·norm) Σ_h Σ_j A_h[j, i] (LTP, eq. 7).

    `normalisation: constant` divides by a fixed number (the official code's 128, which alone makes a threshold such as
    0.01 meaningful), `length` by the alive tokens (the paper). The order of tokens is the same.
    """

    reads_attention = True

    def __init__(
        self, dim: int, normalisation: Literal["length", "constant"] = "constant", constant: int = 128
    ) -> None:
        super().__init__()
        if normalisation not in ("length", "constant"):
            raise ValueError(f"scorer.normalisation={normalisation}: length or constant")
        if constant < 1:
            raise ValueError(f"scorer.constant={constant} must be at least 1")
        self.normalisation, self.constant = normalisation, constant

    def forward(
        self, hidden: Float[Tensor, "*tokens dim"], layout: Layout, received: Float[Tensor, "batch grid"] | None
    ) -> Float[Tensor, "batch grid"]:
        """Normalise the column sums that the attention left behind."""
        if received is None:
            raise ValueError("attention_mass is asked before any attention was computed")
        return received / (layout.alive.sum(1, keepdim=True) if self.normalisation == "length" else self.constant)

    def settings(self) -> dict[str, Any]:
        """Return the constructor arguments besides `dim`."""
        return {"normalisation": self.normalisation, "constant": self.constant}


class RandomScores(TokenScorer):
    """A fixed random importance per (sequence, position): the lower bound that every scorer must beat."""

    def __init__(self, dim: int, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def forward(
        self, hidden: Float[Tensor, "*tokens dim"], layout: Layout, received: Float[Tensor, "batch grid"] | None
    ) -> Float[Tensor, "batch grid"]:
        """Draw importances that depend on the text and the seed only."""
        alive = layout.alive
        return uniform_noise(layout.sequences.fingerprint, alive.shape[1], self.seed).masked_fill(~alive, 0.0)

    def settings(self) -> dict[str, Any]:
        """Return the constructor arguments besides `dim`."""
        return {"seed": self.seed}
