"""FLOPs as STTABT's code counts them, with elementwise operations: for comparison with its tables, and no other use.

Unit: FLOPs; a multiply-add is 2.
"""

from typing import Literal

import torch
from jaxtyping import Float, Num
from torch import Tensor

from tokprune_exp.encoder.cost import layer_macs

Choice = Literal["concrete", "backtracking", "manual_topk"]
NORM, SOFTMAX, GELU, PHI, LOGARITHM, SIGMOID, RANKING = 5, 5, 8, 10, 5, 5, 35
"""What STTABT's code charges for an element, in FLOPs; ranking n elements costs 35·(n + ln n)."""


def sttabt_encoder_flops(
    tokens: Num[Tensor, "*examples sets"], dim: int, ff_dim: int, heads: int
) -> Num[Tensor, "*examples"]:
    """FLOPs of embeddings and encoder as STTABT's code counts them (utils/sparse_flops_calculation.py; Table 2).

    A layer: 2 FLOPs a multiply-add, + 6·H·|Q||K| (scaling, softmax) + |O|·(7d + 9f + 7d): bias of the three linear
    layers behind the attention, GELU, two residual sums, two normalisations. Embeddings: 7d a token (two sums, one
    normalisation). Query, key and value are counted without a bias, and neither pooler nor classifier is.

    Args:
        tokens: the token sets of a plan, |K^1|, |K^2| = |Q^1| = |O^1|, …, |O^L|; padding counts there.
        dim: width d.
        ff_dim: width f of the feed-forward.
        heads: number of heads H.
    """
    keys, outputs = tokens[..., :-1], tokens[..., 1:]
    products = 2 * layer_macs(dim, ff_dim, keys, outputs, outputs)
    elements = (1 + SOFTMAX) * heads * outputs * keys
    elements = elements + outputs * (2 * (2 + NORM) * dim + (1 + GELU) * ff_dim)
    return (2 + NORM) * dim * tokens[..., 0] + (products + elements).sum(-1)


def sttabt_approx_net_flops(
    lengths: Num[Tensor, "*examples"], layers: int, dim: int, ff_dim: int, heads: int, factor: int
) -> Num[Tensor, "*examples"]:
    """FLOPs of the whole ApproxNet in STTABT's counting: sizes divided by `factor`, as many heads (Table 2)."""
    nothing_pruned = lengths[..., None].expand(*lengths.shape, layers + 1)
    return sttabt_encoder_flops(nothing_pruned, dim // factor, ff_dim // factor, heads)


def sttabt_mask_update_flops(
    kind: Choice,
    tokens: Num[Tensor, "*examples sets"],
    lengths: Num[Tensor, "*examples"],
    dim: int,
    heads: int,
) -> Float[Tensor, "*examples"]:
    """FLOPs of choosing the tokens, in STTABT's counting (Table 2), T being the length, there padded; l = 1 … L.

    concrete      |O|·T·(8H + 10H + H + 1 + 5)    eq. 3, Φ, mean of the heads, eq. 4
                  + T·(2 + 2 + 18 + 1)            normalised, floored; the mask of eq. 5; applied
                  + T·(L + 1 − l)                 larger than the masks above
    backtracking  |O|·T·(H + 1) + (|O| + 1)·T     mean of the heads, mean of the rows
                  + 35·(T + ln T) + 4T + |K|      top k, union, scaled
    manual_topk   |K|·T·(H + 1) + (T + 1)·|K|     mean of the heads, mean of the rows
                  + 35·(|K| + ln |K|)             top k
                  + 2d²·(|K| − |O|)               queries that were computed for tokens that go
    """
    keys, outputs = tokens[..., :-1].double(), tokens[..., 1:].double()
    length, layers = lengths[..., None].double(), keys.shape[-1]
    if kind == "concrete":
        above = torch.arange(layers, 0, -1, device=tokens.device)
        cost = outputs * length * ((8 + PHI + 1) * heads + 1 + 5)
        cost = cost + length * (2 + 2 + SIGMOID + 2 * LOGARITHM + 3 + 1 + above)
    elif kind == "backtracking":
        cost = outputs * length * (heads + 1) + (outputs + 1) * length
        cost = cost + RANKING * (length + length.log()) + 4 * length + keys
    else:
        cost = keys * length * (heads + 1) + (length + 1) * keys + RANKING * (keys + keys.log())
        cost = cost + 2 * dim**2 * (keys - outputs)
    return cost.sum(-1)
