"""Metrics before and after pruning, on the same texts: accuracy, and precision, recall and F1 of every class."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tokprune_exp.analysis.resampling import Bootstrap, interval, ratio
from tokprune_exp.measure.metrics import METRICS, SCORE_METRICS, evaluate_metrics


def report_rows(
    predicted: Int[np.ndarray, " examples"], labels: Int[np.ndarray, " examples"], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Make a row per class, one of the accuracy, and the means over the classes (macro, and weighted by support).

    precision = TP / predicted, recall = TP / support, F1 = 2·TP / (predicted + support), each 0 where it is 0/0.
    A macro mean is over the classes that are predicted or present.
    """
    classes = np.arange(len(names))
    right = np.array([((predicted == one) & (labels == one)).sum() for one in classes])
    guessed, support = (np.array([(some == one).sum() for one in classes]) for some in (predicted, labels))
    table = np.nan_to_num(
        np.stack([ratio(right, guessed), ratio(right, support), ratio(2 * right, guessed + support)], axis=1)
    )
    seen = (guessed + support) > 0
    means = {"macro": table[seen].mean(0), "weighted": (table * support[:, None]).sum(0) / support.sum()}
    rows = [_row(name, table[one], int(support[one])) for one, name in enumerate(names)]
    accuracy = float(right.sum() / len(labels))
    rows.append({**_row("accuracy", (None, None, None), len(labels)), "accuracy": accuracy})
    return rows + [_row(f"{how} mean", values, len(labels)) for how, values in means.items()]


def _row(name: str, values: Iterable[float | None], support: int) -> dict[str, Any]:
    precision, recall, f1 = values
    return {"class": name, "precision": precision, "recall": recall, "f1": f1, "support": support, "accuracy": None}


def score_rows(
    logits: dict[str, Float[Tensor, "examples outputs"]],
    labels: np.ndarray,
    names: Sequence[str],
    metrics: Sequence[str],
) -> list[dict[str, Any]]:
    """Make the rows of every pass, dense and pruned: the report, then the task's own metrics.

    In a regression there is no report.
    """
    rows: list[dict[str, Any]] = []
    for model, outputs in logits.items():
        if names:
            rows += [{"model": model, **row} for row in report_rows(outputs.argmax(1).numpy(), labels, names)]
        own = [name for name in metrics if name in (METRICS if names else SCORE_METRICS) and name != "accuracy"]
        answers = torch.as_tensor(labels)
        for name, value in evaluate_metrics(own, outputs, answers).items():
            nothing = dict.fromkeys(("precision", "recall", "f1"))
            rows.append({"model": model, "class": name, **nothing, "support": len(labels), "accuracy": value})
    return rows


def right_answers(logits: Float[Tensor, "examples classes"], labels: np.ndarray) -> Float[np.ndarray, " examples"]:
    """Return 1 for each example that is answered rightly, else 0."""
    return (logits.argmax(1).numpy() == labels).astype(float)


def difference_of_means(
    ours: Float[np.ndarray, " examples"], theirs: Float[np.ndarray, " examples"], replicates: int
) -> tuple[float, float, float]:
    """Compute the mean of ours − theirs over the same examples, and the ends of its interval."""
    difference = ours - theirs
    low, high = interval(Bootstrap(len(difference), replicates).sums(difference) / len(difference))
    return float(difference.mean()), float(low), float(high)
