"""Scorers: what says which tokens matter, an importance per token and layer or the attention of all layers at once."""

from tokprune_exp.pruning.scorers.attention import ApproxAttention, AttentionSource, ExactAttention
from tokprune_exp.pruning.scorers.base import Scorer
from tokprune_exp.pruning.scorers.importance import AttentionMass, RandomScores, TokenSaliency, TokenScorer

__all__ = [
    "ApproxAttention",
    "AttentionMass",
    "AttentionSource",
    "ExactAttention",
    "RandomScores",
    "Scorer",
    "TokenSaliency",
    "TokenScorer",
]
