"""Every loss term against a plain loop written from its equation."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tokprune_exp.losses import (
    ADTPLoss,
    attribution_distance,
    budget_loss,
    calibrate_eta,
    joint_attribution,
    logit_distillation,
    mass_by_ratio,
    saliency_loss,
    smallest_sufficient_ratio,
    task_loss,
)

LENGTHS = [9, 4, 2, 1, 6]
TENTHS = torch.arange(1, 11) / 10


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def tokens_of(lengths: list[int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def prunable_of(lengths: list[int]) -> Tensor:
    prunable = tokens_of(lengths)
    prunable[:, 0] = False
    return prunable


def values(seed: int, lengths: list[int] = LENGTHS) -> Tensor:
    """Positive values, garbage behind the end of each sequence included."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(lengths), max(lengths), generator=generator, dtype=torch.float64) + 0.01


def test_the_task_loss_is_minus_the_log_probability_of_the_gold_class() -> None:
    logits, labels = torch.randn(6, 4) * 3, torch.tensor([0, 3, 1, 2, 3, 0])
    theirs = [-math.log(softmax(row)[label]) for row, label in zip(logits.tolist(), labels.tolist(), strict=True)]
    torch.testing.assert_close(task_loss(logits, labels), torch.tensor(theirs))


def test_the_task_loss_of_a_score_is_its_squared_error() -> None:
    logits, labels = torch.tensor([[1.5], [-2.0]]), torch.tensor([1.0, 0.5])
    assert task_loss(logits, labels).tolist() == [0.25, 6.25]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_logit_distillation_is_soft_cross_entropy_without_a_factor_of_temperature(temperature: float) -> None:
    student, teacher = torch.randn(5, 3) * 2, torch.randn(5, 3) * 2
    total = 0.0
    for ours, theirs in zip(student.tolist(), teacher.tolist(), strict=True):
        p = softmax([x / temperature for x in theirs])
        q = softmax([x / temperature for x in ours])
        total -= sum(one * math.log(other) for one, other in zip(p, q, strict=True))
    assert logit_distillation(student, teacher, temperature).item() == pytest.approx(total / 5, rel=1e-5)


def test_logit_distillation_of_scores_is_their_squared_error_over_temperature_squared() -> None:
    student, teacher = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[3.0], [2.5], [0.0]])
    theirs = sum((s - t) ** 2 for s, t in ((1.0, 3.0), (2.0, 2.5), (4.0, 0.0))) / 3 / 4
    assert logit_distillation(student, teacher, temperature=2.0).item() == pytest.approx(theirs)


def test_logit_distillation_has_no_gradient_where_student_and_teacher_agree() -> None:
    teacher = torch.randn(4, 3)
    student = teacher.clone().requires_grad_()
    logit_distillation(student, teacher, 2.0).backward()
    assert student.grad is not None and student.grad.abs().max() < 1e-7


def test_attribution_distance_is_the_mean_over_the_real_tokens_of_each_sequence() -> None:
    ours, theirs = values(0), values(1)
    total = 0.0
    for row, length in enumerate(LENGTHS):
        total += sum((ours[row, i] - theirs[row, i]).item() ** 2 for i in range(length)) / length
    result = attribution_distance(ours, theirs, tokens_of(LENGTHS))
    assert result.item() == pytest.approx(total / len(LENGTHS))


@pytest.mark.parametrize("kappa", [0.0, 0.3, 1.0])
def test_the_joint_attribution_moves_from_teacher_to_student_and_has_unit_norm(kappa: float) -> None:
    teacher, student = values(0), values(1).requires_grad_()
    ours = joint_attribution(teacher, student, kappa, prunable_of(LENGTHS))
    assert not ours.requires_grad
    for row, length in enumerate(LENGTHS):
        mixed = [((1 - kappa) * teacher[row, i] + kappa * student[row, i]).item() for i in range(1, length)]
        norm = math.sqrt(sum(x**2 for x in mixed))
        assert ours[row, 1:length].tolist() == pytest.approx([x / norm for x in mixed], rel=1e-6)
        assert ours[row, 0] == 0 and (ours[row, length:] == 0).all()


def test_the_joint_attribution_is_the_teachers_at_the_start_and_the_students_at_the_end() -> None:
    teacher, student, prunable = values(0), values(1), prunable_of(LENGTHS)
    same = partial(joint_attribution, tokens=prunable)
    torch.testing.assert_close(same(teacher, student, 0.0), same(teacher, values(7), 0.0))
    torch.testing.assert_close(same(teacher, student, 1.0), same(values(7), student, 1.0))


@pytest.mark.parametrize("listwise_weight", [0.0, 0.7])
def test_the_saliency_loss_equals_its_equation(listwise_weight: float) -> None:
    prunable = prunable_of(LENGTHS)
    saliency = values(2)
    target = joint_attribution(values(0), values(1), 0.5, prunable)
    total = 0.0
    for row, length in enumerate(LENGTHS):
        size = length - 1
        if size == 0:
            continue
        given_values, wanted = saliency[row, 1:length].tolist(), target[row, 1:length].tolist()
        norm = math.sqrt(sum(s**2 for s in given_values))
        unit = [s / norm for s in given_values]
        total += sum((s - a) ** 2 for s, a in zip(unit, wanted, strict=True)) / size
        p, q = (softmax([x * math.sqrt(size) for x in row]) for row in (wanted, unit))
        total += listwise_weight * sum(one * math.log(one / other) for one, other in zip(p, q, strict=True))
    ours = saliency_loss(saliency, target, prunable, listwise_weight)
    assert ours.item() == pytest.approx(total / len(LENGTHS), rel=1e-6)


def test_the_saliency_loss_is_zero_for_any_multiple_of_the_target() -> None:
    prunable = prunable_of(LENGTHS)
    target = joint_attribution(values(0), values(1), 0.5, prunable)
    assert saliency_loss(3.7 * target, target, prunable, 1.0).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("listwise_weight", [0.0, 1.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_the_saliency_loss_and_its_gradient_are_finite_even_with_nothing_to_prune_or_all_zero(
    scale: float, listwise_weight: float
) -> None:
    prunable = prunable_of(LENGTHS)
    saliency = (values(2) * scale).float().requires_grad_()
    loss = saliency_loss(saliency, torch.zeros(5, 9), prunable, listwise_weight)
    loss.backward()
    assert saliency.grad is not None and loss.isfinite() and saliency.grad.isfinite().all()
    assert (saliency.grad[~prunable] == 0).all()


def test_no_term_depends_on_padding() -> None:
    def wider(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 5), value=float(x.dtype != torch.bool) * 9)

    valid, prunable = tokens_of(LENGTHS), prunable_of(LENGTHS)
    target = joint_attribution(values(0), values(1), 0.5, prunable)
    terms = [
        lambda pad: attribution_distance(pad(values(0)), pad(values(1)), pad(valid)),
        lambda pad: saliency_loss(pad(values(2)), pad(target), pad(prunable), 1.0),
        lambda pad: mass_by_ratio(pad(values(0)), pad(prunable), TENTHS),
    ]
    for term in terms:
        torch.testing.assert_close(term(wider), term(lambda x: x))


@pytest.mark.parametrize("candidates", [5, 10, 20])
def test_the_mass_by_ratio_is_what_the_largest_tokens_hold(candidates: int) -> None:
    lengths = [*LENGTHS, 31, 52]
    prunable, attribution = prunable_of(lengths), values(0, lengths)
    ours = mass_by_ratio(attribution, prunable, torch.arange(1, candidates + 1) / candidates)
    for row, length in enumerate(lengths):
        ordered = sorted(attribution[row, 1:length].tolist(), reverse=True)
        for c in range(1, candidates + 1):
            kept = -(-c * len(ordered) // candidates)
            theirs = sum(ordered[:kept]) / sum(ordered) if ordered else 0.0
            assert ours[row, c - 1].item() == pytest.approx(theirs)
    assert (ours[torch.tensor(lengths) > 1, -1] == 1).all()


def test_a_sequence_without_attribution_or_without_prunable_tokens_keeps_everything() -> None:
    prunable = prunable_of([5, 1])
    mass = mass_by_ratio(torch.zeros(2, 5), prunable, TENTHS)
    assert mass.isfinite().all()
    assert smallest_sufficient_ratio(mass, 0.5).tolist() == [9, 9]


@settings(max_examples=50, deadline=None)
@given(
    increments=st.lists(st.floats(min_value=0, max_value=1, width=32), min_size=2, max_size=8),
    eta=st.floats(min_value=0, max_value=1, width=32),
)
def test_the_smallest_sufficient_ratio_equals_a_search_from_below(increments: list[float], eta: float) -> None:
    total = sum(increments) or 1.0
    mass = (torch.tensor(increments).cumsum(0) / total).clamp(max=1)[None]
    enough = [c for c, held in enumerate(mass[0].tolist()) if held >= eta]
    assert smallest_sufficient_ratio(mass, eta).item() == (enough[0] if enough else len(increments) - 1)


def random_masses(seed: int, examples: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 40, (examples,), generator=generator).tolist()
    attribution = torch.rand(examples, max(lengths), generator=generator) ** 3
    return mass_by_ratio(attribution, prunable_of(lengths), TENTHS)


@pytest.mark.parametrize("target", [0.15, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("examples", [3, 10, 500])
def test_the_calibrated_eta_brings_the_mean_ratio_as_near_to_its_target_as_any_eta_can(
    examples: int, target: float
) -> None:
    mass = random_masses(examples, examples)

    def error(eta: float) -> float:
        return abs(TENTHS[smallest_sufficient_ratio(mass, eta)].mean().item() - target)

    every = sorted({0.0, *mass.flatten().tolist()})  # the labels change at these values only
    best = min(error(eta) for eta in every)
    eta = calibrate_eta(mass, TENTHS, target)
    assert 0 <= eta <= 1
    assert error(eta) == pytest.approx(best, abs=1e-6)


def test_a_larger_target_never_gives_a_smaller_eta() -> None:
    mass = random_masses(0, 300)
    etas = [calibrate_eta(mass, TENTHS, target / 20) for target in range(2, 20)]
    assert etas == sorted(etas) and etas[0] < etas[-1]


def test_the_budget_loss_is_the_squared_distance_of_the_expected_ratio() -> None:
    logits = torch.randn(4, 10) * 2
    expected = sum(sum(q * (c + 1) / 10 for c, q in enumerate(softmax(row))) for row in logits.tolist()) / 4
    assert budget_loss(logits, TENTHS, 0.3).item() == pytest.approx((expected - 0.3) ** 2, rel=1e-5)


def test_descending_the_budget_loss_brings_the_expected_ratio_to_its_target() -> None:
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        budget_loss(logits, TENTHS, 0.3).backward()
        optimizer.step()
    assert (logits.softmax(-1) @ TENTHS).mean().item() == pytest.approx(0.3, abs=1e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"alpha": 1.1}, r"loss\.alpha=1\.1 must lie between 0 and 1"),
        ({"kappa_max": -0.1}, r"loss\.kappa_max=-0\.1 must lie between 0 and 1"),
        ({"beta": -1.0}, r"loss\.beta=-1\.0 must not be negative"),
        ({"gamma": -1.0}, r"loss\.gamma=-1\.0 must not be negative"),
        ({"budget_weight": -1.0}, r"loss\.budget_weight=-1\.0 must not be negative"),
        ({"listwise_weight": -1.0}, r"loss\.listwise_weight=-1\.0 must not be negative"),
        ({"temperature": 0.0}, r"loss\.temperature=0\.0 must be above 0"),
    ],
)
def test_a_weight_out_of_its_bounds_is_refused_by_its_key(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ADTPLoss(**wrong)
