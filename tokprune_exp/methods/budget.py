"""What a pruned model costs as a share of the unpruned one, and the knob that is turned until the share is met."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokprune_exp.data.batch import Batch
from tokprune_exp.encoder.cost import dense_encoder_macs, encoder_macs, layer_macs
from tokprune_exp.encoder.trace import PruningTrace
from tokprune_exp.errors import UserError
from tokprune_exp.model import PrunedClassifier, without_dropout

CLOSE_ENOUGH = 0.002
"""Distance from the asked share at which the search ends."""
FIRST_STEP = 1 / 64
NARROWINGS = 16
OUT_OF_REACH = 0.02
"""How far from the share the cheapest or the dearest setting may be before the budget is refused."""


@torch.no_grad()
def cost_share(model: PrunedClassifier, batches: Iterable[Batch]) -> float:
    """Compute executed / unpruned multiply-adds of encoder and pruner, unpadded, summed over examples."""
    assert model.pruning is not None
    shape, executed, dense = model.encoder.shape, 0, 0
    with without_dropout(model):
        for batch in batches:
            trace = model.choices(batch)
            executed += int((encoder_macs(trace, shape.dim, shape.ff_dim) + model.pruning.macs(trace)).sum())
            dense += int(dense_cost(model, trace))
    return executed / dense


def soft_cost_share(model: PrunedClassifier, trace: PruningTrace) -> Float[Tensor, ""]:
    """Compute the expected share of the unpruned multiply-adds, the pruner's among them, under soft masks."""
    return soft_cost(model, trace) / dense_cost(model, trace)


def dense_cost(model: PrunedClassifier, trace: PruningTrace) -> Int[Tensor, ""]:
    """Count the multiply-adds of the unpruned encoder on these texts."""
    shape = model.encoder.shape
    return dense_encoder_macs(trace.lengths, shape.layers, shape.dim, shape.ff_dim).sum()


def soft_cost(model: PrunedClassifier, trace: PruningTrace) -> Float[Tensor, ""]:
    """Compute the expected multiply-adds under soft masks, a layer's by `layer_macs`, and the pruner's.

    Layer by layer (LTP) a token passes layer l with probability M̃^l, so Σ_i Π_{k≤l} M̃^k_i tokens leave it. In a plan
    (STTABT) the masks say what is there: Σ m^l keys, Σ m^{l+1} queries and outputs. Where LTP's relaxed model is the
    hard one or nearly so (gated, straight-through), the hard mask is counted, with the soft one's gradient.

    Layer by layer the gradient reaches the thresholds alone: at small budgets a model whose weights it reached too did
    not recover from the step to hard masks (docs/ltp.md).
    """
    assert model.pruning is not None
    shape, alive = model.encoder.shape, trace.valid.float()
    cost = model.pruning.macs(trace).sum().float()
    is_plan = trace.entry is not None
    if trace.entry is not None and trace.entry.soft is not None:
        alive = trace.entry.soft
    for layer in trace.layers:
        before = alive.sum(1)
        if layer.decision is not None and layer.decision.soft is not None:
            soft = layer.decision.soft if layer.decision.priced is None else layer.decision.priced
            alive = soft if is_plan else alive * soft
        queries = alive.sum(1) if is_plan else before
        cost = cost + layer_macs(shape.dim, shape.ff_dim, before, queries, alive.sum(1)).sum()
    return cost


@torch.no_grad()
def check_reach(model: PrunedClassifier, batches: Sequence[Batch], share: float) -> None:
    """See before any training whether the retainer's knob spans a budget, and leave the knob where it was.

    Raises:
        UserError: the budget lies outside what the retainer can reach.
    """
    assert model.pruning is not None
    retainer = model.pruning.retainer
    assert retainer.knob_ends is not None
    start, costs = float(retainer.knob), []
    for end in retainer.knob_ends:
        retainer.knob.fill_(end)
        costs.append(cost_share(model, batches))
    retainer.knob.fill_(start)
    if not costs[0] - OUT_OF_REACH <= share <= costs[1] + OUT_OF_REACH:
        raise UserError(
            f"budget={share:g} cannot be met: on training texts this pruning costs between {costs[0]:.3f} and "
            f"{costs[1]:.3f} of the unpruned FLOPs; ask for a budget between them, or choose another retainer or scorer"
        )


def meet_budget(model: PrunedClassifier, batches: Sequence[Batch], share: float) -> float:
    """Turn the retainer's knob until the model costs `share`; returns the share that was reached.

    From where the knob stands it goes in doubling steps towards the end that is needed, until the share is passed; what
    lies between is narrowed, in turns, where a straight line would meet the share and in the middle. Where the cost
    moves in jumps the nearest setting is taken.

    Raises:
        UserError: the budget lies outside what the retainer can reach.
    """
    assert model.pruning is not None
    retainer = model.pruning.retainer
    assert retainer.knob_ends is not None
    start, (cheapest, dearest) = float(retainer.knob), retainer.knob_ends
    reached: dict[float, float] = {}

    def is_too_cheap(setting: float) -> bool:
        retainer.knob.fill_(setting)
        reached[setting] = cost_share(model, batches)
        return reached[setting] < share

    def is_met() -> bool:
        return min(abs(cost - share) for cost in reached.values()) <= CLOSE_ENOUGH

    was_too_cheap = is_too_cheap(start)
    end = dearest if was_too_cheap else cheapest

    def setting_at(way: float) -> float:
        return start + way * (end - start)

    def is_before(way: float) -> bool:
        """Whether the share is not yet passed after this part of the way from the start to the end."""
        return is_too_cheap(setting_at(way)) == was_too_cheap

    near, far = 0.0, FIRST_STEP
    while not is_met() and is_before(far):
        if far == 1:
            if abs(reached[end] - share) > OUT_OF_REACH:
                raise UserError(
                    f"budget={share:g} cannot be met: on training texts this pruning costs "
                    f"{'at most' if was_too_cheap else 'at least'} {reached[end]:.3f} of the unpruned FLOPs; "
                    f"ask for another budget, or choose another retainer"
                )
            break
        near, far = far, min(1.0, 2 * far)
    for narrowing in range(NARROWINGS):
        if is_met():
            break
        at_near, at_far = reached[setting_at(near)], reached[setting_at(far)]
        part = 0.5 if narrowing % 2 or at_near == at_far else (share - at_near) / (at_far - at_near)
        between = near + part * (far - near)
        near, far = (between, far) if is_before(between) else (near, between)
    best = min(reached, key=lambda setting: abs(reached[setting] - share))
    retainer.knob.fill_(best)
    return reached[best]
