"""The attention of every layer, known before the first one: approximated by a small network, or exact (STTABT, 3.2).

Both return A_score of eq. 1, before the softmax, on the grid; -inf at keys that are not there.
"""

from abc import abstractmethod
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokprune_exp.encoder.cost import attention_scores_macs
from tokprune_exp.encoder.encoder import EncoderShape, PrunedEncoder
from tokprune_exp.encoder.layout import Layout
from tokprune_exp.pruning.scorers.base import Scorer


class AttentionSource(Scorer):
    """Says, before the first layer, what every layer will attend to."""

    @abstractmethod
    def scores(
        self, encoder: PrunedEncoder, embeddings: Float[Tensor, "*tokens dim"], layout: Layout
    ) -> list[Float[Tensor, "batch heads grid grid"]]:
        """Compute the attention scores of every layer of `encoder` for these texts."""

    @abstractmethod
    def macs(self, lengths: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Count the multiply-adds that this costs, per sequence."""


class ExactAttention(AttentionSource):
    """The attention of the unpruned model itself: the reference for approximations, at the price of a whole pass.

    It is no bound: the plan of an approximation can be the better one (docs/results.md, RTE).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.shape: EncoderShape | None = None

    def attach(self, encoder: PrunedEncoder) -> None:
        """Remember the encoder's sizes."""
        self.shape = encoder.shape

    def scores(
        self, encoder: PrunedEncoder, embeddings: Float[Tensor, "*tokens dim"], layout: Layout
    ) -> list[Float[Tensor, "batch heads grid grid"]]:
        """Run the unpruned encoder: a plan is not learned from, so without gradient and without dropout."""
        was_training = encoder.training
        with torch.no_grad():
            scores = encoder.eval().attention_scores(embeddings, layout)
        encoder.train(was_training)
        return scores

    def macs(self, lengths: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Count the unpruned pass, up to the scores of its last layer."""
        assert self.shape is not None
        return attention_scores_macs(lengths, self.shape.layers, self.shape.dim, self.shape.ff_dim)

    def settings(self) -> dict[str, Any]:
        """Return nothing: there is nothing to set."""
        return {}


class ApproxAttention(AttentionSource):
    """ApproxNet: an encoder of the same depth and heads whose hidden and feed-forward sizes are divided by `factor`.

    `initialisation` is where its distillation starts: random, or the large encoder's weights interpolated to the small
    sizes. It has embeddings of its own, of the small width.
    """

    net: PrunedEncoder

    def __init__(
        self, dim: int, factor: int = 4, initialisation: Literal["random", "interpolated"] = "interpolated"
    ) -> None:
        super().__init__()
        if factor < 2 or dim % factor:
            raise ValueError(f"scorer.factor={factor} must be at least 2 and divide the encoder's width {dim}")
        if initialisation not in ("random", "interpolated"):
            raise ValueError(f"scorer.initialisation={initialisation}: random or interpolated")
        self.factor, self.initialisation = factor, initialisation

    def attach(self, encoder: PrunedEncoder) -> None:
        """Build the network; its weights are set by `initialise` or loaded.

        Raises:
            ValueError: the small width is not a multiple of the heads.
        """
        shape = encoder.shape
        if (shape.dim // self.factor) % shape.heads:
            raise ValueError(
                f"scorer.factor={self.factor}: {shape.dim} / {self.factor} is not a multiple of {shape.heads} heads"
            )
        self.net = PrunedEncoder(
            replace(shape, dim=shape.dim // self.factor, ff_dim=max(1, shape.ff_dim // self.factor))
        )

    def scores(
        self, encoder: PrunedEncoder, embeddings: Float[Tensor, "*tokens dim"], layout: Layout
    ) -> list[Float[Tensor, "batch heads grid grid"]]:
        """Run the small network on the ids."""
        ids, types = layout.sequences.input_ids, layout.sequences.token_type_ids
        assert ids is not None and types is not None
        return self.net.attention_scores(self.net.embed(ids, types, layout), layout)

    def macs(self, lengths: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Count the small network's pass, up to the scores of its last layer."""
        small = self.net.shape
        return attention_scores_macs(lengths, small.layers, small.dim, small.ff_dim)

    def train(self, mode: bool = True) -> "ApproxAttention":
        """Switch dropout on only where the network itself is trained: a frozen one plans as it will when deployed."""
        return super().train(mode and any(parameter.requires_grad for parameter in self.parameters()))

    def initialise(self, encoder: PrunedEncoder) -> None:
        """Set the weights where the distillation starts."""
        START[self.initialisation](encoder, self.net)

    def another(self, encoder: PrunedEncoder, initialisation: str | None = None) -> PrunedEncoder:
        """Return another network of these sizes with the weights of a start: this one's, or the one that is named."""
        net = deepcopy(self.net)
        START[initialisation or self.initialisation](encoder, net)
        return net

    def settings(self) -> dict[str, Any]:
        """Return the constructor arguments besides `dim`."""
        return {"factor": self.factor, "initialisation": self.initialisation}


@torch.no_grad()
def interpolate_weights(large: PrunedEncoder, small: PrunedEncoder) -> None:
    """Resize every weight linearly to the small encoder's sizes.

    Averaging makes weights small and attention with them even. They are not scaled back to their deviation: that makes
    attention sharp before it is right.
    """
    theirs = large.state_dict()
    for name, parameter in small.state_dict().items():
        source = theirs[name].float()
        grid = source[None, None] if source.dim() == 2 else source[None, None, None]
        size = tuple(parameter.shape) if source.dim() == 2 else (1, *parameter.shape)
        resized = nn.functional.interpolate(grid, size=size, mode="bilinear", align_corners=False, antialias=True)
        parameter.copy_(resized.view(parameter.shape))


@torch.no_grad()
def randomise_weights(large: PrunedEncoder, small: PrunedEncoder) -> None:
    """Draw every weight as BERT does: N(0, 0.02²), biases 0, normalisations the identity."""
    for module in small.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()


START: dict[str, Callable[[PrunedEncoder, PrunedEncoder], None]] = {
    "random": randomise_weights,
    "interpolated": interpolate_weights,
}
"""Sets the weights of a small encoder, the large one being given."""
