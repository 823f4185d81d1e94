"""What if the named tokens had stayed, or had never been there? The model's own rule, overruled for them alone."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from tokprune_exp.analysis.passes import Wrap, logits_of, on_grid
from tokprune_exp.data.batch import Batch
from tokprune_exp.data.tokenise import EncodedSplit
from tokprune_exp.encoder.encoder import PruningRule
from tokprune_exp.encoder.layout import Layout
from tokprune_exp.encoder.trace import Decision, Place
from tokprune_exp.model import PrunedClassifier


@dataclass(frozen=True)
class ForcedIn:
    """The model's rule, but the named tokens stay at every decision."""

    rule: PruningRule
    named: Bool[Tensor, "batch tokens"]

    def decides(self, layer: int, place: Place) -> bool:
        """Where the model's rule does."""
        return self.rule.decides(layer, place)

    def decide(self, hidden: Tensor, layout: Layout, received: Tensor | None, layer: int, place: Place) -> Decision:
        """Add the named tokens to those that the model keeps."""
        decision = self.rule.decide(hidden, layout, received, layer, place)
        return replace(decision, keep=decision.keep | (layout.alive & self.named))


@dataclass(frozen=True)
class ForcedOut:
    """The model's rule, if it has one, on texts whose named tokens leave before the first layer.

    What chose the tokens of all layers beforehand (STTABT) has still seen the named ones.
    """

    rule: PruningRule | None
    named: Bool[Tensor, "batch tokens"]

    def decides(self, layer: int, place: Place) -> bool:
        """Before the first layer, and where the model's rule does."""
        return (layer, place) == (0, "before") or (self.rule is not None and self.rule.decides(layer, place))

    def decide(self, hidden: Tensor, layout: Layout, received: Tensor | None, layer: int, place: Place) -> Decision:
        """Take the named tokens from those that the model keeps; protected ones stay."""
        if self.rule is not None and self.rule.decides(layer, place):
            decision = self.rule.decide(hidden, layout, received, layer, place)
        else:
            decision = Decision(layout.alive.float(), layout.alive)
        return replace(decision, keep=decision.keep & ~(self.named & ~layout.sequences.protected))


def forced_in(named: Bool[np.ndarray, " tokens"], split: EncodedSplit) -> Wrap:
    """Make a rule on each batch under which the named tokens (a flat mask) stay."""

    def wrap(rule: PruningRule | None, batch: Batch) -> PruningRule | None:
        return None if rule is None else ForcedIn(rule, on_grid(named, split, batch))

    return wrap


def forced_out(named: Bool[np.ndarray, " tokens"], split: EncodedSplit) -> Wrap:
    """Make a rule on each batch under which the named tokens (a flat mask) are gone."""
    return lambda rule, batch: ForcedOut(rule, on_grid(named, split, batch))


def answers_when_forced(
    model: PrunedClassifier,
    split: EncodedSplit,
    named: Bool[np.ndarray, " tokens"],
    others: Bool[np.ndarray, " tokens"],
) -> dict[str, tuple[Bool[np.ndarray, " tokens"], Tensor]]:
    """Compute the logits under each interference, beside the tokens that it named.

    As a control the same is done to as many `others` of each text, drawn at random: that more or fewer tokens stay
    makes a difference by itself.
    """
    control = as_many_at_random(named, others, split)
    found = {}
    for what, mask in (("domain terms", named), ("as many other words' tokens", control)):
        for way, wrap in (("stay", forced_in), ("leave", forced_out)):
            variant = f"{what} {way}"
            found[variant] = (mask, logits_of(model, split, variant, wrap=wrap(mask, split)))
    return found


def as_many_at_random(
    named: Bool[np.ndarray, " tokens"], others: Bool[np.ndarray, " tokens"], split: EncodedSplit, seed: int = 0
) -> Bool[np.ndarray, " tokens"]:
    """Draw as many of the other tokens of each example as it has named ones, or all where they are fewer."""
    example = np.repeat(np.arange(len(split)), split.lengths.numpy())
    wanted = np.bincount(example[named], minlength=len(split))
    order = np.lexsort((np.random.default_rng(seed).random(len(named)), ~others, example))
    rank = torch.arange(len(named)) - split.offsets[:-1].repeat_interleave(split.lengths)
    chosen = np.zeros(len(named), bool)
    chosen[order] = (rank.numpy() < wanted[example]) & others[order]
    return chosen
