"""The metrics against scikit-learn and scipy, collapsed models included."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as theirs

from tokprune_exp.measure.metrics import METRICS, evaluate_metrics


def logits_for(predicted: np.ndarray, classes: int) -> np.ndarray:
    """Logits whose largest entry is the given class."""
    return np.eye(classes)[predicted] + np.random.default_rng(0).uniform(0, 0.5, (len(predicted), classes))


@pytest.mark.parametrize("seed", range(5))
def test_binary_metrics_equal_scikit_learn(seed: int) -> None:
    labels, predicted = np.random.default_rng(seed).integers(0, 2, (2, 57))
    ours = evaluate_metrics(["accuracy", "f1", "matthews", "accuracy_f1"], logits_for(predicted, 2), labels)
    accuracy, f1 = theirs.accuracy_score(labels, predicted), theirs.f1_score(labels, predicted)
    assert ours == pytest.approx(
        {
            "accuracy": accuracy,
            "f1": f1,
            "matthews": theirs.matthews_corrcoef(labels, predicted),
            "accuracy_f1": (accuracy + f1) / 2,
        },
        abs=1e-6,
    )


@pytest.mark.parametrize("classes", [3, 20])
def test_metrics_of_many_classes_equal_scikit_learn_even_where_a_class_never_occurs(classes: int) -> None:
    labels, predicted = np.random.default_rng(0).integers(0, classes - 1, (2, 301))
    ours = evaluate_metrics(["accuracy", "matthews"], logits_for(predicted, classes), labels)
    assert ours["accuracy"] == pytest.approx(theirs.accuracy_score(labels, predicted))
    assert ours["matthews"] == pytest.approx(theirs.matthews_corrcoef(labels, predicted))


@pytest.mark.parametrize("constant", [0, 1])
def test_a_collapsed_classifier_scores_zero_on_a_cola_shaped_split(constant: int) -> None:
    labels = np.array([1] * 721 + [0] * 322)
    predicted = np.full(1043, constant)
    ours = evaluate_metrics(["matthews", "f1"], logits_for(predicted, 2), labels)
    assert ours["matthews"] == theirs.matthews_corrcoef(labels, predicted) == 0
    assert ours["f1"] == pytest.approx(theirs.f1_score(labels, predicted, zero_division=0))


def test_labels_of_a_single_class_give_a_matthews_correlation_of_zero() -> None:
    predicted, labels = np.array([0, 1, 1]), np.array([1, 1, 1])
    assert evaluate_metrics(["matthews"], logits_for(predicted, 2), labels)["matthews"] == 0


@pytest.mark.parametrize("shape", [(200,), (200, 1)])
def test_correlations_equal_scipy_ties_included(shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 26, 200) / 5
    scores = np.round(labels + generator.normal(size=200), 1)
    ours = evaluate_metrics(["pearson", "spearman", "pearson_spearman"], scores.reshape(shape), labels)
    pearson, spearman = stats.pearsonr(scores, labels).statistic, stats.spearmanr(scores, labels).statistic
    expected = {"pearson": pearson, "spearman": spearman, "pearson_spearman": (pearson + spearman) / 2}
    assert ours == pytest.approx(expected, abs=1e-12)


def test_correlations_of_a_nearly_constant_score_still_equal_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(50, generator=generator)
    scores = 3 + 1e-5 * torch.rand(50, generator=generator)
    ours = evaluate_metrics(["pearson"], scores, labels)["pearson"]
    assert ours == pytest.approx(stats.pearsonr(scores.double(), labels.double()).statistic, abs=1e-9)


def test_correlations_of_a_constant_score_are_zero_without_a_warning() -> None:
    ours = evaluate_metrics(["pearson", "spearman"], torch.full((9, 1), 2.5), torch.arange(9.0))
    assert ours == {"pearson": 0.0, "spearman": 0.0}


def test_tensors_on_the_autograd_tape_and_arrays_give_the_same_numbers() -> None:
    logits, labels = torch.randn(30, 3, requires_grad=True), torch.randint(0, 3, (30,))
    ours = evaluate_metrics(["accuracy"], logits, labels)
    assert ours == evaluate_metrics(["accuracy"], logits.detach().numpy(), labels.numpy())


@pytest.mark.parametrize(
    ("names", "logits", "labels", "says"),
    [
        (["accuracy", "mcc"], torch.zeros(2, 2), [0, 1], rf"task\.metrics has mcc; choose from {', '.join(METRICS)}"),
        (["f1"], torch.zeros(2, 3), [0, 1], "f1 is defined for 2 classes, the task has 3"),
        (["accuracy"], torch.zeros(2, 1), [0, 1], "accuracy needs a logit per class"),
        (["pearson"], torch.zeros(2, 2), [0.0, 1.0], "pearson needs one score per example"),
        (["accuracy"], torch.zeros(3, 2), [0, 1], "one output per label"),
        (["accuracy"], torch.zeros(0, 2), [], "at least one"),
        (["accuracy"], torch.full((2, 2), torch.nan), [0, 1], "NaN"),
    ],
)
def test_what_has_no_meaning_is_refused_with_a_sentence(
    names: list[str], logits: torch.Tensor, labels: list[float], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        evaluate_metrics(names, logits.numpy(), np.array(labels))
