"""Choosing tokens by rank, as pure functions on the grid (batch, tokens)."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def ranks(
    importance: Float[Tensor, "batch tokens"], eligible: Bool[Tensor, "batch tokens"]
) -> Int[Tensor, "batch tokens"]:
    """Rank the eligible tokens of each sequence by falling importance, 0 first; ties go to the earlier token.

    Tokens that are not eligible come after all that are.
    """
    order = importance.masked_fill(~eligible, float("-inf")).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(importance.shape[1], device=importance.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, places)


def kept_count(ratio: Float[Tensor, "..."] | float, eligible: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Compute k = ⌈ρ·|V|⌉, at least 1 (AD-TP, docs/adtp.md 6); never more than |V|."""
    # a ratio is a decimal, in single precision perhaps (0.6 is 0.60000002): 0.3 · 10 must not become 4 tokens
    wanted = torch.ceil(ratio * eligible.double() * (1 - 1e-6)).long()
    return torch.minimum(wanted.clamp(min=1), eligible)


def keep_top(
    importance: Float[Tensor, "batch tokens"],
    ratio: Float[Tensor, "..."] | float,
    prunable: Bool[Tensor, "batch tokens"],
    protected: Bool[Tensor, "batch tokens"],
) -> Bool[Tensor, "batch tokens"]:
    """Keep the protected tokens and the ⌈ρ·|V|⌉ most important prunable ones, V = prunable."""
    count = kept_count(ratio, prunable.sum(1))
    return protected | (prunable & (ranks(importance, prunable) < count[:, None]))


def uniform_noise(fingerprint: Int[Tensor, " batch"], tokens: int, seed: int) -> Float[Tensor, "batch tokens"]:
    """Return numbers in [0, 1) that look random but depend only on (seed, fingerprint, position).

    So a "random" choice is the same in every batch, with any padding, masked or gathered. The mixing is that of
    splitmix64, on wrapping 64-bit integers.
    """
    state = fingerprint[:, None] + (torch.arange(tokens, device=fingerprint.device) + 1) * -7046029254386353131 + seed
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        state = (state ^ ((state >> shift) & ((1 << (64 - shift)) - 1))) * factor
    state = state ^ ((state >> 31) & ((1 << 33) - 1))
    return (state & ((1 << 24) - 1)).float() / (1 << 24)
