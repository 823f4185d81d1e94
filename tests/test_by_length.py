"""Evaluation in four parts by length: against pandas and plain loops, down to parts in which a metric means nothing."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn import metrics as theirs
from torch import Tensor

from tokprune_exp.data.batches import BatchLoader, sorted_batches
from tokprune_exp.data.module import TaskData
from tokprune_exp.data.task import Task
from tokprune_exp.encoder.trace import LayerTrace, PruningTrace
from tokprune_exp.measure.evaluation import Evaluation, evaluate, metrics_of_part, quartiles
from tokprune_exp.measure.flops import FlopsReport
from tokprune_exp.measure.report import measure
from tokprune_exp.methods.finetune import Finetune
from tokprune_exp.methods.manual_topk import ManualTopK
from tokprune_exp.model import PrunedClassifier
from tokprune_exp.pruning.retainers import TopKSchedule
from tokprune_exp.pruning.scorers import AttentionMass

Build = Callable[..., Any]
SIZES = {"layers": 2, "dim": 32, "heads": 4}
LENGTHS = {
    "all different": list(range(3, 20)),
    "many alike": [5] * 10 + [6] * 3 + [9, 40],
    "all alike": [7] * 9,
    "two": [4, 8],
    "one": [6],
    "long tail": [2, 2, 3, 3, 3, 4, 120, 5, 5, 60, 4, 3],
    "random": np.random.default_rng(0).integers(2, 60, 203).tolist(),
}


def report_of(lengths: list[int], order: Tensor) -> FlopsReport:
    """A report of one layer that keeps half of every text, updated in this order."""
    report = FlopsReport(dim=8, ff_dim=32)
    for rows in order.split(7):
        counts = torch.tensor(lengths)[rows, None]
        before, after = torch.arange(max(lengths)) < counts, torch.arange(max(lengths)) < (counts + 1) // 2
        report.update(PruningTrace(before, [LayerTrace(keys=before, queries=before, outputs=after)]), index=rows)
    return report


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_the_parts_are_those_of_pandas_and_their_figures_those_of_a_plain_loop(lengths: list[int]) -> None:
    generator = np.random.default_rng(1)
    labels, predicted = generator.integers(0, 3, (2, len(lengths)))
    order = torch.from_numpy(generator.permutation(len(lengths)))
    logits = torch.eye(3)[torch.from_numpy(predicted)]
    ours = quartiles(["accuracy"], logits, torch.from_numpy(labels), report_of(lengths, order), 128)

    table = pd.DataFrame({"length": lengths, "right": labels == predicted})
    table["executed"] = [cost(length, (length + 1) // 2) for length in lengths]
    table["dense"] = [cost(length, length) for length in lengths]
    first, second, third = table["length"].quantile([0.25, 0.5, 0.75])
    table["part"] = [(length > first) + (length > second) + (length > third) for length in lengths]
    expected = [
        {
            "shortest": part["length"].min(),
            "longest": part["length"].max(),
            "examples": len(part),
            "metrics": {"accuracy": pytest.approx(part["right"].mean())},
            "gflops_per_example": pytest.approx(2e-9 * part["executed"].mean()),
            "reduction_unpadded": pytest.approx(part["dense"].sum() / part["executed"].sum()),
        }
        for _, part in table.groupby("part")
    ]
    assert ours == expected
    assert sum(row["examples"] for row in ours) == len(lengths)
    if len({min(lengths), first, second, third, max(lengths)}) == 5:
        by_pandas = pd.qcut(table["length"], 4, labels=False)
        assert [row["examples"] for row in ours] == by_pandas.value_counts().sort_index().tolist()


def test_a_part_of_an_evaluation_is_the_evaluation_of_that_part(
    tiny_task: Task, data_settings: Build, random_classifier: Build
) -> None:
    split = TaskData(tiny_task, data_settings()).evaluation
    model = random_classifier(AttentionMass, TopKSchedule, outputs=2, **SIZES)
    names = ["accuracy", "f1", "matthews"]

    def assess(rows: Tensor, size: int = 7) -> Evaluation:
        batches = [rows[batch] for batch in sorted_batches(split.lengths[rows], size)]
        return evaluate(model, BatchLoader(split, batches), names, 64)

    whole = assess(torch.arange(len(split)))
    edges = np.quantile(split.lengths.numpy(), [0.25, 0.5, 0.75])
    part_of = torch.from_numpy(np.searchsorted(edges, split.lengths.numpy(), side="left"))
    assert len(whole.by_length) == len(part_of.unique()) == 4
    for number, row in enumerate(whole.by_length):
        rows = (part_of == number).nonzero().flatten()
        alone = assess(rows, size=1)
        labels, predicted = split.labels[rows].numpy(), alone.logits.argmax(1).numpy()
        assert len(set(labels)) == 2
        assert row["metrics"] == pytest.approx(
            {
                "accuracy": theirs.accuracy_score(labels, predicted),
                "f1": theirs.f1_score(labels, predicted, zero_division=0),
                "matthews": theirs.matthews_corrcoef(labels, predicted),
            }
        )
        assert row["gflops_per_example"] == pytest.approx(alone.flops["gflops_per_example"], rel=1e-12)
        assert row["reduction_unpadded"] == pytest.approx(alone.flops["reduction_unpadded"], rel=1e-12)
        assert (row["shortest"], row["longest"]) == (split.lengths[rows].min(), split.lengths[rows].max())
    mean = sum(row["examples"] * row["gflops_per_example"] for row in whole.by_length) / len(split)
    assert mean == pytest.approx(whole.flops["gflops_per_example"])


# Metrics that mean nothing on a part


def test_a_part_with_one_label_has_an_accuracy_and_nothing_else() -> None:
    names, logits = ["accuracy", "f1", "accuracy_f1", "matthews"], torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    nothing = {"f1": None, "accuracy_f1": None, "matthews": None}
    for label in (0, 1):
        assert metrics_of_part(names, logits, torch.tensor([label, label])) == {"accuracy": 0.5, **nothing}
    assert metrics_of_part(names, logits[:1], torch.tensor([1])) == {"accuracy": 1.0, **nothing}


def test_a_part_with_equal_scores_has_no_correlation() -> None:
    names, scores = ["pearson", "spearman", "pearson_spearman"], torch.tensor([[0.5], [2.0], [1.0]])
    assert metrics_of_part(names, scores, torch.full((3,), 2.5)) == dict.fromkeys(names)
    assert metrics_of_part(names, scores[:1], torch.tensor([2.5])) == dict.fromkeys(names)
    labels = torch.tensor([1.0, 2.0, 4.0])
    ours = metrics_of_part(names, scores, labels)
    assert ours["spearman"] == pytest.approx(stats.spearmanr(scores.flatten(), labels).statistic)


def test_a_model_that_collapsed_scores_zero_on_a_part_as_on_the_whole() -> None:
    logits, labels = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([0, 1, 0, 1])
    assert metrics_of_part(["matthews", "f1"], logits, labels) == {"matthews": 0.0, "f1": 0.0}
    assert metrics_of_part(["spearman"], torch.ones(4, 1), labels.float()) == {"spearman": 0.0}


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews"])
def test_parts_of_a_single_example_each_do_not_stop_an_evaluation(metric: str) -> None:
    report = report_of([3, 5, 8, 13], torch.arange(4))
    rows = quartiles([metric], torch.eye(2)[[0, 1, 0, 1]], torch.tensor([0, 1, 1, 0]), report, 64)
    values = [1.0, 1.0, 0.0, 0.0] if metric == "accuracy" else [None] * 4
    assert [row["metrics"] for row in rows] == [{metric: value} for value in values]


# What a run reports


FEW = SimpleNamespace(
    latency_batch_sizes=[1], latency_examples=2, latency_rounds=1, fvcore_examples=1, attribution_examples=1
)


@pytest.fixture
def models(random_classifier: Build) -> tuple[PrunedClassifier, PrunedClassifier]:
    """A model that prunes, and a deeper one that does not."""
    dense = random_classifier(outputs=2, **{**SIZES, "layers": 4})
    return random_classifier(AttentionMass, TopKSchedule, outputs=2, **SIZES), dense


@pytest.mark.parametrize("has_teacher", [True, False])
def test_the_pruned_model_stands_beside_the_teacher_or_without_one_beside_itself_unpruned(
    has_teacher: bool, models: tuple[PrunedClassifier, PrunedClassifier], tiny_task: Task, data_settings: Build
) -> None:
    data, (model, dense) = TaskData(tiny_task, data_settings()), models
    teacher = Finetune(dense, ["accuracy"], torch.optim.AdamW) if has_teacher else None
    method = ManualTopK(model, ["accuracy"], torch.optim.AdamW, teacher, teacher_is_trained=True)
    fields = measure(method, data, FEW)
    assert set(fields["by_length"]) == {"dense", "pruned"}
    reference = dense if has_teacher else model
    unpruned = evaluate(reference, data.evaluation_batches(), ["accuracy"], 64, prune=False)
    assert fields["by_length"]["dense"] == unpruned.by_length
    assert all(row["reduction_unpadded"] == 1 for row in fields["by_length"]["dense"])
    assert all(row["reduction_unpadded"] > 1 for row in fields["by_length"]["pruned"])
    for variant, rows in fields["by_length"].items():
        scores = fields["metrics"]["unpruned" if variant == "dense" and not has_teacher else variant]
        mean = sum(row["examples"] * row["metrics"]["accuracy"] for row in rows) / len(data.evaluation)
        assert mean == pytest.approx(scores["accuracy"])


def test_a_method_that_prunes_nothing_reports_the_dense_model_alone(
    models: tuple[PrunedClassifier, PrunedClassifier], tiny_task: Task, data_settings: Build
) -> None:
    data = TaskData(tiny_task, data_settings())
    fields = measure(Finetune(models[1], ["accuracy"], torch.optim.AdamW), data, FEW)
    assert set(fields["by_length"]) == {"dense"}
    assert len(fields["by_length"]["dense"]) == 4
    answers = evaluate(models[1], data.evaluation_batches(), ["accuracy"], 64).logits.argmax(1).tolist()
    assert fields["commonest_answer"] == pytest.approx(max(map(answers.count, answers)) / len(answers))


def cost(before: int, after: int, dim: int = 8, ff_dim: int = 32) -> int:
    """Multiply-adds of a layer whose K = Q, spelled out independently."""
    return 3 * dim**2 * before + 2 * dim * before**2 + dim**2 * after + 2 * dim * ff_dim * after
