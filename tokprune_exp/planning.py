"""STTABT's plans for inference: the retainers' own mathematics, in compiled code where this machine has it.

The equations are in `pruning/retainers/backtracking.py` and `concrete.py`, whose `plan` is what happens without it.
"""

from copy import copy

import torch
from jaxtyping import Float
from torch import Tensor

from tokprune_exp.encoder.layout import Layout
from tokprune_exp.encoder.trace import Decision
from tokprune_exp.kernels.plan import Chosen, CompiledPlan, compiled_plan
from tokprune_exp.pruning.pruning import Pruning
from tokprune_exp.pruning.retainers import Backtracking, Concrete, Plan, Planner

Scores = list[Float[Tensor, "batch heads grid grid"]]


class FastBacktracking(Backtracking):
    """Algorithm 1 in compiled code."""

    def plan(self, scores: Scores, layout: Layout) -> Plan:
        """See `Backtracking.plan`."""
        fast, valid = fast_for(scores), layout.sequences.valid
        if fast is None or self.k_base == "dynamic":  # there k depends on the importances of a layer
            return super().plan(scores, layout)
        counts = self.count(valid.float(), valid)
        chosen = fast.most_attended(scores, valid, always_there(self, layout), self.propagation, counts)
        return super().plan(scores, layout) if chosen is None else as_plan(chosen)


class FastConcrete(Concrete):
    """Concrete masks, hard, in compiled code."""

    def plan(self, scores: Scores, layout: Layout) -> Plan:
        """See `Concrete.plan`."""
        fast, valid = fast_for(scores), layout.sequences.valid
        if fast is None or self.is_relaxed:
            return super().plan(scores, layout)
        logits = self.theta + self.knob.to(self.theta.dtype)
        always = always_there(self, layout)
        chosen = fast.concrete(scores, valid, always, self.propagation, logits, self.floor)
        return super().plan(scores, layout) if chosen is None else as_plan(chosen)


FAST: dict[type[Planner], type[Planner]] = {Backtracking: FastBacktracking, Concrete: FastConcrete}


def with_fast_plan(pruning: Pruning) -> Pruning:
    """Return a pruning whose plan, if it makes one, is made in compiled code; all else is shared with it."""
    kind = FAST.get(type(pruning.retainer)) if isinstance(pruning.retainer, Planner) else None
    if kind is None:
        return pruning
    retainer = copy(pruning.retainer)
    retainer.__class__ = kind
    fast = copy(pruning)
    fast._modules = {**pruning._modules, "retainer": retainer}
    return fast


def fast_for(scores: Scores) -> CompiledPlan | None:
    """Return the compiled code if it can read these scores."""
    return compiled_plan() if scores[0].dtype == torch.float32 and scores[0].is_cpu else None


def always_there(retainer: Planner, layout: Layout) -> Tensor | None:
    """Return the tokens that are in every set, if there are such."""
    return layout.sequences.protected if retainer.keeps_separators else None


def as_plan(chosen: Chosen) -> Plan:
    """Put the compiled code's answer in the plan's form."""
    return Plan([Decision(importance, keep) for importance, keep in zip(*chosen, strict=True)])
