"""Where on its curve a model is timed: at its own operating point, and where its FLOPs are reduced as was asked."""

from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import dataclass

import torch

from tokprune_exp.data.batch import Batch
from tokprune_exp.errors import UserError
from tokprune_exp.measure.flops import FlopsReport
from tokprune_exp.methods.budget import cost_share, meet_budget
from tokprune_exp.model import PrunedClassifier


@dataclass(frozen=True)
class Point:
    """A setting of the retainer's knob; `asked` is the reduction that it was searched for, None at the model's own."""

    knob: float | None
    asked: float | None = None

    @property
    def name(self) -> str:
        """What tables and files call it."""
        return "own" if self.asked is None else f"{self.asked:g}x"

    def of(self, model: PrunedClassifier) -> PrunedClassifier:
        """Return the model at this point: its weights are shared, its pruning is a copy."""
        moved = with_own_pruning(model)
        if self.knob is not None and moved.pruning is not None:
            moved.pruning.retainer.knob.fill_(self.knob)
        return moved


def with_own_pruning(model: PrunedClassifier) -> PrunedClassifier:
    """Return the model with a copy of its pruning and everything else shared."""
    moved = copy(model)
    moved._modules = {**model._modules, "pruning": deepcopy(model.pruning)}
    return moved


def operating_points(
    model: PrunedClassifier, batches: Sequence[Batch], reductions: Sequence[float]
) -> tuple[list[Point], list[str]]:
    """Find the knob for each reduction of the FLOPs on these batches; return the points and what is left out, and why.

    A model that prunes nothing has no point.
    """
    if model.pruning is None:
        return [], ["It prunes nothing, so it is timed dense only."]
    points, notes = [Point(None)], []
    ends = model.pruning.retainer.knob_ends
    if reductions and ends is None:
        name = type(model.pruning.retainer).__name__
        return points, [f"--reductions: {name} has no knob to turn, so only its own point is timed."]
    for asked in reductions:
        moved = with_own_pruning(model)
        assert moved.pruning is not None and ends is not None
        try:
            meet_budget(moved, batches, 1 / asked)
            points.append(Point(float(moved.pruning.retainer.knob), asked))
        except UserError:
            reach = []
            for end in ends:
                moved.pruning.retainer.knob.fill_(end)
                reach.append(1 / cost_share(moved, batches))
            notes.append(f"--reductions {asked:g}: out of reach on these texts ({reach[1]:.2f}× to {reach[0]:.2f}×).")
    return points, notes


@torch.inference_mode()
def flops_reduction(model: PrunedClassifier, batches: Sequence[Batch]) -> float:
    """Divide the FLOPs of the unpruned encoder by those of the pruned one and its pruner, at unpadded lengths."""
    report = FlopsReport(model.encoder.shape.dim, model.encoder.shape.ff_dim)
    for batch in batches:
        trace = model(batch, "gathered").trace
        report.update(trace, 0 if model.pruning is None else model.pruning.macs(trace))
    return report.summary(published_length=1)["reduction_unpadded"]
