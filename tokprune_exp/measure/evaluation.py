"""One pass over the reported split, gathered: predictions, their metrics, and the cost of every example."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from tokprune_exp.data.batch import Batch
from tokprune_exp.encoder.cost import encoder_macs
from tokprune_exp.measure.flops import FlopsReport, check_against_fvcore, count_with_fvcore
from tokprune_exp.measure.metrics import evaluate_metrics
from tokprune_exp.measure.sttabt_flops import (
    Choice,
    sttabt_approx_net_flops,
    sttabt_encoder_flops,
    sttabt_mask_update_flops,
)
from tokprune_exp.model import PrunedClassifier
from tokprune_exp.pruning.retainers import AdaptiveRatio, Backtracking, Concrete, Retainer, TopKSchedule
from tokprune_exp.pruning.scorers import ApproxAttention

STTABT_CHOICES: dict[type[Retainer], Choice] = {
    Concrete: "concrete",
    Backtracking: "backtracking",
    TopKSchedule: "manual_topk",
}
"""The retainers whose cost STTABT's Table 2 has."""


@dataclass
class Evaluation:
    """Predictions on a split in the order of `index`, their metrics, and the FLOPs figures of `FlopsReport.summary`.

    With an adaptive retainer `flops["ratio_shares"]` is the share of the examples that got each candidate ratio: all in
    one means that nothing was adapted. `by_length` says the same of short and of long texts, see `quartiles`.
    """

    logits: Float[Tensor, "examples outputs"]
    labels: Int[Tensor, " examples"] | Float[Tensor, " examples"]
    metrics: dict[str, float]
    flops: dict[str, Any]
    by_length: list[dict[str, Any]]


def evaluate(
    model: PrunedClassifier,
    batches: Iterable[Batch],
    metrics: list[str],
    published_length: int,
    prune: bool = True,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Run the model over all batches as it is served; every example is counted by the closed form on its trace."""
    model = model.to(device).eval()
    served = model.for_inference()
    shape = model.encoder.shape
    report = FlopsReport(shape.dim, shape.ff_dim)
    logits, labels, index, ratios = [], [], [], []
    for batch in batches:
        with torch.inference_mode():  # only here: parameters that are moved inside would stay without gradients
            output = served(batch.to(device), "gathered", prune)
        pruner = model.pruning.macs(output.trace) if prune and model.pruning is not None else 0
        ratios += [one.ratio_logits.cpu() for one in output.trace.decisions if one.ratio_logits is not None]
        report.update(output.trace, pruner, model.head.macs(), batch.index)
        logits.append(output.logits.float().cpu())
        labels.append(batch.labels)
        index.append(batch.index)
    order = torch.cat(index).argsort()
    all_logits, all_labels = torch.cat(logits)[order], torch.cat(labels)[order]
    flops = report.summary(published_length)
    if prune and model.pruning is not None and type(model.pruning.retainer) in STTABT_CHOICES:
        flops |= in_sttabts_counting(model, report)
    if ratios:
        assert model.pruning is not None and isinstance(model.pruning.retainer, AdaptiveRatio)
        scores = torch.cat(ratios)
        chosen = model.pruning.retainer.choice(scores.to(device)).cpu()
        flops["ratio_shares"] = (chosen.bincount(minlength=scores.shape[1]) / len(scores)).tolist()
    return Evaluation(
        all_logits,
        all_labels,
        evaluate_metrics(metrics, all_logits, all_labels),
        flops,
        quartiles(metrics, all_logits, all_labels, report, published_length),
    )


def in_sttabts_counting(model: PrunedClassifier, report: FlopsReport) -> dict[str, float]:
    """Mean GFLOPs per example as STTABT's code counts them (Table 2): elementwise operations too, 2 a multiply-add.

    Texts have their own lengths here; there they are padded. None of it is in any other figure.

    * `gflops_sttabt_encoder`: embeddings and layers, on the tokens that stay.
    * `gflops_sttabt_approx`: the whole ApproxNet, with its embeddings and all of its last layer; 0 without one.
    * `gflops_sttabt_mask_update`: the choice of the tokens.
    """
    assert model.pruning is not None
    shape, scorer, tokens = model.encoder.shape, model.pruning.scorer, report.token_sets
    sizes = {"dim": shape.dim, "ff_dim": shape.ff_dim, "heads": shape.heads}
    approx = torch.zeros(len(tokens))
    if isinstance(scorer, ApproxAttention):
        approx = sttabt_approx_net_flops(report.lengths, shape.layers, **sizes, factor=scorer.factor)
    choice = STTABT_CHOICES[type(model.pruning.retainer)]
    flops = {
        "encoder": sttabt_encoder_flops(tokens, **sizes),
        "approx": approx,
        "mask_update": sttabt_mask_update_flops(choice, tokens, report.lengths, shape.dim, shape.heads),
    }
    return {f"gflops_sttabt_{name}": 1e-9 * float(each.double().mean()) for name, each in flops.items()}


def quartiles(
    metrics: Sequence[str],
    logits: Float[Tensor, "examples outputs"],
    labels: Num[Tensor, " examples"],
    report: FlopsReport,
    published_length: int,
) -> list[dict[str, Any]]:
    """Metrics and cost of a split in four parts by length: up to Q1, up to Q2, up to Q3 and above (LTP, Table III).

    Q1, Q2 and Q3 are the quartiles of the token lengths, interpolated linearly. A text as long as a quartile stands in
    the part below it; a part without a text, as where many are of one length, is left out.
    """
    lengths = report.lengths.double()
    part_of = torch.bucketize(lengths, lengths.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)))
    rows = []
    for part in part_of.unique():
        inside = part_of == part
        costs = report.where(inside).summary(published_length)
        rows.append(
            {
                "shortest": int(lengths[inside].min()),
                "longest": int(lengths[inside].max()),
                "examples": int(inside.sum()),
                "metrics": metrics_of_part(metrics, logits[inside], labels[inside]),
                "gflops_per_example": costs["gflops_per_example"],
                "reduction_unpadded": costs["reduction_unpadded"],
            }
        )
    return rows


def metrics_of_part(
    names: Sequence[str], logits: Float[Tensor, "examples outputs"], labels: Num[Tensor, " examples"]
) -> dict[str, float | None]:
    """Every metric of some examples of a split; None for all but accuracy where they all have the same label.

    There a correlation is not defined, and an F1 says nothing of the class that is absent.
    """
    alike = bool((labels == labels[0]).all())
    values = evaluate_metrics(names, logits, labels)
    return {name: None if alike and name != "accuracy" else value for name, value in values.items()}


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
    ) -> tuple[Tensor, ...]:
        """Classify; labels play no part. Importances are put out too, else a tracer leaves out what made a plan."""
        nothing = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
        output = self.model(Batch(input_ids, token_type_ids, valid, nothing, nothing), "gathered")
        return output.logits, *(decision.importance for decision in output.trace.decisions)


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
