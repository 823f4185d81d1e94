"""Everything that is measured when training is over, as fields of result.json."""

from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tokprune_exp.attribution import Attribution
from tokprune_exp.data.batch import Batch
from tokprune_exp.data.module import TaskData
from tokprune_exp.data.tokenise import EncodedSplit
from tokprune_exp.encoder.encoder import PruningRule
from tokprune_exp.measure.evaluation import Evaluation, check_flops, evaluate
from tokprune_exp.measure.fidelity import saliency_fidelity
from tokprune_exp.measure.latency import compare_latency, length_sorted_chunks
from tokprune_exp.methods.module import PruningModule
from tokprune_exp.methods.student import StudentModule
from tokprune_exp.model import PrunedClassifier
from tokprune_exp.pruning.retainers import Concrete, ManualThreshold, RatioRetainer
from tokprune_exp.pruning.scorers import AttentionSource, TokenSaliency


@runtime_checkable
class MeasureSettings(Protocol):
    """What is read of the configuration's node `measure`."""

    latency_batch_sizes: list[int]
    latency_examples: int
    latency_rounds: int
    fvcore_examples: int
    attribution_examples: int


def measure(
    method: PruningModule,
    data: TaskData,
    settings: MeasureSettings,
    device: str = "cpu",
    attribution: Attribution | None = None,
) -> dict[str, Any]:
    """Evaluate the dense and the pruned model on the reported split, count, check the count, and time both.

    `by_length` holds the pruned model against the dense one, that is the teacher, or without one the unpruned model.
    """
    model, split = method.model.eval(), data.evaluation

    def assess(one: PrunedClassifier, prune: bool) -> Evaluation:
        task = data.task
        return evaluate(one, data.evaluation_batches(), task.metrics, task.published_length, prune, device)

    metrics, by_length, result = {}, {}, assess(model, prune=True)
    flops = dict(result.flops)
    if method.dense is not None:
        dense = assess(method.dense, prune=False)
        metrics["dense"], flops["gflops_teacher"] = dense.metrics, dense.flops["gflops_dense"]
        by_length["dense"] = dense.by_length
    if model.pruning is None:
        metrics["dense"], by_length["dense"] = result.metrics, result.by_length
    else:
        unpruned = assess(model, prune=False)
        metrics |= {"unpruned": unpruned.metrics, "pruned": result.metrics}
        by_length = {"dense": unpruned.by_length, **by_length, "pruned": result.by_length}

    few = torch.arange(min(settings.fvcore_examples, len(split)))
    alone_and_together = [split.collate([int(one)]) for one in few] + [split.collate(few)]
    flops["fvcore_forwards_equal"] = check_flops(model, alone_and_together)
    fields: dict[str, Any] = {"metrics": metrics, "by_length": by_length, "flops": flops}

    if result.logits.shape[1] > 1:
        fields["commonest_answer"] = commonest_answer(result.logits)
    if model.pruning is not None:
        fields["latency"] = latency(model.to(device), split, settings, device)
        if isinstance(model.pruning.scorer, TokenSaliency) and attribution is not None:
            examples = [
                split.collate(rows).to(device) for rows in sample(split, settings.attribution_examples).split(32)
            ]
            fields["saliency"] = saliency_fidelity(model, examples, attribution)
        if isinstance(model.pruning.retainer, RatioRetainer):
            flops["ratio_asked"] = method.findings.get("ratio_asked", model.pruning.retainer.ratio)
        if isinstance(model.pruning.retainer, ManualThreshold):
            flops["thresholds_per_layer"] = model.pruning.retainer.thresholds.tolist()
        if isinstance(model.pruning.retainer, Concrete):
            flops["kept_probability_per_layer"] = model.pruning.retainer.kept_probabilities.tolist()
        flops["share_unpadded"] = 1 / flops["reduction_unpadded"]
        if isinstance(method, StudentModule):
            flops["share_asked"] = method.budget
    return fields


def commonest_answer(logits: Float[Tensor, "examples classes"]) -> float:
    """Compute the share of the texts that got the label which was answered most often."""
    return float(logits.argmax(1).bincount().max() / len(logits))


def sample(split: EncodedSplit, examples: int) -> Tensor:
    """Draw rows, always the same ones; files may be sorted by label, so the first rows would be of one class."""
    return torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:examples]


def latency(
    model: PrunedClassifier, split: EncodedSplit, settings: MeasureSettings, device: str
) -> list[dict[str, Any]]:
    """Time the pruned against the unpruned model, both as they would be served, on the same batches of real texts.

    Where there is a plan, making it is timed too, as it is served: STTABT's overhead by the clock.
    """
    rows = sample(split, settings.latency_examples)
    lengths = split.lengths[rows].tolist()
    batches = {
        size: [split.collate(rows[chunk]).to(device) for chunk in length_sorted_chunks(lengths, size)]
        for size in settings.latency_batch_sizes
        if size <= len(rows)
    }
    served = model.for_inference()
    pruned = partial(served, execution="gathered")
    plan = partial(make_plan, served) if plans_ahead(model) else None
    return compare_latency(pruned, partial(pruned, prune=False), batches, settings.latency_rounds, plan=plan)


def plans_ahead(model: PrunedClassifier) -> bool:
    """Whether the model decides for all layers before the first one, from an attention of its own (STTABT)."""
    return model.pruning is not None and isinstance(model.pruning.scorer, AttentionSource)


def make_plan(model: PrunedClassifier, batch: Batch) -> PruningRule:
    """Do what a planner does before the first layer, and no more: embed, approximate the attention, plan."""
    assert model.pruning is not None
    return model.pruning.rule(model.encoder, *model.start(batch, "gathered"))
