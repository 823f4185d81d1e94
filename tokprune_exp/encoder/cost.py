"""What an encoder pass costs, in closed form: multiply-adds (MACs) of the matrix products of its layers.

No embeddings, normalisation, softmax, activation or bias are counted, as everybody but STTABT does. 1 MAC = 2 FLOPs.
"""

from jaxtyping import Float, Int
from torch import Tensor

from tokprune_exp.encoder.trace import PruningTrace


def layer_macs(
    dim: int,
    ff_dim: int,
    keys: Int[Tensor, "*layers"] | Float[Tensor, "*layers"],
    queries: Int[Tensor, "*layers"] | Float[Tensor, "*layers"],
    outputs: Int[Tensor, "*layers"] | Float[Tensor, "*layers"],
) -> Int[Tensor, "*layers"] | Float[Tensor, "*layers"]:
    """Multiply-adds that one layer executes on |K| keys, |Q| queries and |O| outputs (or on soft counts of them).

    2d²|K| (keys, values) + d²|Q| (queries) + 2d|Q||K| (scores, mixing) + d²|O| (output projection) + 2df|O|
    (feed-forward). Equal to fvcore's and torch's counts of the same forward.
    """
    attention = 2 * dim**2 * keys + dim**2 * queries + 2 * dim * queries * keys
    return attention + (dim**2 + 2 * dim * ff_dim) * outputs


def encoder_macs(trace: PruningTrace, dim: int, ff_dim: int) -> Int[Tensor, " batch"]:
    """Multiply-adds that the encoder executes for each example, unpadded, summed over layers."""
    counts = (trace.counts(tokens) for tokens in ("keys", "queries", "outputs"))
    return layer_macs(dim, ff_dim, *counts).sum(1)


def attention_scores_macs(lengths: Int[Tensor, " batch"], layers: int, dim: int, ff_dim: int) -> Int[Tensor, " batch"]:
    """Multiply-adds of an unpruned encoder that stops at the attention scores of its last layer: there 2d²n + dn²."""
    return dense_encoder_macs(lengths, layers - 1, dim, ff_dim) + 2 * dim**2 * lengths + dim * lengths**2


def dense_encoder_macs(lengths: Int[Tensor, " batch"], layers: int, dim: int, ff_dim: int) -> Int[Tensor, " batch"]:
    """Multiply-adds of the unpruned encoder at these lengths: L·(4d²n + 2dn² + 2dfn)."""
    return layers * layer_macs(dim, ff_dim, lengths, lengths, lengths)
