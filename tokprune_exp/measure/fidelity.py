"""How well a predicted saliency agrees with the attributions it was taught (AD-TP, Table 5)."""

from collections.abc import Iterable

import torch

from tokprune_exp.attribution import Attribution, normalise_over_sequence
from tokprune_exp.data.batch import Batch
from tokprune_exp.measure.metrics import spearman
from tokprune_exp.model import PrunedClassifier


def saliency_fidelity(model: PrunedClassifier, batches: Iterable[Batch], settings: Attribution) -> dict[str, float]:
    """Compare S with the model's own integrated gradients: mean Spearman ρ and mean squared error per example.

    Both are scaled to unit L2 norm over the prunable tokens; sequences with fewer than 3 of them have no rank order to
    speak of and are left out.
    """
    model = model.eval()
    correlations, errors = [], []
    for batch in batches:
        prunable = model.sequences(batch).prunable
        attribution = normalise_over_sequence(model.attribute(batch, settings).detach(), prunable)
        with torch.no_grad():
            trace = model(batch).trace
        (decision,) = trace.decisions  # it prunes at one layer
        saliency = normalise_over_sequence(decision.importance, prunable)
        for ours, theirs, tokens in zip(saliency, attribution, prunable, strict=True):
            if int(tokens.sum()) >= 3:
                correlations.append(spearman(ours[tokens], theirs[tokens]))
                errors.append(float((ours[tokens] - theirs[tokens]).square().mean()))
    count = max(1, len(errors))
    return {"spearman": sum(correlations) / count, "mse": sum(errors) / count, "examples": len(errors)}
