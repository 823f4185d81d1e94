"""The compiled plan of STTABT and the compiled scores it is made from, against the plain loops of `test_sttabt.py`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from test_kernels import COUNTS, compiled, starts_of  # noqa: F401  (a fixture)
from test_sttabt import (
    LENGTHS,
    TEXTS,
    attentions,
    backtracked_by_hand,
    concrete_by_hand,
    laid_out,
    places,
    planned,
    separators_of,
    uniforms,
)
from torch import Tensor

from tokprune_exp import planning
from tokprune_exp.encoder import fast
from tokprune_exp.encoder.layout import Padded, Sequences
from tokprune_exp.kernels.plan import CompiledPlan, compiled_plan
from tokprune_exp.planning import FastBacktracking, FastConcrete, with_fast_plan
from tokprune_exp.pruning.pruning import Pruning
from tokprune_exp.pruning.retainers import Backtracking, Concrete, StaticRatio
from tokprune_exp.pruning.scorers import AttentionMass, ExactAttention

HEADS = 3
THETAS = [-1.3, 0.2, -0.6]


@pytest.fixture(scope="module")
def planner(compiled: Any) -> CompiledPlan:  # noqa: F811
    built = compiled_plan()
    assert built is not None
    return built


def single(size: int, extra: int = 0, protects: bool = False) -> tuple[list[Tensor], Padded]:
    """The scores of `laid_out` in single precision, which the compiled code reads."""
    scores, layout = laid_out(size, extra, protects)
    return [one.float() for one in scores], layout


def never(*arguments: Any) -> Any:
    raise AssertionError("the plain plan was made")


# Scores and contexts


@pytest.mark.parametrize("head_dim", [1, 2, 8, 12, 16, 32])
def test_scores_and_contexts_are_those_of_each_text(planner: CompiledPlan, head_dim: int) -> None:
    width, dim = max(COUNTS) + 3, HEADS * head_dim
    rows = torch.randn(sum(COUNTS) + 5, 3 * dim, generator=torch.Generator().manual_seed(head_dim))
    query, key, value = rows.split(dim, dim=1)
    scores, context = planner.attend(query, key, value, starts_of(COUNTS), HEADS, width)
    alone, nothing = planner.attend(query, key, None, starts_of(COUNTS), HEADS, width)
    assert context is not None and context.shape == (sum(COUNTS), dim)
    assert nothing is None and torch.equal(alone, scores)
    start = 0
    for row, count in enumerate(COUNTS):
        q, k, v = (
            x[start : start + count].double().unflatten(1, (HEADS, -1)).transpose(0, 1) for x in (query, key, value)
        )
        expected = torch.einsum("hid,hjd->hij", q, k) / head_dim**0.5
        torch.testing.assert_close(scores[row, :, :count, :count].double(), expected, atol=1e-5, rtol=1e-5)
        absent = scores[row].clone()
        absent[:, :count, :count] = float("-inf")
        assert (absent == float("-inf")).all()
        weights = expected.exp() / expected.exp().sum(2, keepdim=True)
        mixed = torch.einsum("hij,hjd->ihd", weights, v).flatten(1)
        torch.testing.assert_close(context[start : start + count].double(), mixed, atol=1e-5, rtol=1e-5)
        start += count


def test_scores_far_apart_give_finite_contexts(planner: CompiledPlan) -> None:
    query = 60 * torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    scores, context = planner.attend(query, query, query, starts_of([40]), HEADS, 40)
    assert context is not None
    q = query.double().unflatten(1, (HEADS, -1)).transpose(0, 1)
    expected = ((q @ q.transpose(1, 2)) / 8**0.5).softmax(-1) @ q
    torch.testing.assert_close(context.double(), expected.transpose(0, 1).flatten(1), atol=1e-3, rtol=1e-4)
    assert scores.isfinite().all()


def test_scores_of_tokens_that_are_not_the_first_stand_where_the_tokens_do(
    planner: CompiledPlan, random_classifier: Callable[..., Any], ragged_batch: Callable[..., Any]
) -> None:
    """What an encoder attends to after tokens have left, and every layer's scores alone."""
    model = random_classifier()
    batch = ragged_batch(model, LENGTHS)
    served = model.for_inference()
    keep = (batch.input_ids % 3 > 0) | (torch.arange(batch.input_ids.shape[1]) == 0)
    with torch.no_grad():
        embeddings, layout = model.start(batch, "gathered")
        layout, gather = layout.keep(keep)
        assert not layout.are_first and model.start(batch, "gathered")[1].are_first
        hidden = gather(embeddings)
        ours = served.encoder(hidden, layout, wants_inner=True)
        grid = torch.zeros(*keep.shape, hidden.shape[1]).flatten(0, 1).index_copy(0, layout.rows, hidden)
        plain = Padded(layout.sequences, layout.alive)
        theirs = model.encoder(grid.view(*keep.shape, -1), plain, wants_inner=True)
        alone = [served.encoder.layers[0].scores(hidden, layout), served.encoder.attention_scores(hidden, layout)[0]]
    there = layout.alive[:, None, :, None].expand_as(theirs.scores[0])
    for one, two in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(one[there], two[there], atol=1e-4, rtol=1e-4)
    for one in alone:
        torch.testing.assert_close(one[there], theirs.scores[0][there], atol=1e-4, rtol=1e-4)


# Plans


@pytest.mark.parametrize("protects", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("percent", [5, 30, 100])
def test_compiled_back_tracking_equals_the_plain_loop(
    planner: CompiledPlan, percent: int, p: float, protects: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backtracking, "plan", never)
    retainer = FastBacktracking(8, 3, k=percent / 100, propagation=p, keeps_separators=protects)
    for size, extra in ((1, 0), (2, 3), (32, 3)):
        scores, layout = single(size, extra, protects)
        plan = retainer.plan(scores, layout)
        assert len(plan.decisions) == 4
        for row, n in enumerate(TEXTS[:size]):
            always = separators_of(row) if protects else frozenset()
            kept, importance = backtracked_by_hand(attentions(row), -(-percent * n // 100), p, always)
            assert [places(decision.keep[row]) for decision in plan.decisions] == [sorted(one) for one in kept]
            padding = [0.0] * (layout.alive.shape[1] - n)
            for decision, theirs in zip(plan.decisions, [*importance, [1.0] + [0.0] * (n - 1)], strict=True):
                assert decision.importance[row].tolist() == pytest.approx(theirs + padding, abs=1e-6)


@pytest.mark.parametrize("k_base", ["padded", "tokens"])
def test_the_other_bases_of_k_are_those_of_the_plain_plan(planner: CompiledPlan, k_base: Any) -> None:
    settings = {"k": 3.0 if k_base == "tokens" else 0.3, "k_base": k_base}
    scores, layout = single(32, 3)
    ours, theirs = (kind(8, 3, **settings).plan(scores, layout) for kind in (FastBacktracking, Backtracking))
    for one, two in zip(ours.decisions, theirs.decisions, strict=True):
        assert torch.equal(one.keep, two.keep)
        torch.testing.assert_close(one.importance, two.importance, atol=1e-6, rtol=0)


@pytest.mark.parametrize("protects", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shift", [-1.0, 0.0, 1.5])
def test_compiled_concrete_masks_equal_the_plain_loop(
    planner: CompiledPlan, shift: float, p: float, protects: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Concrete, "plan", never)
    retainer = FastConcrete(8, 3, propagation=p, floor=0.02, keeps_separators=protects)
    with torch.no_grad():
        retainer.theta.copy_(torch.tensor(THETAS))
    retainer.knob.fill_(shift)
    for size, extra in ((1, 0), (2, 3), (32, 3)):
        scores, layout = single(size, extra, protects)
        plan = retainer.plan(scores, layout)
        for row, n in enumerate(TEXTS[:size]):
            always = separators_of(row) if protects else frozenset()
            thetas = [theta + shift for theta in THETAS]
            masks, shares = concrete_by_hand(uniforms(row), thetas, p, floor=0.02, always=always)
            assert [places(one.keep[row]) for one in plan.decisions] == [
                [i for i, m in enumerate(mask) if m] for mask in masks
            ]
            padding = [0.0] * (layout.alive.shape[1] - n)
            for decision, theirs in zip(plan.decisions, [*shares, [1.0] + [0.0] * (n - 1)], strict=True):
                assert decision.importance[row].tolist() == pytest.approx(theirs + padding, abs=1e-5)


def test_equal_importances_go_to_the_earlier_token(planner: CompiledPlan) -> None:
    """Every token attends to all alike: the first ones are kept, and of standardised rows all or none."""
    layout = Padded.start(Sequences(torch.ones(1, 20, dtype=torch.bool), torch.zeros(1, 20, dtype=torch.bool)))
    scores = [torch.zeros(1, HEADS, 20, 20)] * 3
    plan = FastBacktracking(8, 3, k=0.35).plan(scores, layout)
    assert [places(one.keep[0]) for one in plan.decisions] == [list(range(7))] * 3 + [[0]]
    concrete = FastConcrete(8, 3).plan(scores, layout)
    for one, two in zip(concrete.decisions, Concrete(8, 3).plan(scores, layout).decisions, strict=True):
        assert torch.equal(one.keep, two.keep)


@pytest.mark.parametrize("kind", [FastBacktracking, FastConcrete])
def test_neither_the_threads_nor_other_texts_change_a_bit(planner: CompiledPlan, kind: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = [2 * torch.randn(6, 12, 90, 90, generator=generator) for _ in range(4)]
    valid = torch.arange(90) < torch.tensor([90, 3, 41, 90, 17, 64])[:, None]
    layout, retainer = Padded.start(Sequences(valid, valid)), kind(8, 4)
    plans, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            plans.append(retainer.plan(scores, layout).decisions)
    finally:
        torch.set_num_threads(before)
    alone = retainer.plan([one[3:4] for one in scores], Padded.start(Sequences(valid[3:4], valid[3:4])))
    for plan in plans[1:]:
        for one, two in zip(plan, plans[0], strict=True):
            assert torch.equal(one.keep, two.keep) and torch.equal(one.importance, two.importance)
    for one, two in zip(alone.decisions, plans[0], strict=True):
        assert torch.equal(one.importance[0], two.importance[3])


# Where it is used, and where it is not


@pytest.mark.parametrize(
    ("pair", "kind"), [("approx_backtracking", FastBacktracking), ("approx_concrete", FastConcrete)]
)
def test_a_served_model_plans_in_compiled_code_and_the_model_itself_does_not(
    pair: str,
    kind: type,
    planner: CompiledPlan,
    random_classifier: Callable[..., Any],
    ragged_batch: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = planned(random_classifier, pair)
    served, batch = model.for_inference(), ragged_batch(model, LENGTHS)
    assert type(served.pruning.retainer) is kind and type(model.pruning.retainer) is kind.__mro__[1]
    assert served.pruning.retainer.knob is model.pruning.retainer.knob
    with torch.no_grad():
        plain = model(batch)
        monkeypatch.setattr(kind.__mro__[1], "plan", never)
        monkeypatch.setattr(fast, "scores_on_grid", never)
        output = served(batch, "gathered")
    torch.testing.assert_close(output.logits, plain.logits, atol=1e-5, rtol=0)
    for one, two in zip(output.trace.layers, plain.trace.layers, strict=True):
        assert torch.equal(one.keys, two.keys) and torch.equal(one.outputs, two.outputs)


@pytest.mark.parametrize("pair", ["approx_backtracking", "approx_concrete"])
def test_without_compiled_plans_the_served_model_answers_the_same(
    pair: str,
    random_classifier: Callable[..., Any],
    ragged_batch: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = planned(random_classifier, pair)
    batch = ragged_batch(model, LENGTHS)
    for module in (planning, fast):
        monkeypatch.setattr(module, "compiled_plan", lambda: None)
    with torch.no_grad():
        ours = model.for_inference()(batch, "gathered").logits
        torch.testing.assert_close(ours, model(batch).logits, atol=1e-5, rtol=0)


def test_what_the_compiled_code_does_not_know_is_planned_plainly(planner: CompiledPlan) -> None:
    """k that depends on the importances, soft masks, double precision, and tokens that are not the first of a row."""
    scores, layout = single(32, 3)
    expected = Backtracking(8, 3, k=0.3, k_base="dynamic").plan(scores, layout).decisions
    ours = FastBacktracking(8, 3, k=0.3, k_base="dynamic").plan(scores, layout).decisions
    assert all(torch.equal(one.keep, two.keep) for one, two in zip(ours, expected, strict=True))
    retainer = FastConcrete(8, 3)
    with retainer.relaxed():
        assert all(one.soft is not None for one in retainer.plan(scores, layout).decisions)
    doubled = [one.double() for one in scores]
    assert retainer.plan(doubled, layout).decisions[0].importance.dtype == torch.float64
    late = Sequences(layout.alive.flip(1), layout.alive.flip(1))
    assert planner.concrete(scores, late.valid, None, 0.1, torch.zeros(3), 0.01) is None
    assert planner.most_attended(scores, late.valid, None, 0.1, torch.ones(32).long()) is None
    gap = torch.tensor([[True, False, True], [True, True, False]])
    few = [torch.randn(2, HEADS, 3, 3).masked_fill(~gap[:, None, None, :], float("-inf")) for _ in range(3)]
    layout = Padded.start(Sequences(gap, gap))
    for one, two in zip(
        FastBacktracking(8, 3, k=0.7).plan(few, layout).decisions,
        Backtracking(8, 3, k=0.7).plan(few, layout).decisions,
        strict=True,
    ):
        assert torch.equal(one.keep, two.keep)


def test_a_pruning_without_a_plan_is_left_alone() -> None:
    pruning = Pruning(AttentionMass(8), StaticRatio(8, 4))
    assert with_fast_plan(pruning) is pruning
    planned_one = Pruning(ExactAttention(8), Concrete(8, 4))
    ready = with_fast_plan(planned_one)
    assert ready is not planned_one and ready.scorer is planned_one.scorer
    assert type(planned_one.retainer) is Concrete and type(ready.retainer) is FastConcrete


def test_what_would_be_read_wrongly_is_refused(planner: CompiledPlan) -> None:
    rows, starts = torch.randn(6, 24), starts_of([2, 4])
    attend = partial(planner.attend, heads=HEADS, width=4)
    with pytest.raises(ValueError, match="rows of float32 with one stride"):
        attend(rows.double(), rows.double(), None, starts)
    with pytest.raises(ValueError, match="rows of float32 with one stride"):
        attend(rows, torch.randn(6, 48)[:, :24], None, starts)
    with pytest.raises(ValueError, match="starts in int32"):
        attend(rows, rows, None, starts.long())
    with pytest.raises(ValueError, match="starts in int32, and all rows that they name"):
        attend(rows[:5], rows, None, starts)
    valid, scores = torch.ones(2, 4, dtype=torch.bool), torch.randn(2, HEADS, 4, 4)
    with pytest.raises(ValueError, match="scores in float32, of one size"):
        planner.concrete([scores, scores.double()], valid, None, 0.1, torch.zeros(2), 0.01)
    with pytest.raises(ValueError, match="scores in float32, of one size"):
        planner.most_attended([scores.double()], valid, None, 0.1, torch.ones(2).long())
