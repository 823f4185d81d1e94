"""What a pruned model costs as a share of the unpruned one, and the knob that is turned until the share is met."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tokprune_exp.data.batch import Batch
from tokprune_exp.encoder.trace import PruningTrace
from tokprune_exp.errors import UserError
from tokprune_exp.measure.flops import dense_encoder_macs, encoder_macs, layer_macs
from tokprune_exp.model import PrunedClassifier, without_dropout

HALVINGS = 14
TOLERANCE = 0.02
"""How far out of a retainer's reach a budget may lie before it is refused."""


@torch.no_grad()
def cost_share(model: PrunedClassifier, batches: Iterable[Batch]) -> float:
    """Compute executed / unpruned multiply-adds of encoder and pruner, unpadded, summed over examples."""
    assert model.pruning is not None
    shape, executed, dense = model.encoder.shape, 0, 0
    with without_dropout(model):
        for batch in batches:
            trace = model(batch, "gathered").trace
            executed += int((encoder_macs(trace, shape.dim, shape.ff_dim) + model.pruning.macs(trace)).sum())
            dense += int(dense_encoder_macs(trace.lengths, shape.layers, shape.dim, shape.ff_dim).sum())
    return executed / dense


def soft_cost_share(trace: PruningTrace, dim: int, ff_dim: int) -> Float[Tensor, ""]:
    """Compute the expected share of the unpruned FLOPs, as if each token passed layer l with probability M̃^l.

    The expected number of tokens after layer l is Σ_i Π_{k≤l} M̃^k_i; the cost of a layer is that of `layer_macs`.
    """
    alive, cost = trace.valid.float(), torch.zeros((), device=trace.valid.device)
    for layer in trace.layers:
        before = alive.sum(1)
        if layer.decision is not None and layer.decision.soft is not None:
            alive = alive * layer.decision.soft
        cost = cost + layer_macs(dim, ff_dim, before, before, alive.sum(1)).sum()
    return cost / dense_encoder_macs(trace.lengths, len(trace.layers), dim, ff_dim).sum()


def meet_budget(model: PrunedClassifier, batches: Sequence[Batch], share: float) -> float:
    """Turn the retainer's knob by bisection until the model costs `share`; returns the share that was reached.

    Where the cost moves in steps the nearest is taken.

    Raises:
        UserError: the budget lies outside what the retainer can reach.
    """
    assert model.pruning is not None
    retainer = model.pruning.retainer
    assert retainer.knob_ends is not None

    def cost(setting: float) -> float:
        retainer.knob.fill_(setting)
        return cost_share(model, batches)

    low, high = retainer.knob_ends  # the cheapest, the dearest
    reached = {low: cost(low), high: cost(high)}
    if not reached[low] - TOLERANCE <= share <= reached[high] + TOLERANCE:
        raise UserError(
            f"budget={share:g} cannot be met: on training texts this pruning costs between {reached[low]:.3f} and "
            f"{reached[high]:.3f} of the unpruned FLOPs; ask for a budget between them, or choose another retainer"
        )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        reached[middle] = cost(middle)
        low, high = (middle, high) if reached[middle] < share else (low, middle)
    best = min(reached, key=lambda setting: abs(reached[setting] - share))
    retainer.knob.fill_(best)
    return reached[best]
