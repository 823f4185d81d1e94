"""The tasks' own metrics, equal to scikit-learn's and scipy's, also for a model that collapsed to one answer."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor
from torchmetrics.functional.classification import binary_f1_score, multiclass_accuracy

ClassMetric = Callable[[Int[Tensor, " examples"], Int[Tensor, " examples"], int], float]
ScoreMetric = Callable[[Float[Tensor, " examples"], Float[Tensor, " examples"]], float]


def evaluate_metrics(
    names: Sequence[str],
    logits: Float[Tensor, "examples outputs"] | Float[Tensor, " examples"] | np.ndarray,
    labels: Num[Tensor, " examples"] | np.ndarray,
) -> dict[str, float]:
    """Every named metric of one evaluated split.

    Classification metrics read the class with the largest logit, regression metrics the one score per example
    (`examples` or `examples × 1`). Everything is a fraction or a correlation, nothing a percentage.

    Raises:
        ValueError: for an unknown metric, an empty split, outputs that do not fit the metric or the labels, and NaN.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"task.metrics has {', '.join(unknown)}; choose from {', '.join(METRICS)}")
    logits, labels = torch.as_tensor(logits).detach().cpu(), torch.as_tensor(labels).detach().cpu()
    if len(logits) != len(labels) or len(labels) == 0:
        raise ValueError(f"task.metrics need one output per label and at least one; got {len(logits)}, {len(labels)}")
    if logits.isnan().any():
        raise ValueError("task.metrics: the model's outputs hold NaN, so no metric of them means anything")
    return {
        name: (
            _evaluate_scores(SCORE_METRICS[name], name, logits, labels)
            if name in SCORE_METRICS
            else _evaluate_classes(CLASS_METRICS[name], name, logits, labels)
        )
        for name in names
    }


def accuracy(predicted: Int[Tensor, " examples"], labels: Int[Tensor, " examples"], classes: int) -> float:
    """Share of examples whose predicted class is the label (micro average)."""
    return multiclass_accuracy(predicted, labels, num_classes=classes, average="micro").item()


def f1(predicted: Int[Tensor, " examples"], labels: Int[Tensor, " examples"], classes: int) -> float:
    """F1 of class 1 against class 0; 0 where class 1 is neither predicted nor present.

    Raises:
        ValueError: for more than two classes.
    """
    if classes != 2:
        raise ValueError(f"task.metrics: f1 is defined for 2 classes, the task has {classes}")
    return binary_f1_score(predicted, labels).item()


def accuracy_f1(predicted: Int[Tensor, " examples"], labels: Int[Tensor, " examples"], classes: int) -> float:
    """Mean of accuracy and F1, which the literature reports for QQP and MRPC."""
    return (accuracy(predicted, labels, classes) + f1(predicted, labels, classes)) / 2


def matthews(predicted: Int[Tensor, " examples"], labels: Int[Tensor, " examples"], classes: int) -> float:
    """Matthews correlation of predicted and true classes; 0 where either is constant, as in scikit-learn.

    (c·s − Σ pₖtₖ) / √((s² − Σ pₖ²)(s² − Σ tₖ²)) with s examples, c of them right, pₖ predicted and tₖ true of class k
    (Gorodkin 2004). Ours and not torchmetrics', whose value for a constant prediction is not 0 (torchmetrics #3355).
    """
    examples, right = len(labels), (predicted == labels).sum().item()
    predictions_of, labels_of = (torch.bincount(one, minlength=classes).double() for one in (predicted, labels))
    covariance = right * examples - (predictions_of @ labels_of).item()
    product = (examples**2 - predictions_of @ predictions_of).item() * (examples**2 - labels_of @ labels_of).item()
    return covariance / product**0.5 if product > 0 else 0.0


def pearson(scores: Float[Tensor, " examples"], labels: Float[Tensor, " examples"]) -> float:
    """Pearson's correlation, in double precision; 0 where scores or labels are constant (scipy: NaN)."""
    if (scores == scores[0]).all() or (labels == labels[0]).all():
        return 0.0
    return torch.corrcoef(torch.stack([scores.double(), labels.double()]))[0, 1].item()


def spearman(scores: Float[Tensor, " examples"], labels: Float[Tensor, " examples"]) -> float:
    """Spearman's rank correlation, ties sharing their mean rank; 0 where scores or labels are constant (scipy: NaN).

    Ours and not torchmetrics', which adds 1e-6 to the denominator.
    """
    return pearson(_mean_ranks(scores), _mean_ranks(labels))


def pearson_spearman(scores: Float[Tensor, " examples"], labels: Float[Tensor, " examples"]) -> float:
    """Mean of Pearson's and Spearman's correlation, which the literature reports for STS-B."""
    return (pearson(scores, labels) + spearman(scores, labels)) / 2


CLASS_METRICS: dict[str, ClassMetric] = {
    "accuracy": accuracy,
    "f1": f1,
    "accuracy_f1": accuracy_f1,
    "matthews": matthews,
}
SCORE_METRICS: dict[str, ScoreMetric] = {
    "pearson": pearson,
    "spearman": spearman,
    "pearson_spearman": pearson_spearman,
}
METRICS = (*CLASS_METRICS, *SCORE_METRICS)
"""Every name that `task.metrics` may hold."""


def _evaluate_classes(metric: ClassMetric, name: str, logits: Tensor, labels: Tensor) -> float:
    """The metric of the classes with the largest logit."""
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"task.metrics: {name} needs a logit per class, the model puts out {tuple(logits.shape)}")
    return metric(logits.argmax(1), labels.long(), logits.shape[1])


def _evaluate_scores(metric: ScoreMetric, name: str, scores: Tensor, labels: Tensor) -> float:
    """The metric of one score per example."""
    if scores.numel() != len(labels):
        raise ValueError(f"task.metrics: {name} needs one score per example, the model puts out {tuple(scores.shape)}")
    return metric(scores.flatten().double(), labels.double())


def _mean_ranks(values: Float[Tensor, " examples"]) -> Float[Tensor, " examples"]:
    """Rank of each value from 1 on; equal values share the mean of their ranks."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last_rank = counts.cumsum(0).double()
    return (last_rank - (counts - 1) / 2)[place]
