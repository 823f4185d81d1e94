"""What a pruned model costs, and that a budget is met: at once by the knob, and all through a training."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from test_config import problems
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tokprune_exp.attribution import Attribution
from tokprune_exp.data.batch import Batch
from tokprune_exp.data.module import TaskData
from tokprune_exp.data.task import Task
from tokprune_exp.data.tokenise import EncodedSplit
from tokprune_exp.encoder.backbone import Backbone, RandomShape
from tokprune_exp.encoder.pretrained import random_encoder
from tokprune_exp.errors import UserError
from tokprune_exp.head import Head
from tokprune_exp.losses import ADTPLoss, LTPLoss
from tokprune_exp.methods.adtp import ADTP
from tokprune_exp.methods.budget import check_reach, cost_share, meet_budget
from tokprune_exp.methods.hard import HardPruning
from tokprune_exp.methods.ltp import LTP
from tokprune_exp.methods.student import CALIBRATIONS, StudentModule
from tokprune_exp.model import ModelCard, PrunedClassifier, load_model, save_model
from tokprune_exp.pruning.pruning import Pruning
from tokprune_exp.pruning.retainers import (
    AdaptiveRatio,
    LayerRetainer,
    LearnedThreshold,
    ManualThreshold,
    MinP,
    Nucleus,
    RandomRatio,
    RatioRetainer,
    StaticRatio,
    TopKSchedule,
)
from tokprune_exp.pruning.scorers import AttentionMass, TokenSaliency
from tokprune_exp.stages import run_stage
from tokprune_exp.tracking import quieten_lightning

DIM, LAYERS, FF = 32, 3, 128
SIZES = {"dim": DIM, "layers": LAYERS, "heads": 4}
LENGTHS = [23, 1, 2, 3, 40, 11, 5, 17, 30, 9, 14, 26, 35, 6, 20, 12]
SHARES = [0.3, 0.5, 0.7]

Build = Callable[..., Any]


def by_constant(dim: int) -> AttentionMass:
    return AttentionMass(dim, normalisation="constant")


small_saliency = partial(TokenSaliency, hidden_dim=8)
RETAINERS = {
    "static": (small_saliency, StaticRatio),
    "random": (small_saliency, RandomRatio),
    "adaptive": (small_saliency, AdaptiveRatio),
    "nucleus": (small_saliency, Nucleus),
    "min_p": (small_saliency, MinP),
    "static_after_attention": (by_constant, partial(StaticRatio, layer=0)),
    "manual_threshold": (by_constant, ManualThreshold),
    "learned_threshold": (by_constant, LearnedThreshold),
    "topk": (by_constant, TopKSchedule),
}


@pytest.fixture
def pruned(random_classifier: Build, ragged_batch: Build) -> Build:
    """Build a small classifier by the name of its retainer, and the batches on which its cost is measured."""

    def build(name: str, **changes: Any) -> tuple[PrunedClassifier, list[Batch]]:
        scorer, retainer = RETAINERS[name]
        model = random_classifier(scorer, partial(retainer, **changes), **SIZES)
        if name == "learned_threshold":
            with torch.no_grad():
                model.pruning.retainer.offset.copy_(torch.tensor([0.002, -0.001, 0.001]))
        return model, [ragged_batch(model, LENGTHS[:9]), ragged_batch(model, LENGTHS[9:], seeds=list(range(9, 16)))]

    return build


# The cost


@pytest.mark.parametrize("name", RETAINERS)
def test_the_share_is_the_sum_of_every_layers_products_over_that_of_the_unpruned_model(
    name: str, pruned: Build
) -> None:
    """2d²K + d²Q + 2dQK + d²O + 2·d·ff·O a layer, a text; scorer and retainer where they decide."""
    model, batches = pruned(name)
    executed = dense = 0
    with torch.no_grad():
        for batch in batches:
            trace = model(batch).trace
            for row, n in enumerate(batch.valid.sum(1).tolist()):
                for layer in trace.layers:
                    k, q, o = (int(getattr(layer, kind)[row].sum()) for kind in ("keys", "queries", "outputs"))
                    executed += 2 * DIM**2 * k + DIM**2 * q + 2 * DIM * q * k + DIM**2 * o + 2 * DIM * FF * o
                    dense += 4 * DIM**2 * n + 2 * DIM * n * n + 2 * DIM * FF * n
                if name in ("static", "random", "adaptive", "nucleus", "min_p"):
                    executed += n * (DIM * 8 + 8)
                if name == "adaptive":
                    executed += DIM * 10
    assert cost_share(model, batches) == executed / dense
    assert executed != dense


@pytest.mark.parametrize("name", RETAINERS)
def test_a_price_is_asked_without_computing_what_comes_after_the_last_choice(name: str, pruned: Build) -> None:
    model, batches = pruned(name)
    computed: list[int] = []
    for number, layer in enumerate(model.encoder.layers):
        layer.output.register_forward_hook(lambda *_, number=number: computed.append(number))
    with torch.no_grad():
        for batch in batches:
            whole, computed[:] = model(batch, "gathered").trace, []
            asked = model.choices(batch)
            prunes_once = name in ("static", "random", "adaptive", "nucleus", "min_p", "static_after_attention")
            assert computed == ([0] if prunes_once else [0, 1, 2])
            for kind in ("keys", "queries", "outputs"):
                assert torch.equal(asked.counts(kind), whole.counts(kind))


def test_measuring_the_cost_leaves_the_model_in_its_mode_and_is_not_touched_by_dropout(pruned: Build) -> None:
    model, batches = pruned("learned_threshold")
    cost = cost_share(model, batches)
    model.train()
    assert cost_share(model, batches) == cost and model.training
    assert model.pruning.retainer.training
    assert all(parameter.grad is None for parameter in model.parameters())


# The knob


@pytest.mark.parametrize("name", RETAINERS)
def test_every_retainer_meets_a_budget(name: str, pruned: Build) -> None:
    """Sixteen texts: a step of one text's ratio or of one token is far smaller than the tolerance."""
    model, batches = pruned(name)
    for share in SHARES:
        reached = meet_budget(model, batches, share)
        assert reached == cost_share(model, batches)
        assert reached == pytest.approx(share, abs=0.02)


WHERE_IT_MATTERS = {"topk": (0.0, 2.0), "manual_threshold": (2.0, -2.0)}
WHERE_IT_MATTERS["learned_threshold"] = WHERE_IT_MATTERS["manual_threshold"]


@pytest.mark.parametrize("name", RETAINERS)
def test_the_cost_never_falls_from_the_cheap_end_of_the_knob_to_the_dear_one(name: str, pruned: Build) -> None:
    model, batches = pruned(name)
    retainer = model.pruning.retainer
    first, last = WHERE_IT_MATTERS.get(name, retainer.knob_ends)
    costs = []
    for setting in (retainer.knob_ends[0], *torch.linspace(first, last, 33).tolist(), retainer.knob_ends[1]):
        retainer.knob.fill_(setting)
        costs.append(cost_share(model, batches))
    assert costs == sorted(costs)
    assert len(set(costs)) > (2 if name == "adaptive" else 10)  # ten candidates, few texts


@pytest.mark.parametrize("name", RETAINERS)
def test_at_its_dear_end_the_knob_keeps_every_token(name: str, pruned: Build) -> None:
    model, batches = pruned(name)
    model.pruning.retainer.knob.fill_(model.pruning.retainer.knob_ends[1])
    with torch.no_grad():
        assert all((model(batch).trace.retention == 1).all() for batch in batches)


@pytest.mark.parametrize(
    ("name", "changes", "share", "reach"),
    [
        ("manual_threshold", {"rise": "code"}, 0.3, r"at least 0\.\d{3}"),  # its first layer costs a third in any case
        ("static", {"layer": 1}, 0.2, r"at least 0\.\d{3}"),
        ("learned_threshold", {"rise": "code"}, 0.01, r"at least 0\.\d{3}"),
    ],
)
def test_a_budget_out_of_reach_is_answered_in_one_sentence(
    name: str, changes: dict[str, Any], share: float, reach: str, pruned: Build
) -> None:
    model, batches = pruned(name, **changes)
    message = (
        rf"^budget={share} cannot be met: on training texts this pruning costs {reach} of the unpruned FLOPs; "
        r"ask for another budget, or choose another retainer$"
    )
    with pytest.raises(UserError, match=message):
        meet_budget(model, batches, share)
    assert meet_budget(model, batches, 0.6) == pytest.approx(0.6, abs=0.02)  # from the end where the knob was left


def test_thresholds_that_are_negative_keep_everything_and_no_factor_changes_that(pruned: Build) -> None:
    model, batches = pruned("learned_threshold")
    with torch.no_grad():
        model.pruning.retainer.offset.fill_(-1.0)
    with pytest.raises(UserError, match=r"budget=0\.5 cannot be met: .* costs at least 1\.000"):
        meet_budget(model, batches, 0.5)


@pytest.mark.parametrize("name", RETAINERS)
def test_before_training_the_reach_of_the_knob_is_seen_and_the_knob_left_where_it_was(name: str, pruned: Build) -> None:
    model, batches = pruned(name)
    start = float(model.pruning.retainer.knob)
    check_reach(model, batches, 0.5)
    with pytest.raises(UserError, match=r"^budget=0\.01 cannot be met: .* costs between 0\.\d{3} and 1\.\d{3} of the"):
        check_reach(model, batches, 0.01)
    assert model.pruning.retainer.knob == start


def test_a_budget_is_met_from_wherever_the_knob_stands(pruned: Build) -> None:
    for name in ("static", "adaptive", "manual_threshold", "topk"):
        model, batches = pruned(name)
        for start in model.pruning.retainer.knob_ends:
            model.pruning.retainer.knob.fill_(start)
            assert meet_budget(model, batches, 0.5) == pytest.approx(0.5, abs=0.02)


def test_where_the_cost_moves_in_jumps_the_nearest_is_taken(random_classifier: Build, ragged_batch: Build) -> None:
    """One text of five tokens, four of which can go."""
    model = random_classifier(by_constant, partial(StaticRatio, layer=1), **SIZES)
    batches = [ragged_batch(model, [5])]
    steps = []
    for kept in range(1, 5):
        model.pruning.retainer.knob.fill_(kept / 4)
        steps.append(cost_share(model, batches))
    assert steps[3] == 1 and all(dearer - cheaper > 0.05 for cheaper, dearer in pairwise(steps))
    for nearest in (1, 2, 0, 3, 2):
        share = min(0.99, steps[nearest] + 0.02)
        assert meet_budget(model, batches, share) == steps[nearest]


@pytest.mark.parametrize("name", RETAINERS)
def test_the_knob_is_stored_with_the_model(
    name: str, pruned: Build, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model, batches = pruned(name)
    at_first = float(model.pruning.retainer.knob)
    meet_budget(model, batches, 0.6)
    card = ModelCard("tiny", "tiny", ["a", "b", "c"], 40, False, 64, "ltp", ["accuracy"])
    save_model(tmp_path, model, card, tiny_tokenizer)
    again, _ = load_model(tmp_path)
    assert again.pruning.retainer.knob == model.pruning.retainer.knob != at_first
    assert again.pruning.retainer.settings() == model.pruning.retainer.settings()
    with torch.no_grad():
        for batch in batches:
            assert torch.equal(again(batch, "gathered").logits, model(batch, "gathered").logits)
    assert cost_share(again, batches) == pytest.approx(0.6, abs=0.02)


# The texts on which the cost is held


def split_of(lengths: list[int]) -> EncodedSplit:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    tokens = torch.zeros(int(offsets[-1]), dtype=torch.int32)
    return EncodedSplit([], tokens, tokens, offsets, torch.zeros(len(lengths), dtype=torch.int64), 0, "")


def rows_for(train: list[int], evaluation: list[int], examples: int) -> Tensor:
    """Ask for training rows as long as the reported texts, of a task with these lengths."""
    data = TaskData.__new__(TaskData)
    data.train, data.evaluation = split_of(train), split_of(evaluation)
    return data.rows_as_long_as_evaluation(examples)


lengths = st.lists(st.integers(min_value=2, max_value=30), min_size=1, max_size=40)


@settings(max_examples=80, deadline=None)
@given(train=lengths, evaluation=lengths, examples=st.integers(min_value=1, max_value=50))
def test_no_row_comes_twice_and_as_many_as_there_can_be(train: list[int], evaluation: list[int], examples: int) -> None:
    rows = rows_for(train, evaluation, examples).tolist()
    assert len(rows) == len(set(rows)) == min(examples, len(evaluation), len(train))
    found = [train[row] for row in rows]
    assert found == sorted(found, reverse=True)


@settings(max_examples=40, deadline=None)
@given(evaluation=lengths, examples=st.integers(min_value=1, max_value=50), seed=st.integers(0, 9))
def test_where_training_texts_have_the_lengths_the_quantiles_are_those_of_the_reported_split(
    evaluation: list[int], examples: int, seed: int
) -> None:
    order = torch.randperm(29 * 40, generator=torch.Generator().manual_seed(seed)).tolist()
    train = [(place % 29) + 2 for place in order]
    rows = rows_for(train, evaluation, examples).tolist()
    count, ordered = min(examples, len(evaluation)), sorted(evaluation)
    places = [k * (len(ordered) - 1) // max(1, count - 1) for k in range(count)]
    for row, place in zip(reversed(rows), places, strict=True):
        assert train[row] in ordered[max(0, place - 1) : place + 1]  # a whole place may be rounded down
    if count == len(ordered):
        assert [train[row] for row in reversed(rows)] == ordered


@pytest.mark.parametrize(
    ("train", "evaluation", "expected"),
    [
        ([5, 3, 4], [10] * 8, [5, 4, 3]),  # fewer than asked for, and all of them shorter
        ([12] * 9, [3, 4, 5], [12, 12, 12]),  # all of them longer
        ([3, 20, 4, 21, 5], [9, 10], [21, 20]),  # a gap: the next longer ones
        ([7], [7, 7, 7], [7]),
    ],
)
def test_texts_that_the_training_split_does_not_have_are_replaced_by_the_nearest_in_order(
    train: list[int], evaluation: list[int], expected: list[int]
) -> None:
    assert [train[row] for row in rows_for(train, evaluation, 6).tolist()] == expected


# Configurations that cannot be


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["+method=finetune", "budget=0.5"], "finetune takes no budget: it prunes nothing"),
        (["+method=ltp", "budget=1.5"], "budget is a share of the unpruned FLOPs: a number above 0 and below 1"),
        (["+method=adtp", "budget=0"], "budget is a share of the unpruned FLOPs: a number above 0 and below 1"),
        (["+method=manual_topk", "budget=1"], "budget is a share of the unpruned FLOPs: a number above 0 and below 1"),
    ],
)
def test_a_budget_that_means_nothing_is_one_problem(overrides: list[str], problem: str) -> None:
    assert problems(*overrides) == [problem]


@pytest.mark.parametrize("method", ["ltp", "manual_threshold", "manual_topk", "adtp"])
def test_every_pruning_method_takes_a_budget(method: str) -> None:
    assert problems(f"+method={method}", "budget=0.5") == []


@pytest.mark.parametrize("budget", [0.0, 1.0, 1.5])
def test_a_method_that_is_built_by_hand_refuses_such_a_budget_too(budget: float, pruned: Build) -> None:
    model, _ = pruned("topk")
    with pytest.raises(ValueError, match=f"budget={budget} is a share of the unpruned FLOPs: above 0 and below 1"):
        HardPruning(model, ["accuracy"], torch.optim.AdamW, budget=budget)


# Training at a budget


@pytest.fixture
def data(tiny_task: Task, data_settings: Build) -> TaskData:
    return TaskData(tiny_task, data_settings(max_evaluation_examples=12))


def tiny_model(tokenizer: PreTrainedTokenizerFast, retainer: Build, scorer: Build = by_constant) -> PrunedClassifier:
    torch.manual_seed(0)
    encoder = random_encoder(Backbone(name="tiny", random=RandomShape(layers=3)), tokenizer)
    return PrunedClassifier(encoder, Head(32, 2), Pruning(scorer(32), retainer(32, 3)), tokenizer.sep_token_id)


def run_stages(method: StudentModule, data: TaskData, directory: Path, only: str | None = None) -> None:
    quieten_lightning()
    trainer = partial(
        Trainer, accelerator="cpu", devices=1, enable_progress_bar=False, log_every_n_steps=1000, gradient_clip_val=1.0
    )
    for stage in method.stages():
        if only in (None, stage.name):
            run_stage(stage, data, trainer, [], directory)


@pytest.mark.parametrize(
    ("retainer", "share"),
    [
        (ManualThreshold, 0.6),
        (TopKSchedule, 0.4),
        (LearnedThreshold, 0.4),
        (LearnedThreshold, 0.7),
        (StaticRatio, 0.6),
        (AdaptiveRatio, 0.6),
        (MinP, 0.6),
    ],
)
def test_after_training_at_a_budget_the_model_costs_it(
    retainer: type[LayerRetainer],
    share: float,
    tiny_task: Task,
    data_settings: Build,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    is_adtp = issubclass(retainer, RatioRetainer)
    # of twelve texts a share that adapts to each is another mean than of as many others: all 40 for these
    data = TaskData(tiny_task, data_settings(max_evaluation_examples=None if is_adtp else 12))
    model = tiny_model(tiny_tokenizer, retainer, small_saliency if is_adtp else by_constant)
    arguments = (model, ["accuracy"], partial(torch.optim.AdamW, lr=2e-3))
    if retainer is LearnedThreshold:
        method: StudentModule = LTP(*arguments, LTPLoss(), budget=share, soft_epochs=1, epochs=1, pruner_lr=1e-3)
    elif is_adtp:
        method = ADTP(*arguments, ADTPLoss(alpha=0.0), Attribution(), budget=share, epochs=1)
    else:
        method = HardPruning(*arguments, budget=share, epochs=1)
    run_stages(method, data, tmp_path)
    assert cost_share(model, method.calibration) == pytest.approx(share, abs=0.02)
    assert cost_share(model, data.evaluation_batches()) == pytest.approx(share, abs=0.05)
    rows = torch.cat([batch.index for batch in method.calibration])
    assert rows.tolist() == data.rows_as_long_as_evaluation(256).tolist()


def test_without_a_budget_the_knob_is_left_alone(
    data: TaskData, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_model(tiny_tokenizer, TopKSchedule)
    method = HardPruning(model, ["accuracy"], partial(torch.optim.AdamW, lr=2e-3), epochs=1)
    run_stages(method, data, tmp_path)
    assert model.pruning.retainer.knob == 1 and method.calibration == []


def test_the_share_is_held_a_few_times_in_a_stage_and_where_an_epoch_is_judged(
    data: TaskData, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(tiny_tokenizer, ManualThreshold)
    method = HardPruning(model, ["accuracy"], partial(torch.optim.AdamW, lr=2e-3), budget=0.5, epochs=2)
    held, costs = [], []
    hold, validate = HardPruning.hold_share, HardPruning.on_validation_epoch_end

    def recorded(self: HardPruning) -> None:
        held.append(self.trainer.global_step)
        hold(self)

    def measured(self: HardPruning) -> None:
        costs.append(cost_share(self.model, self.calibration))
        validate(self)

    monkeypatch.setattr(HardPruning, "hold_share", recorded)
    monkeypatch.setattr(HardPruning, "on_validation_epoch_end", measured)
    run_stages(method, data, tmp_path)
    steps = 2 * 28
    assert sorted(set(held)) == sorted({*range(0, steps, steps // CALIBRATIONS), steps // 2, steps})
    assert held == sorted(held)
    assert costs == pytest.approx([0.5, 0.5], abs=0.02)


def test_in_the_soft_stage_the_expected_cost_moves_to_the_budget(
    data: TaskData, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """So every layer's threshold is learned for this cost, and the knob has little left to do."""
    shares = {}
    for budget in (0.4, 0.9):
        model = tiny_model(tiny_tokenizer, partial(LearnedThreshold, temperature=2e-3))
        optimizer = partial(torch.optim.AdamW, lr=2e-3)
        method = LTP(model, ["accuracy"], optimizer, LTPLoss(), budget=budget, soft_epochs=2, pruner_lr=1e-3)
        run_stages(method, data, tmp_path / str(budget), only="soft")
        shares[budget] = method.gap(data, torch.device("cpu"))["soft"]["cost_share"]
        assert method.target_share is None and method.learned.knob == 0
    assert shares == pytest.approx({0.4: 0.4, 0.9: 0.9}, abs=0.08)
