"""From the pooled first token to logits or a score."""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Head(nn.Module):
    """BERT's classification head: tanh pooler on the first token, dropout, one linear layer.

    `outputs` is the number of classes, or 1 for a score.
    """

    def __init__(self, dim: int, outputs: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.pooler = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(dim, outputs)
        for linear in (self.pooler, self.classifier):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, first: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch outputs"]:
        """Compute logits from the hidden state of the first token."""
        return self.classifier(self.dropout(torch.tanh(self.pooler(first))))

    def macs(self) -> int:
        """Count the multiply-adds per sequence."""
        return sum(linear.in_features * linear.out_features for linear in (self.pooler, self.classifier))
