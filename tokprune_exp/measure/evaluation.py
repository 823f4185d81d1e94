"""One pass over the reported split, gathered: predictions, their metrics, and the cost of every example."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokprune_exp.data.batch import Batch
from tokprune_exp.measure.flops import FlopsReport, check_against_fvcore, count_with_fvcore, encoder_macs
from tokprune_exp.measure.metrics import evaluate_metrics
from tokprune_exp.model import PrunedClassifier


@dataclass
class Evaluation:
    """Predictions on a split in the order of `index`, their metrics, and the FLOPs figures of `FlopsReport.summary`.

    With an adaptive retainer `flops["ratio_shares"]` is the share of the examples that got each candidate ratio: all in
    one means that nothing was adapted.
    """

    logits: Float[Tensor, "examples outputs"]
    labels: Int[Tensor, " examples"] | Float[Tensor, " examples"]
    metrics: dict[str, float]
    flops: dict[str, Any]


def evaluate(
    model: PrunedClassifier,
    batches: Iterable[Batch],
    metrics: list[str],
    published_length: int,
    prune: bool = True,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Run the gathered model over all batches; every example is counted by the closed form on its trace."""
    model = model.to(device).eval()
    shape = model.encoder.shape
    report = FlopsReport(shape.dim, shape.ff_dim)
    logits, labels, index, ratios = [], [], [], []
    for batch in batches:
        with torch.inference_mode():  # only here: parameters that are moved inside would stay without gradients
            output = model(batch.to(device), "gathered", prune)
        pruner = model.pruning.macs(output.trace) if prune and model.pruning is not None else 0
        ratios += [one.ratio_logits.cpu() for one in output.trace.decisions if one.ratio_logits is not None]
        report.update(output.trace, pruner, model.head.macs(), batch.index)
        logits.append(output.logits.float().cpu())
        labels.append(batch.labels)
        index.append(batch.index)
    order = torch.cat(index).argsort()
    all_logits, all_labels = torch.cat(logits)[order], torch.cat(labels)[order]
    flops = report.summary(published_length)
    if ratios:
        chosen = torch.cat(ratios)
        flops["ratio_shares"] = (chosen.argmax(1).bincount(minlength=chosen.shape[1]) / len(chosen)).tolist()
    return Evaluation(all_logits, all_labels, evaluate_metrics(metrics, all_logits, all_labels), flops)


class GatheredForward(nn.Module):
    """The gathered model as a function of tensors, which is what tracers and counters take."""

    def __init__(self, model: PrunedClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        token_type_ids: Int[Tensor, "batch tokens"],
        valid: Tensor,
    ) -> Float[Tensor, "batch outputs"]:
        """Classify; labels play no part."""
        nothing = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
        return self.model(Batch(input_ids, token_type_ids, valid, nothing, nothing), "gathered").logits


@torch.no_grad()
def check_flops(model: PrunedClassifier, batches: Iterable[Batch]) -> int:
    """Count gathered forwards with fvcore and compare with the closed form, exactly; returns how many were compared.

    Raises:
        RuntimeError: the two differ.
    """
    model = model.cpu().eval()
    shape, compared = model.encoder.shape, 0
    for batch in batches:
        trace = model(batch, "gathered").trace
        closed_form = int(encoder_macs(trace, shape.dim, shape.ff_dim).sum()) + len(batch.labels) * model.head.macs()
        if model.pruning is not None:
            closed_form += int(model.pruning.macs(trace).sum())
        counted = count_with_fvcore(GatheredForward(model), (batch.input_ids, batch.token_type_ids, batch.valid))
        check_against_fvcore(counted, closed_form)
        compared += 1
    return compared
