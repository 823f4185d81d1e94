"""STTABT against loops written from Algorithm 1 and its equations: plans, soft masks, distillation, training."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import TINY_WORDS, enlarged
from gathered import (
    SENTENCES,
    assert_gathered_equals_masked,
    assert_gathered_has_the_gradients_of_masked,
    loaded_once,
)
from lightning.pytorch import Trainer
from test_config import problems
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from tokprune_exp import stages
from tokprune_exp.data.batch import Batch
from tokprune_exp.data.module import TaskData
from tokprune_exp.data.task import Task
from tokprune_exp.data.tokenise import encode_texts
from tokprune_exp.encoder.backbone import Backbone, RandomShape
from tokprune_exp.encoder.layout import Padded, Sequences
from tokprune_exp.encoder.pretrained import random_encoder
from tokprune_exp.encoder.trace import PruningTrace
from tokprune_exp.head import Head
from tokprune_exp.losses import STTABTLoss, mean_mask
from tokprune_exp.measure.evaluation import check_flops, evaluate
from tokprune_exp.measure.report import latency, make_plan
from tokprune_exp.measure.sttabt_flops import sttabt_approx_net_flops, sttabt_encoder_flops, sttabt_mask_update_flops
from tokprune_exp.methods.approx import ApproxDistillation, attention_kl, attention_mse, prediction_distance
from tokprune_exp.methods.budget import cost_share, soft_cost_share
from tokprune_exp.methods.finetune import Finetune
from tokprune_exp.methods.module import Terms
from tokprune_exp.methods.sttabt import STTABT
from tokprune_exp.model import ClassifierOutput, ModelCard, PrunedClassifier, load_model, save_model
from tokprune_exp.pruning.pruning import Pruning
from tokprune_exp.pruning.retainers import Backtracking, Concrete, Plan, StaticRatio, TopKSchedule
from tokprune_exp.pruning.scorers import ApproxAttention, AttentionMass, ExactAttention
from tokprune_exp.stages import run_stage
from tokprune_exp.tracking import quieten_lightning

LENGTHS = [23, 1, 2, 3, 40, 11, 5]
SHORT = [9, 1, 2, 14, 6]
LAYERS, HEADS = 4, 4
THETAS = [-2.5, -1.8, -1.2, -0.7]
"""Falling towards the first layer, where many tokens have their say and all look alike important."""
TINY = {"layers": 2, "dim": 32, "heads": 4}
PAIRS: dict[str, tuple[Any, Any]] = {
    "approx_backtracking": (ApproxAttention, partial(Backtracking, k=0.3)),
    "approx_concrete": (ApproxAttention, Concrete),
    "exact_backtracking": (ExactAttention, partial(Backtracking, k=0.3)),
    "exact_concrete": (ExactAttention, Concrete),
}

Build = Callable[..., Any]
Rows = list[list[float]]


def planned(build: Build, pair: str, family: str = "bert", sizes: dict[str, int] | None = None, **settings: Any) -> Any:
    """A random classifier with a plan; the ApproxNet's weights are as large as the encoder's, θ is set."""
    scorer, retainer = PAIRS[pair]
    with torch.random.fork_rng():
        model = build(scorer, partial(retainer, **settings), family, **(sizes or {}))
        torch.manual_seed(4)
        if isinstance(model.pruning.scorer, ApproxAttention):
            enlarged(model.pruning.scorer.net)
    if isinstance(model.pruning.retainer, Concrete):
        with torch.no_grad():
            model.pruning.retainer.theta.copy_(torch.tensor(THETAS[-model.encoder.shape.layers :]))
    return model.eval()


def relaxed(model: PrunedClassifier, batch: Batch) -> ClassifierOutput:
    with model.pruning.retainer.relaxed():
        return model(batch)


def rows_of(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Ids and types of every sequence, without padding."""
    lengths = batch.valid.sum(1).tolist()
    return [(batch.input_ids[row, :n], batch.token_type_ids[row, :n]) for row, n in enumerate(lengths)]


def places(mask: Tensor) -> list[int]:
    return mask.nonzero()[:, 0].tolist()


# Algorithm 1 and eqs. 3 to 5, one text at a time


def attention_by_hand(score: Tensor, n: int) -> Rows:
    """A_prob of eq. 1 over the first n tokens, mean of the heads."""
    mean = [[0.0] * n for _ in range(n)]
    for head in score[:, :n, :n].tolist():
        for j, row in enumerate(head):
            powers = [math.exp(x - max(row)) for x in row]
            for i in range(n):
                mean[j][i] += powers[i] / sum(powers) / len(score)
    return mean


def backtracked_by_hand(
    attention: list[Rows], k: int | Callable[[list[float]], int], p: float, always: frozenset[int] = frozenset()
) -> tuple[list[set[int]], list[list[float]]]:
    """Algorithm 1: i^1 … i^{L+1}, and the importance c of layers 1 … L; k may depend on the importance of a layer."""
    required, share = {0}, {0: 1.0}
    plan, importance = [required], []
    for rows in reversed(attention):
        n = len(rows)
        column = [0.0] * n
        for j in required:
            for i in range(n):
                column[i] += (p * share[j] * rows[j][i] + (1 - p) * rows[j][i]) / len(required)
        count = k if isinstance(k, int) else k(column)
        best = sorted(range(n), key=lambda i, column=column: (-column[i], i))[:count]
        required = required | set(best) | always
        total = sum(column[i] for i in required)
        share = {i: column[i] / total for i in required}
        plan.append(required)
        importance.append(column)
    return plan[::-1], importance[::-1]


def uniform_by_hand(score: Tensor, n: int) -> Rows:
    """Ã of eq. 3 over the first n tokens: every row of every head standardised, through Φ, mean of the heads."""
    mean = [[0.0] * n for _ in range(n)]
    for head in score[:, :n, :n].tolist():
        for t, row in enumerate(head):
            mu = sum(row) / n
            sigma = math.sqrt(sum((x - mu) ** 2 for x in row) / n)
            for i, x in enumerate(row):
                z = (x - mu) / sigma if sigma > 0 else 0.0
                mean[t][i] += 0.5 * (1 + math.erf(z / math.sqrt(2))) / len(score)
    return mean


def concrete_by_hand(
    uniform: list[Rows],
    thetas: list[float],
    p: float = 0.1,
    tau: float | None = None,
    floor: float = 0.01,
    always: frozenset[int] = frozenset(),
) -> tuple[Rows, Rows]:
    """Eqs. 4 and 5: m^1 … m^{L+1}, and s of layers 1 … L. Without a temperature a token stays if s ≥ 1 − p_θ."""
    n = len(uniform[0])
    mask = [1.0] + [0.0] * (n - 1)
    share, masks, shares = mask, [mask], []
    for rows, theta in zip(reversed(uniform), reversed(thetas), strict=True):
        b = [sum(mask[t] * (p * share[t] + 1 - p) * rows[t][i] for t in range(n)) / sum(mask) for i in range(n)]
        share = [floor + (1 - floor) * x / max(b) for x in b]
        p_theta = 1 / (1 + math.exp(-theta))
        if tau is None:
            new = [float(s >= 1 - p_theta) for s in share]
        else:
            new = []
            for s in share:
                logit = math.inf if s >= 1 else math.log(p_theta / (1 - p_theta)) + math.log(s / (1 - s))
                new.append(1 / (1 + math.exp(min(700.0, -logit / tau))))
        mask = [max(one, above, float(i in always)) for i, (one, above) in enumerate(zip(new, mask, strict=True))]
        masks.append(mask)
        shares.append(share)
    return masks[::-1], shares[::-1]


TEXTS = [7 * row % 14 + 1 for row in range(32)]


@cache
def random_scores() -> Tensor:
    """Scores of 3 layers and 3 heads for 32 texts of 1 to 14 tokens, without a mask, in double precision."""
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(3, 32, 3, 17, 17, generator=generator, dtype=torch.float64)


@cache
def attentions(row: int) -> list[Rows]:
    return [attention_by_hand(layer[row], TEXTS[row]) for layer in random_scores()]


@cache
def uniforms(row: int) -> list[Rows]:
    return [uniform_by_hand(layer[row], TEXTS[row]) for layer in random_scores()]


def separators_of(row: int) -> frozenset[int]:
    return frozenset({TEXTS[row] - 1, TEXTS[row] // 2})


def laid_out(size: int, extra: int = 0, protects: bool = False) -> tuple[list[Tensor], Padded]:
    """The scores of the first texts and the layout they lie in; every second text has -inf in rows of padding."""
    tokens = max(TEXTS[:size]) + extra
    valid = torch.arange(tokens) < torch.tensor(TEXTS[:size])[:, None]
    protected = torch.zeros_like(valid)
    protected[:, 0] = True
    if protects:
        for row in range(size):
            protected[row, sorted(separators_of(row))] = True
    absent = (~valid & (torch.arange(size)[:, None] % 2 == 1))[:, None, :, None]
    scores = [
        layer[:size, :, :tokens, :tokens].masked_fill(~valid[:, None, None, :] | absent, float("-inf"))
        for layer in random_scores()
    ]
    return scores, Padded.start(Sequences(valid, protected))


@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("percent", [5, 30, 55, 100])
@pytest.mark.parametrize("k_base", ["valid", "padded"])
def test_back_tracking_equals_a_plain_loop_over_texts_layers_and_tokens(k_base: Any, percent: int, p: float) -> None:
    retainer = Backtracking(8, 3, k=percent / 100, propagation=p, k_base=k_base)
    for size, extra in ((1, 0), (2, 3), (7, 1), (32, 3)):
        scores, layout = laid_out(size, extra)
        plan = retainer.plan(scores, layout)
        assert len(plan.decisions) == 4
        for row, n in enumerate(TEXTS[:size]):
            base = n if k_base == "valid" else max(TEXTS[:size]) + extra
            k = min(n, max(1, -(-percent * base // 100)))
            kept, importance = backtracked_by_hand(attentions(row), k, p)
            assert [places(decision.keep[row]) for decision in plan.decisions] == [sorted(one) for one in kept]
            for decision, theirs in zip(plan.decisions, importance, strict=False):
                assert decision.importance[row].tolist() == pytest.approx(theirs + [0] * (len(layout.alive[0]) - n))


@pytest.mark.parametrize("k", [1, 3, 40])
def test_k_as_a_number_of_tokens_is_the_same_for_every_text(k: int) -> None:
    scores, layout = laid_out(32, 3)
    plan = Backtracking(8, 3, k=float(k), k_base="tokens").plan(scores, layout)
    for row, n in enumerate(TEXTS):
        kept, _ = backtracked_by_hand(attentions(row), min(n, k), 0.1)
        assert [places(decision.keep[row]) for decision in plan.decisions] == [sorted(one) for one in kept]


@pytest.mark.parametrize("k", [0.00625, 0.3, 0.6, 1.0])
def test_dynamic_k_counts_what_exceeds_a_share_of_the_largest_importance_within_bounds(k: float) -> None:
    scores, layout = laid_out(32, 3)
    plan = Backtracking(8, 3, k=k, k_base="dynamic").plan(scores, layout)
    counts = set()
    for row, n in enumerate(TEXTS):

        def count(column: list[float], n: int = n) -> int:
            above = sum(one > k * max(column) for one in column)
            counts.add(above)
            return min(max(above, math.ceil(n / 5)), math.ceil(19 * n / 20))

        kept, _ = backtracked_by_hand(attentions(row), count, 0.1)
        assert [places(decision.keep[row]) for decision in plan.decisions] == [sorted(one) for one in kept]
    assert (counts == {0}) == (k == 1)


@pytest.mark.parametrize(("k_base", "k"), [("padded", 0.3), ("tokens", 3.0), ("dynamic", 0.3)])
def test_only_a_share_of_the_real_tokens_can_be_held_at_a_budget(k_base: Any, k: float) -> None:
    assert Backtracking(8, 3, k=k, k_base=k_base).knob_ends is None
    assert Backtracking(8, 3, k=0.3).knob_ends == (0.0, 1.0)


def test_the_propagation_changes_what_is_planned() -> None:
    scores, layout = laid_out(32)
    plans = [Backtracking(8, 3, k=0.3, propagation=p).plan(scores, layout).decisions[0].keep for p in (0.0, 0.1, 1.0)]
    assert not torch.equal(plans[0], plans[2]) and not torch.equal(plans[1], plans[2])


@pytest.mark.parametrize("keeps_separators", [False, True])
@pytest.mark.parametrize("retainer", [partial(Backtracking, k=0.2), Concrete])
def test_a_plan_never_needs_less_below_keeps_the_first_token_and_no_padding(
    retainer: Build, keeps_separators: bool
) -> None:
    scores, layout = laid_out(32, 3, protects=True)
    one = retainer(8, 3, keeps_separators=keeps_separators)
    decisions = one.plan(scores, layout).decisions
    keeps = [decision.keep for decision in decisions]
    for below, above in pairwise(keeps):
        assert (above <= below).all() and below[:, 0].all()
        assert not (below & ~layout.sequences.valid).any()
        if isinstance(one, Backtracking) and not keeps_separators:
            k = torch.tensor([math.ceil(0.2 * n - 1e-9) for n in TEXTS])
            assert (below.sum(1) <= above.sum(1) + k).all()
    first = torch.zeros_like(keeps[-1])
    first[:, 0] = True
    assert torch.equal(keeps[-1], first)
    for row in range(32):
        always = separators_of(row) | {0} if keeps_separators else frozenset()
        if isinstance(one, Backtracking):
            kept = backtracked_by_hand(attentions(row), math.ceil(0.2 * TEXTS[row] - 1e-9), 0.1, always)[0]
        else:
            masks = concrete_by_hand(uniforms(row), [0.0] * 3, always=always)[0]
            kept = [{i for i, m in enumerate(mask) if m} for mask in masks]
        assert [places(keep[row]) for keep in keeps] == [sorted(one) for one in kept]
    all_stay = all((keep & layout.sequences.protected).equal(layout.sequences.protected) for keep in keeps[:-1])
    assert all_stay == keeps_separators


def test_ties_go_to_the_earlier_token() -> None:
    valid = torch.tensor([[True] * 6 + [False], [True] * 7])
    layout = Padded.start(Sequences(valid, valid & False))
    score = torch.zeros(2, 2, 7, 7)
    score[1, :, :, 5:] = 1.0  # the last two alike, above all others
    score = score.masked_fill(~valid[:, None, None, :], float("-inf"))
    for share, expected in ((0.5, ([0, 1, 2], [0, 1, 5, 6])), (0.1, ([0], [0, 5]))):
        keep = Backtracking(8, 1, k=share).plan([score], layout).decisions[0].keep
        assert (places(keep[0]), places(keep[1])) == expected


@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("thetas", [[0.0, 0.0, 0.0], [-2.0, -1.0, 0.7], [3.0, -3.0, -0.5]])
def test_the_concrete_masks_equal_a_plain_loop_over_texts_layers_and_tokens(thetas: list[float], p: float) -> None:
    for tau in (0.1, 0.7):
        retainer = Concrete(8, 3, propagation=p, temperature=tau).double()
        with torch.no_grad():
            retainer.theta.copy_(torch.tensor(thetas))
        for size, extra in ((1, 0), (2, 3), (7, 1), (32, 3)):
            scores, layout = laid_out(size, extra)
            hard = retainer.plan(scores, layout).decisions
            with retainer.relaxed():
                soft = retainer.plan(scores, layout).decisions
            in_force = torch.ones_like(layout.alive, dtype=torch.float64)
            for number, decision in enumerate(soft):
                in_force = in_force * decision.gate
                torch.testing.assert_close(in_force, decision.soft.double(), atol=1e-6, rtol=0)
                assert torch.equal(decision.keep, layout.sequences.valid) and hard[number].soft is None
            for row, n in enumerate(TEXTS[:size]):
                padding = [0.0] * (len(layout.alive[0]) - n)
                masks, shares = concrete_by_hand(uniforms(row), thetas, p, tau)
                for decision, mask in zip(soft, masks, strict=True):
                    assert decision.soft[row].tolist() == pytest.approx(mask + padding, abs=5e-5)
                for decision, share in zip(soft, shares, strict=False):
                    assert decision.importance[row].tolist() == pytest.approx(share + padding, abs=1e-5)
                kept = concrete_by_hand(uniforms(row), thetas, p)[0]
                for decision, mask in zip(hard, kept, strict=True):
                    assert places(decision.keep[row]) == [i for i, m in enumerate(mask) if m]


def test_a_token_stays_if_it_is_needed_above_or_its_score_reaches_one_minus_p() -> None:
    """The recorded scores against the rule; the temperature plays no part in it."""
    scores, layout = laid_out(32)
    thetas = [-2.6, -1.6, -0.8]
    plans = []
    for tau in (0.02, 0.1, 1.5):
        retainer = Concrete(8, 3, temperature=tau)
        with torch.no_grad():
            retainer.theta.copy_(torch.tensor(thetas))
        plans.append([decision.keep for decision in retainer.plan(scores, layout).decisions])
        decisions = retainer.plan(scores, layout).decisions
        for number, theta in enumerate(thetas):
            reached = decisions[number].importance >= 1 - 1 / (1 + math.exp(-theta))
            assert torch.equal(decisions[number].keep, reached | decisions[number + 1].keep)
    for plan in plans[1:]:
        assert all(torch.equal(one, two) for one, two in zip(plan, plans[0], strict=True))
    assert 0.2 < plans[0][0].sum() / layout.alive.sum() < 0.95


def test_the_knob_is_added_to_every_theta() -> None:
    scores, layout = laid_out(7)
    turned, moved = Concrete(8, 3, theta_init=-0.5), Concrete(8, 3, theta_init=0.4)
    turned.knob.fill_(0.9)
    for one, two in zip(turned.plan(scores, layout).decisions, moved.plan(scores, layout).decisions, strict=True):
        assert torch.equal(one.keep, two.keep)


# The model under a plan, on transformers' own layers


def layer_by_hand(
    block: nn.Module, asking: Tensor, hidden: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One layer for some queries: its output and A_score; attention is exp(score)·weight, renormalised."""
    attention = block.attention.self
    heads = (1, -1, attention.num_attention_heads, attention.attention_head_size)
    query, key, value = (
        linear(states).view(heads).transpose(1, 2)
        for linear, states in ((attention.query, asking), (attention.key, hidden), (attention.value, hidden))
    )
    scores = query @ key.transpose(2, 3) / math.sqrt(attention.attention_head_size)
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * (1.0 if weight is None else weight)
    context = (weights / weights.sum(-1, keepdim=True) @ value).transpose(1, 2).flatten(2)
    attended = block.attention.output(context, asking)
    return block.output(block.intermediate(attended), attended), scores[0]


def scores_by_hand(theirs: Any, embedded: Tensor) -> list[Tensor]:
    """A_score of every layer of the unpruned model."""
    hidden, scores = embedded, []
    for block in theirs.encoder.layer:
        hidden, one = layer_by_hand(block, hidden, hidden)
        scores.append(one)
    return scores


def gathered_by_hand(theirs: Any, embedded: Tensor, kept: list[list[int]]) -> Tensor:
    """[CLS] after the last layer, when layer l sees only the tokens kept[l] and computes only kept[l + 1]."""
    hidden = embedded[:, kept[0]]
    for block, before, after in zip(theirs.encoder.layer, kept, kept[1:], strict=False):
        hidden, _ = layer_by_hand(block, hidden[:, [before.index(i) for i in after]], hidden)
    assert kept[-1] == [0]
    return hidden[:, 0]


def softened_by_hand(theirs: Any, embedded: Tensor, masks: Rows) -> Tensor:
    """[CLS] after the last layer, when a token is attended to in proportion to its mask."""
    hidden = embedded
    for block, mask in zip(theirs.encoder.layer, masks, strict=False):
        hidden, _ = layer_by_hand(block, hidden, hidden, torch.tensor(mask, dtype=torch.float64))
    return hidden[:, 0]


def multiplied_by_hand(theirs: Any, embedded: Tensor, masks: Rows) -> Tensor:
    """[CLS] after the last layer as the official code softens: every linear map's output times its tokens' masks."""
    hidden = embedded
    for block, *rows in zip(theirs.encoder.layer, masks, masks[1:], strict=False):
        keys, outputs = (torch.tensor(row, dtype=torch.float64)[:, None] for row in rows)
        attention = block.attention.self
        size = attention.attention_head_size
        query, key, value = (
            attention.query(hidden) * outputs,
            attention.key(hidden) * keys,
            attention.value(hidden) * keys,
        )
        contexts = []
        for head in range(attention.num_attention_heads):
            q, k, v = (states[0, :, head * size : (head + 1) * size] for states in (query, key, value))
            weights = (q @ k.T / math.sqrt(size)).softmax(-1) * keys.T
            contexts.append(weights / weights.sum(-1, keepdim=True) @ v)
        projected = block.attention.output.dense(torch.cat(contexts, dim=1)[None]) * outputs
        attended = block.attention.output.LayerNorm(projected + hidden)
        inner = F.gelu(block.intermediate.dense(attended) * outputs)
        hidden = block.output.LayerNorm(block.output.dense(inner) * outputs + attended)
    return hidden[:, 0]


def doubled(module: nn.Module) -> Any:
    return copy.deepcopy(module).double()


@pytest.mark.parametrize("mode", ["backtracking", "concrete", "soft", "code"])
def test_plan_and_logits_equal_a_plain_loop_over_the_layers_of_transformers(
    mode: str, random_transformer: Build, random_classifier: Build, ragged_batch: Build
) -> None:
    settings = {"relaxation": "code"} if mode == "code" else {}
    pair, softens = "exact_backtracking" if mode == "backtracking" else "exact_concrete", mode in ("soft", "code")
    model = planned(random_classifier, pair, **settings)
    theirs, head = doubled(random_transformer()), doubled(model.head)
    batch = ragged_batch(model, LENGTHS, extra=2)
    with torch.no_grad():
        outputs = [relaxed(model, batch)] if softens else [model(batch), model(batch, "gathered")]
        for row, (ids, types) in enumerate(rows_of(batch)):
            n = len(ids)
            embedded = theirs.embeddings(input_ids=ids[None], token_type_ids=types[None])
            scores = scores_by_hand(theirs, embedded)
            if mode == "backtracking":
                count = max(1, math.ceil(0.3 * n - 1e-9))
                kept = backtracked_by_hand([attention_by_hand(one, n) for one in scores], count, 0.1)[0]
            else:
                uniform = [uniform_by_hand(one, n) for one in scores]
                masks = concrete_by_hand(uniform, THETAS, tau=0.1 if softens else None)[0]
                kept = [{i for i, m in enumerate(mask) if m} for mask in masks]
            if softens:
                by_hand = softened_by_hand if mode == "soft" else multiplied_by_hand
                first = by_hand(theirs, embedded, masks)
                decisions = [outputs[0].trace.entry, *outputs[0].trace.decisions]
                for decision, mask in zip(decisions, masks, strict=True):
                    assert decision.soft[row].tolist() == pytest.approx(mask + [0.0] * (42 - n), abs=1e-3)
            else:
                first = gathered_by_hand(theirs, embedded, [sorted(one) for one in kept])
                for output in outputs:
                    assert [places(layer.keys[row]) for layer in output.trace.layers] == [sorted(x) for x in kept[:-1]]
                    assert [places(layer.outputs[row]) for layer in output.trace.layers] == [
                        sorted(x) for x in kept[1:]
                    ]
            for output in outputs:
                torch.testing.assert_close(output.logits[row].double(), head(first)[0], atol=1e-4, rtol=0)
        assert (outputs[0].logits - model(batch, prune=False).logits).abs().max() > 0.01


def soft_masks(trace: PruningTrace) -> tuple[list[Tensor], Tensor]:
    """m^1 … m^{L+1} of a relaxed pass, and the lengths of its texts."""
    return [one.soft for one in (trace.entry, *trace.decisions)], trace.lengths


def test_dropout_of_the_official_codes_soft_attention_comes_before_the_masks_and_the_renormalisation() -> None:
    """softmax → dropout → · m → / Σ, row by row in double precision; the drawn zeros are those of the same seed."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 7, 8)
    valid = torch.arange(7) < torch.tensor([7, 4])[:, None]
    gate = torch.rand(2, 7) * valid
    layout = Padded(Sequences(valid, valid), valid, gate, drops_first=True)
    torch.manual_seed(1)
    ours = layout.attend(query, key, value, 2, dropout=0.5).context
    torch.manual_seed(1)
    drawn = F.dropout(torch.ones(2, 2, 7, 7), 0.5)
    assert (drawn == 0).any() and drawn.max() == 2
    for row, h, j in product(range(2), range(2), range(7)):
        part, n = slice(4 * h, 4 * h + 4), int(valid[row].sum())
        scores = (key[row, :n, part].double() @ query[row, j, part].double()) / 2
        weights = scores.softmax(0) * drawn[row, h, j, :n] * gate[row, :n]
        expected = (weights / (weights.sum() + 1e-30)) @ value[row, :n, part].double()
        torch.testing.assert_close(ours[row, j, part].double(), expected, atol=1e-5, rtol=0)
    plain = replace(layout, drops_first=False).attend(query, key, value, 2).context
    torch.testing.assert_close(layout.attend(query, key, value, 2).context, plain)


def test_soft_masks_of_the_official_code_drop_attention_before_they_count(
    monkeypatch: pytest.MonkeyPatch, random_classifier: Build, ragged_batch: Build
) -> None:
    seen: list[bool] = []
    attend = Padded.attend

    def noting(self: Padded, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.drops_first)
        return attend(self, *args, **kwargs)

    monkeypatch.setattr(Padded, "attend", noting)
    for relaxation, expected in (("gated", False), ("code", True)):
        model = planned(random_classifier, "approx_concrete", relaxation=relaxation)
        seen.clear()
        relaxed(model, ragged_batch(model, SHORT))
        assert seen[-LAYERS:] == [expected] * LAYERS and not any(seen[:-LAYERS])  # first come those of the ApproxNet


def mean_mask_by_hand(masks: Rows, layers: str) -> float:
    """1/(TL) Σ_l Σ_t m_t^l of one text's m^1 … m^{L+1}: over l = 1 … L (eq. 6), or one layer later (code)."""
    total, count = 0.0, len(masks) - 1
    for layer in range(1, count + 1):
        mask = masks[layer - 1 if layers == "paper" else layer]
        for m in mask:
            total += m / (len(mask) * count)
    return total


def total_of(logits: Tensor, masks: list[Rows]) -> Tensor:
    """A weighted sum of all logits, plus 0.7 times the mean mask of eq. 6."""
    weights = torch.arange(1, logits.numel() + 1, dtype=logits.dtype).view(logits.shape).sin()
    means = [mean_mask_by_hand(one, "paper") for one in masks]
    return (logits * weights).sum() + 0.7 * (sum(means) / len(means) if means else 0.0)


@pytest.mark.parametrize("tau", [0.1, 0.4])
def test_the_gradient_of_theta_equals_finite_differences_of_the_plain_loop(
    tau: float, random_transformer: Build, random_classifier: Build, ragged_batch: Build
) -> None:
    """The loop is in double precision; the plan is that of the exact attention."""
    model, thetas = planned(random_classifier, "exact_concrete", temperature=tau), [-0.7, -0.9, -1.2, -1.4]
    with torch.no_grad():
        model.pruning.retainer.theta.copy_(torch.tensor(thetas))
    theirs, head = doubled(random_transformer()), doubled(model.head)
    batch = ragged_batch(model, SHORT, extra=1)
    output = relaxed(model, batch)
    loss = total_of(output.logits, []) + 0.7 * mean_mask(*soft_masks(output.trace))
    loss.backward()
    with torch.no_grad():
        embedded = [theirs.embeddings(input_ids=ids[None], token_type_ids=types[None]) for ids, types in rows_of(batch)]
        uniform = [[uniform_by_hand(one, len(x[0])) for one in scores_by_hand(theirs, x)] for x in embedded]

        def loss_at(moved: list[float]) -> float:
            masks = [concrete_by_hand(one, moved, tau=tau)[0] for one in uniform]
            first = [softened_by_hand(theirs, x, mask) for x, mask in zip(embedded, masks, strict=True)]
            return float(total_of(head(torch.cat(first)), masks))

        assert loss.item() == pytest.approx(loss_at(thetas), abs=1e-3)
        numeric = []
        for layer in range(LAYERS):
            up, down = ([theta + step * (k == layer) for k, theta in enumerate(thetas)] for step in (1e-6, -1e-6))
            numeric.append((loss_at(up) - loss_at(down)) / 2e-6)
    gradient = model.pruning.retainer.theta.grad.tolist()
    assert all(abs(one) > 1e-3 for one in gradient)
    assert gradient == pytest.approx(numeric, rel=2e-2, abs=2e-3)


@pytest.mark.parametrize("relaxation", ["gated", "code"])
@pytest.mark.parametrize("pair", ["approx_concrete", "exact_concrete"])
def test_soft_masks_of_zeros_and_ones_give_the_logits_of_the_hard_model(
    pair: str, relaxation: str, random_classifier: Build, ragged_batch: Build
) -> None:
    model = planned(random_classifier, pair, temperature=1e-5, relaxation=relaxation)
    batch = ragged_batch(model, LENGTHS, extra=1)
    with torch.no_grad():
        soft, hard = relaxed(model, batch), model(batch)
    for ours, theirs in zip(soft.trace.decisions, hard.trace.decisions, strict=True):
        assert torch.equal(ours.soft, theirs.keep.float())
    assert torch.equal(soft.trace.entry.soft, hard.trace.entry.keep.float())
    assert hard.trace.counts("keys")[4, 0] < 40
    torch.testing.assert_close(soft.logits, hard.logits, atol=1e-5, rtol=0)
    ours = soft_cost_share(model, soft.trace).item()
    assert ours == pytest.approx(cost_share(model, [batch]), rel=1e-5)


def pruner_share(model: PrunedClassifier, batch: Batch) -> float:
    """What the attention of the plan costs, as a share of the unpruned encoder."""
    lengths = batch.valid.sum(1).tolist()
    d, f, layers = model.encoder.shape.dim, model.encoder.shape.ff_dim, model.encoder.shape.layers
    small = model.encoder.shape
    if isinstance(model.pruning.scorer, ApproxAttention):
        small = model.pruning.scorer.net.shape
    e, g = small.dim, small.ff_dim
    dense = sum(layers * (4 * d * d * n + 2 * d * n * n + 2 * d * f * n) for n in lengths)
    whole = sum((layers - 1) * (4 * e * e * n + 2 * e * n * n + 2 * e * g * n) for n in lengths)
    return (whole + sum(2 * e * e * n + e * n * n for n in lengths)) / dense


@pytest.mark.parametrize("relaxation", ["gated", "code"])
@pytest.mark.parametrize("trains_along", [True, False])
@pytest.mark.parametrize("pair", ["approx_concrete", "exact_concrete"])
def test_the_task_teaches_every_theta_the_encoder_and_the_approx_net_where_it_trains_along(
    pair: str, trains_along: bool, relaxation: str, random_classifier: Build, ragged_batch: Build
) -> None:
    model = planned(random_classifier, pair, temperature=0.5, relaxation=relaxation)
    model.pruning.scorer.requires_grad_(trains_along)
    F.cross_entropy(relaxed(model, batch := ragged_batch(model, LENGTHS)).logits, batch.labels).backward()
    gradient = model.pruning.retainer.theta.grad
    assert gradient.isfinite().all() and (gradient.abs() > 1e-6).all()
    taught = [model.encoder]
    if pair == "approx_concrete" and trains_along:
        taught.append(model.pruning.scorer.net)
    for encoder in taught:
        for parameter in (encoder.embeddings.word.weight, *(layer.query.weight for layer in encoder.layers)):
            assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0
    if not trains_along:
        assert all(parameter.grad is None for parameter in model.pruning.scorer.parameters())


@pytest.mark.parametrize("pair", PAIRS)
def test_a_hard_plan_teaches_the_encoder_alone(pair: str, random_classifier: Build, ragged_batch: Build) -> None:
    model = planned(random_classifier, pair)
    batch = ragged_batch(model, LENGTHS)
    F.cross_entropy(model(batch).logits, batch.labels).backward()
    assert all(parameter.grad is None for parameter in model.pruning.parameters())
    assert all(layer.key.weight.grad.abs().max() > 0 for layer in model.encoder.layers)


def test_masks_are_hard_again_after_the_block_even_after_an_error(
    random_classifier: Build, ragged_batch: Build
) -> None:
    model = planned(random_classifier, "approx_concrete")
    batch = ragged_batch(model, LENGTHS)
    with pytest.raises(RuntimeError, match="stop"), model.pruning.retainer.relaxed():
        assert model(batch).trace.decisions[0].soft is not None
        raise RuntimeError("stop")
    assert model(batch).trace.decisions[0].soft is None


@pytest.mark.parametrize(
    ("pair", "mode"),
    [(pair, mode) for pair in PAIRS for mode in ("masked", "gathered", "soft") if mode != "soft" or "concrete" in pair],
)
def test_padding_and_company_change_no_plan_and_no_logits(
    pair: str, mode: str, random_classifier: Build, ragged_batch: Build
) -> None:
    model = planned(random_classifier, pair)
    if mode == "soft":
        model.pruning.retainer.is_relaxed = True
    execution = "gathered" if mode == "gathered" else "masked"
    with torch.no_grad():
        narrow, wide = (model(ragged_batch(model, LENGTHS, extra), execution) for extra in (0, 19))
        alone = model(ragged_batch(model, [11], seeds=[5]), execution)
    near = 1e-4 if mode == "soft" else 1e-5
    torch.testing.assert_close(wide.logits, narrow.logits, atol=near, rtol=0)
    torch.testing.assert_close(alone.logits[0], narrow.logits[5], atol=near, rtol=0)
    assert torch.equal(wide.trace.entry.keep, F.pad(narrow.trace.entry.keep, (0, 19)))
    if mode == "soft":
        torch.testing.assert_close(wide.trace.entry.soft, F.pad(narrow.trace.entry.soft, (0, 19)), atol=1e-3, rtol=0)
        torch.testing.assert_close(alone.trace.entry.soft[0], narrow.trace.entry.soft[5, :11], atol=1e-3, rtol=0)
    for ours, theirs, lonely in zip(wide.trace.layers, narrow.trace.layers, alone.trace.layers, strict=True):
        assert torch.equal(ours.outputs, F.pad(theirs.outputs, (0, 19)))
        assert torch.equal(lonely.keys[0], theirs.keys[5, :11])
        if mode == "soft":
            torch.testing.assert_close(ours.decision.soft, F.pad(theirs.decision.soft, (0, 19)), atol=1e-3, rtol=0)


def test_with_k_of_the_padded_length_a_text_keeps_more_beside_a_longer_one(
    random_classifier: Build, ragged_batch: Build
) -> None:
    model = planned(random_classifier, "approx_backtracking", k_base="padded")
    with torch.no_grad():
        alone = model(ragged_batch(model, [11], seeds=[5])).trace.counts("keys")[0]
        beside = model(ragged_batch(model, LENGTHS)).trace.counts("keys")[5]
    assert (beside >= alone).all() and (beside > alone).any() and beside.max() <= 11


# The dense answer, gathered running, what is executed


@pytest.mark.parametrize("execution", ["masked", "gathered"])
@pytest.mark.parametrize("pair", PAIRS)
def test_with_every_token_the_answer_is_that_of_the_dense_model(
    pair: str, execution: str, random_classifier: Build, ragged_batch: Build
) -> None:
    """All keys stay; of the last layer only [CLS] is computed."""
    model = planned(random_classifier, pair)
    model.pruning.retainer.knob.fill_(model.pruning.retainer.knob_ends[1])
    batch = ragged_batch(model, LENGTHS, extra=1)
    with torch.no_grad():
        pruned, dense = model(batch, execution), model(batch, execution, prune=False)
    torch.testing.assert_close(pruned.logits, dense.logits, atol=1e-5, rtol=0)
    assert all(torch.equal(layer.keys, batch.valid) for layer in pruned.trace.layers)
    assert pruned.trace.counts("outputs")[:, -1].tolist() == [1] * 7


def assert_the_sets_are_a_plan(trace: PruningTrace) -> None:
    assert torch.equal(trace.layers[0].keys, trace.entry.keep) and (trace.entry.keep <= trace.valid).all()
    for layer, following in zip(trace.layers, trace.layers[1:], strict=False):
        assert torch.equal(following.keys, layer.outputs)
    for layer in trace.layers:
        assert (layer.queries <= layer.keys).all() and torch.equal(layer.queries, layer.outputs)
    assert trace.layers[-1].outputs.nonzero().tolist() == [[row, 0] for row in range(len(trace.valid))]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_gathered_equals_masked_on_random_weights(
    family: str, pair: str, random_classifier: Build, ragged_batch: Build
) -> None:
    model = planned(random_classifier, pair, family, keeps_separators=family == "roberta")
    for size in (1, 2, 7, 32):
        trace = assert_gathered_equals_masked(model, ragged_batch(model, (LENGTHS * 5)[:size], extra=2))
        assert_the_sets_are_a_plan(trace)
        assert 1 < trace.counts("keys")[0, -1] < 23 and trace.counts("keys").diff(dim=1).max() <= 0
    assert_gathered_has_the_gradients_of_masked(model, ragged_batch(model, LENGTHS, extra=2))


def assert_gathered_equals_masked_with_the_weights_of(directory: Path, pair: str) -> None:
    torch.manual_seed(0)
    loaded = loaded_once(directory)
    scorer, retainer = PAIRS[pair]
    pruning = Pruning(scorer(384), retainer(384, loaded.encoder.shape.layers))
    model = PrunedClassifier(loaded.encoder, Head(384, 2), pruning, loaded.tokenizer.sep_token_id).eval()
    if isinstance(pruning.scorer, ApproxAttention):
        pruning.scorer.initialise(loaded.encoder)
    with torch.no_grad():
        model.head.classifier.weight.mul_(20)
    texts = [f"{one} {two}" if place % 2 else one for place, one in enumerate(SENTENCES) for two in SENTENCES][:32]
    split = encode_texts(loaded.tokenizer, SENTENCES + texts, 48)
    for size in (1, 2, 7, 32):
        trace = assert_gathered_equals_masked(model, split.collate(range(size)))
        assert_the_sets_are_a_plan(trace)
        if size == 32:
            assert 0.05 < trace.retention.mean() < 0.9


@pytest.mark.parametrize("pair", PAIRS)
def test_gathered_equals_masked_with_the_weights_of_minilm(pair: str, minilm_directory: Path) -> None:
    assert_gathered_equals_masked_with_the_weights_of(minilm_directory, pair)


@pytest.mark.parametrize("pair", PAIRS)
def test_gathered_equals_masked_with_the_weights_of_gte_small(pair: str, shared_weights: Path) -> None:
    if not (shared_weights / "gte_small").is_dir():
        pytest.skip(f"no gte_small in {shared_weights}")
    assert_gathered_equals_masked_with_the_weights_of(shared_weights / "gte_small", pair)


@pytest.mark.parametrize("pair", PAIRS)
def test_fvcore_counts_the_closed_form_of_the_plan_and_of_the_attention_it_was_made_from(
    pair: str, random_classifier: Build, ragged_batch: Build
) -> None:
    model = planned(random_classifier, pair)
    assert check_flops(model, [ragged_batch(model, lengths) for lengths in ([23], [11, 1, 7])]) == 2
    batch = ragged_batch(model, LENGTHS)
    with torch.no_grad():
        trace = model(batch, "gathered").trace
    executed = dense = 0
    for row, n in enumerate(LENGTHS):
        for layer in trace.layers:
            k, o = int(layer.keys[row].sum()), int(layer.outputs[row].sum())
            executed += 2 * 64 * 64 * k + 2 * 64 * 64 * o + 2 * 64 * o * k + 2 * 64 * 256 * o
            dense += 4 * 64 * 64 * n + 2 * 64 * n * n + 2 * 64 * 256 * n
    assert cost_share(model, [batch]) == pytest.approx(executed / dense + pruner_share(model, batch), rel=1e-9)
    assert (cost_share(model, [batch]) < 1) == ("approx" in pair)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_loaded_model_gives_identical_logits_with_identical_settings(
    pair: str,
    random_classifier: Build,
    ragged_batch: Build,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    settings = {
        "approx_backtracking": {"k": 0.4, "k_base": "padded"},
        "exact_backtracking": {"k": 3.0, "k_base": "tokens"},
    }.get(pair, {"theta_init": -0.1, "temperature": 0.3, "floor": 0.1})
    ours = planned(random_classifier, pair, propagation=0.3, keeps_separators=True, **settings)
    ours.pruning.retainer.knob.add_(0.07)
    card = ModelCard("tiny", "tiny", ["a", "b", "c"], 40, False, 64, "sttabt", ["accuracy"])
    save_model(tmp_path / "model", ours, card, tiny_tokenizer)
    theirs, _ = load_model(tmp_path / "model")
    for part in ("scorer", "retainer"):
        one, two = getattr(ours.pruning, part), getattr(theirs.pruning, part)
        assert type(one) is type(two) and one.settings() == two.settings()
    batch = ragged_batch(ours, LENGTHS)
    with torch.no_grad():
        for execution in ("masked", "gathered"):
            assert torch.equal(theirs(batch, execution).logits, ours(batch, execution).logits)


@pytest.mark.parametrize("pair", [*PAIRS, "manual_topk"])
def test_an_evaluation_gives_the_means_of_sttabts_counting_too(
    pair: str, data: TaskData, random_classifier: Build
) -> None:
    sizes = {"outputs": 2, **TINY}
    if pair == "manual_topk":
        model = random_classifier(AttentionMass, TopKSchedule, **sizes)
    else:
        model = planned(random_classifier, pair, sizes=sizes)
    choice: Any = pair.partition("_")[2] if pair in PAIRS else pair
    split, expected = data.evaluation, {"encoder": 0.0, "approx": 0.0, "mask_update": 0.0}
    flops = evaluate(model, data.evaluation_batches(), ["accuracy"], 64).flops
    for row in range(len(split)):
        with torch.no_grad():
            trace = model(split.collate([row])).trace
        tokens = torch.cat([trace.counts("keys")[0, :1], trace.counts("outputs")[0]])
        expected["encoder"] += 1e-9 * sttabt_encoder_flops(tokens, 32, 128, 4).item() / len(split)
        update = sttabt_mask_update_flops(choice, tokens, split.lengths[row], 32, 4).item()
        expected["mask_update"] += 1e-9 * update / len(split)
        if "approx" in pair:
            approx = sttabt_approx_net_flops(split.lengths[row], 2, 32, 128, 4, 4).item()
            expected["approx"] += 1e-9 * approx / len(split)
    for name, value in expected.items():
        assert flops[f"gflops_sttabt_{name}"] == pytest.approx(value, rel=1e-9)
    unpruned = evaluate(model, data.evaluation_batches(), ["accuracy"], 64, prune=False).flops
    assert not any(name.startswith("gflops_sttabt") for name in unpruned)


FEW = SimpleNamespace(
    latency_batch_sizes=[1, 4], latency_examples=8, latency_rounds=1, fvcore_examples=1, attribution_examples=1
)


@pytest.mark.parametrize("pair", PAIRS)
def test_what_is_timed_of_a_plan_is_the_plan_that_the_served_model_runs_by(
    pair: str, data: TaskData, random_classifier: Build, ragged_batch: Build
) -> None:
    model = planned(random_classifier, pair, sizes={"outputs": 2, **TINY})
    served, batch = model.for_inference(), ragged_batch(model, LENGTHS, extra=2)
    with torch.inference_mode():
        plan, trace = make_plan(served, batch), served(batch, "gathered").trace
    assert isinstance(plan, Plan)
    for planned_for, decided in zip(plan.decisions, (trace.entry, *trace.decisions), strict=True):
        assert torch.equal(planned_for.keep, decided.keep)
    rows = latency(model, data.evaluation, FEW, "cpu")
    assert [row["batch_size"] for row in rows] == [1, 4] and all(row["plan_ms"] > 0 for row in rows)


def test_without_a_plan_none_is_timed(data: TaskData, random_classifier: Build) -> None:
    model = random_classifier(AttentionMass, TopKSchedule, outputs=2, **TINY)
    assert all("plan_ms" not in row for row in latency(model, data.evaluation, FEW, "cpu"))


# ApproxNet


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_the_approx_net_has_the_depth_and_the_heads_and_a_part_of_the_sizes(
    factor: int, random_classifier: Build
) -> None:
    model = random_classifier(partial(ApproxAttention, factor=factor), Backtracking)
    small, large = model.pruning.scorer.net.shape, model.encoder.shape
    assert (small.layers, small.heads, small.vocabulary) == (large.layers, large.heads, large.vocabulary)
    assert (small.dim, small.ff_dim) == (64 // factor, 256 // factor)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": 1}, r"scorer\.factor=1 must be at least 2 and divide the encoder's width 64"),
        ({"factor": 3}, r"scorer\.factor=3 must be at least 2 and divide the encoder's width 64"),
        ({"factor": 32}, r"scorer\.factor=32: 64 / 32 is not a multiple of 4 heads"),
    ],
)
def test_an_approx_net_that_cannot_be_is_refused(settings: Any, message: str, random_classifier: Build) -> None:
    with pytest.raises(ValueError, match=message):
        random_classifier(partial(ApproxAttention, **settings), Backtracking)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_weights_are_interpolated_along_both_axes(family: str, random_classifier: Build) -> None:
    """A matrix that rises evenly along both axes still does; what the axes have in common keeps its place."""
    model = planned(random_classifier, "approx_backtracking", family)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            axes = [torch.linspace(0, 1, steps=2 * size + 1)[1::2] for size in parameter.shape]
            ramp = axes[0] if len(axes) == 1 else axes[0][:, None] + 3 * axes[1]
            parameter.copy_(ramp)
    model.pruning.scorer.initialise(model.encoder)
    small, theirs = dict(model.pruning.scorer.net.named_parameters()), dict(model.encoder.named_parameters())
    assert small.keys() == theirs.keys()
    for name, parameter in small.items():
        sizes = [size // (4 if size in (64, 256) else 1) for size in theirs[name].shape]
        assert list(parameter.shape) == sizes
        middle = tuple(slice(size // 4, size - size // 4) if size > 3 else slice(None) for size in sizes)
        axes = [torch.linspace(0, 1, steps=2 * size + 1)[1::2] for size in sizes]
        ramp = axes[0] if len(axes) == 1 else axes[0][:, None] + 3 * axes[1]
        torch.testing.assert_close(parameter.detach()[middle], ramp[middle], atol=2e-3, rtol=0)


def test_random_initialisation_is_that_of_bert(random_classifier: Build) -> None:
    """Whatever the network was before."""
    model = random_classifier(partial(ApproxAttention, initialisation="random"), Backtracking)
    net = enlarged(model.pruning.scorer.net)
    model.pruning.scorer.initialise(model.encoder)
    assert all((layer.output_norm.weight == 1).all() and (layer.output_norm.bias == 0).all() for layer in net.layers)
    assert net.embeddings.word.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert all(layer.query.bias.abs().max() == 0 for layer in net.layers)


def error_of(model: PrunedClassifier, batch: Batch) -> tuple[float, float]:
    """Mean KL and mean squared error of the ApproxNet's attention."""
    with torch.no_grad():
        embeddings, layout = model.start(batch)
        pairs = list(
            zip(
                model.encoder.attention_scores(embeddings, layout),
                model.pruning.scorer.scores(model.encoder, embeddings, layout),
                strict=True,
            )
        )
        return tuple(
            float(torch.stack([error(one, two, batch.valid) for one, two in pairs]).mean())
            for error in (attention_kl, attention_mse)
        )


def test_interpolated_weights_attend_more_like_minilm_than_random_ones(minilm_directory: Path) -> None:
    loaded = loaded_once(minilm_directory)
    split = encode_texts(loaded.tokenizer, SENTENCES, 64)
    errors = {}
    for initialisation in ("random", "interpolated"):
        torch.manual_seed(0)
        pruning = Pruning(ApproxAttention(384, initialisation=initialisation), Backtracking(384, 6))
        model = PrunedClassifier(loaded.encoder, Head(384, 2), pruning, 102).eval()
        pruning.scorer.initialise(loaded.encoder)
        errors[initialisation] = error_of(model, split.collate(range(7)))
    assert errors["interpolated"][0] < errors["random"][0]


# Distillation


def scores_and_validity(seed: int) -> tuple[Tensor, Tensor, list[int]]:
    lengths = [5, 1, 3]
    valid = torch.arange(6) < torch.tensor(lengths)[:, None]
    scores = 2 * torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(seed))
    return scores.masked_fill(~valid[:, None, None, :], float("-inf")), valid, lengths


def test_the_divergence_and_the_error_of_attention_equal_loops_and_torch() -> None:
    (large, valid, lengths), (small, _, _) = scores_and_validity(0), scores_and_validity(1)
    kl, mse = attention_kl(large, small, valid).tolist(), attention_mse(large, small, valid).tolist()
    for row, n in enumerate(lengths):
        divergence = squares = 0.0
        for h in range(2):
            for j in range(n):
                ours, theirs = (one[row, h, j, :n].double().softmax(0).tolist() for one in (small, large))
                divergence += sum(a * (math.log(a) - math.log(b)) for a, b in zip(theirs, ours, strict=True))
                squares += sum((a - b) ** 2 for a, b in zip(theirs, ours, strict=True))
        assert kl[row] == pytest.approx(divergence / (2 * n), abs=1e-6)
        assert mse[row] == pytest.approx(squares / (2 * n * n), abs=1e-6)
        inside = (one[row, :, :n, :n].log_softmax(-1).flatten(0, 1) for one in (small, large))
        torchs = F.kl_div(*inside, reduction="batchmean", log_target=True).item()
        assert kl[row] == pytest.approx(torchs, abs=1e-6)


def test_the_divergence_is_zero_of_equal_attention_and_has_finite_gradients() -> None:
    large, valid, _ = scores_and_validity(0)
    assert attention_kl(large, large, valid).abs().max() < 1e-6
    assert attention_mse(large, large, valid).abs().max() == 0
    small = torch.zeros(3, 2, 6, 6, requires_grad=True)
    attention_kl(large, small.masked_fill(~valid[:, None, None, :], float("-inf")), valid).sum().backward()
    assert small.grad.isfinite().all() and small.grad[0].abs().max() > 0
    assert small.grad[~(valid[:, None, :, None] & valid[:, None, None, :]).expand_as(small)].abs().max() == 0


def prediction_by_hand(small: list[float], large: list[float], prediction: str) -> float:
    """L_pred of one text: −Σ softmax(z) log softmax(ẑ), or the mean squared distance of the probabilities (code)."""
    ours, theirs = ([math.exp(x) / sum(map(math.exp, z)) for x in z] for z in (small, large))
    if prediction == "paper":
        return -sum(y * math.log(x) for x, y in zip(ours, theirs, strict=True))
    return sum((x - y) ** 2 for x, y in zip(ours, theirs, strict=True)) / len(ours)


@pytest.mark.parametrize("prediction", ["paper", "code"])
def test_answers_are_compared_as_probabilities_or_as_scores(prediction: str) -> None:
    one = torch.tensor([[1.0, -1.0, 0.5], [0.0, 2.0, -1.5]])
    two = torch.tensor([[0.5, 0.0, -2.0], [1.0, 1.0, 0.25]])
    expected = sum(prediction_by_hand(a, b, prediction) for a, b in zip(one.tolist(), two.tolist(), strict=True)) / 2
    assert prediction_distance(one, two, prediction).item() == pytest.approx(expected)
    assert prediction_distance(one[:, :1], two[:, :1], prediction).item() == pytest.approx((0.25 + 1) / 2)


def distilling(build: Build, **settings: Any) -> ApproxDistillation:
    model = planned(build, "approx_backtracking")
    torch.manual_seed(5)
    return ApproxDistillation(model, ["accuracy"], torch.optim.AdamW, 1, None, **settings).eval()


def test_the_official_codes_distances_count_padding_and_leave_token_types_out(
    random_classifier: Build, ragged_batch: Build
) -> None:
    """Plain sums over every place of the padded batch, of the states that both networks have there."""
    method = distilling(random_classifier, hidden="code")
    model, net, batch = method.model, method.approx.net, ragged_batch(method.model, SHORT, extra=2)
    assert batch.token_type_ids.any()
    with torch.no_grad():
        terms = method.terms(batch)
        embeddings, layout = model.start(batch)
        start = net.embed(batch.input_ids, batch.token_type_ids, layout)
        untyped = net.embed(batch.input_ids, batch.token_type_ids * 0, layout)
        large = [embeddings, *model.encoder(embeddings, layout, wants_inner=True).layer_outputs]
        small = [start, *net(start, layout, wants_inner=True).layer_outputs]
        hidden, places = 0.0, batch.input_ids.numel()
        for layer in range(LAYERS):
            for row, place in product(range(len(SHORT)), range(batch.input_ids.shape[1])):
                gap = method.projections[layer + 1](small[layer][row, place]) - large[layer][row, place]
                hidden += float(gap.square().sum()) / (64 * places * LAYERS)
        embedding = float((method.projections[0](untyped) - embeddings).square().sum()) / (64 * places)
    assert terms.parts["hidden"].item() == pytest.approx(hidden, rel=1e-4)
    assert terms.parts["embedding"].item() == pytest.approx(embedding, rel=1e-4)


@pytest.mark.parametrize("prediction", ["paper", "code"])
@pytest.mark.parametrize("hidden", ["paper", "code"])
def test_every_loss_of_the_distillation_equals_a_plain_loop(
    hidden: str, prediction: str, random_transformer: Build, random_classifier: Build, ragged_batch: Build
) -> None:
    """The teacher's inner life is that of transformers; both run one text at a time, without padding.

    The official code's distances count padding, so its texts are of one length.
    """
    sizes, extra = ([9, 9, 9], 0) if hidden == "code" else (SHORT, 2)
    method = distilling(random_classifier, hidden=hidden, prediction=prediction)
    theirs = copy.deepcopy(random_transformer())
    theirs.set_attn_implementation("eager")
    model, net = method.model, method.approx.net
    batch = ragged_batch(model, sizes, extra=extra)
    expected = dict.fromkeys(("attention", "hidden", "embedding", "prediction"), 0.0)
    tokens = sum(sizes)
    with torch.no_grad():
        terms = method.terms(batch)
        for seed, n in enumerate(sizes):
            alone = ragged_batch(model, [n], seeds=[seed])
            large = theirs(
                input_ids=alone.input_ids,
                token_type_ids=alone.token_type_ids,
                attention_mask=alone.valid.long(),
                output_attentions=True,
                output_hidden_states=True,
            )
            layout = model.start(alone)[1]
            start = net.embed(alone.input_ids, alone.token_type_ids, layout)
            small = net(start, layout, wants_inner=True)
            states = [start, *small.layer_outputs]
            for number in range(LAYERS):
                for h in range(HEADS):
                    for j in range(n):
                        a = large.attentions[number][0, h, j].double()
                        b = small.scores[number][0, h, j].double().softmax(0)
                        expected["attention"] += float((a * (a.log() - b.log())).sum()) / (
                            HEADS * n * LAYERS * len(sizes)
                        )
                at = number + (hidden == "paper")
                gap = method.projections[number + 1](states[at]) - large.hidden_states[at]
                expected["hidden"] += float(gap.square().sum()) / (64 * tokens * LAYERS)
            types = alone.token_type_ids * (hidden == "paper")
            gap = method.projections[0](net.embed(alone.input_ids, types, layout)) - large.hidden_states[0]
            expected["embedding"] += float(gap.square().sum()) / (64 * tokens)
            answers = (method.small_head(small.first), model.head(large.hidden_states[-1][:, 0]))
            expected["prediction"] += prediction_by_hand(*(one[0].tolist() for one in answers), prediction) / len(sizes)
    assert {name: value.item() for name, value in terms.parts.items()} == pytest.approx(expected, rel=1e-4)
    assert terms.total.item() == pytest.approx(sum(expected.values()), rel=1e-4)


def test_only_the_approx_net_its_projections_and_its_head_are_taught_and_the_teacher_has_no_dropout(
    random_classifier: Build, ragged_batch: Build
) -> None:
    method = distilling(random_classifier)
    batch = ragged_batch(method.model, LENGTHS)
    calm = method.terms(batch).total.item()
    method.train()
    method.approx.net.eval()
    method.small_head.eval()
    terms = method.terms(batch)
    assert terms.total.item() == pytest.approx(calm, rel=1e-5) and method.model.encoder.training
    terms.total.backward()
    trained = {id(parameter) for _, parameter in method.trained_parameters()}
    for name, parameter in method.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in trained), name
        assert name.startswith(("model.pruning.scorer.net.", "projections.", "small_head.")) == (
            id(parameter) in trained
        )


# Training


@pytest.fixture
def data(tiny_task: Task, data_settings: Build) -> TaskData:
    return TaskData(tiny_task, data_settings(batch_size=16))


def tiny_model(tokenizer: PreTrainedTokenizerFast, pruning: Pruning | None) -> PrunedClassifier:
    torch.manual_seed(0)
    encoder = random_encoder(Backbone(name="tiny", random=RandomShape(layers=3)), tokenizer)
    return PrunedClassifier(encoder, Head(32, 2), pruning, tokenizer.sep_token_id)


def tiny_sttabt(
    tokenizer: PreTrainedTokenizerFast,
    pair: str = "approx_concrete",
    loss: STTABTLoss | None = None,
    factor: int = 4,
    initialisation: str = "interpolated",
    retainer: dict[str, Any] | None = None,
    teacher: PrunedClassifier | None = None,
    **settings: Any,
) -> STTABT:
    """STTABT on a random encoder; its dense teacher is trained first, unless one is given."""
    scorer, retain = PAIRS[pair]
    scorer = partial(scorer, factor=factor, initialisation=initialisation) if scorer is ApproxAttention else scorer
    model = tiny_model(tokenizer, Pruning(scorer(32), retain(32, 3, **(retainer or {}))))
    optimizer = partial(torch.optim.AdamW, lr=2e-3)
    dense = Finetune(teacher or tiny_model(tokenizer, None), ["accuracy"], optimizer, 1)
    settings = {"approx_epochs": 2, "soft_epochs": 1, "epochs": 1, **settings}
    return STTABT(
        model,
        ["accuracy"],
        optimizer,
        loss or STTABTLoss(),
        teacher=dense,
        teacher_is_trained=teacher is not None,
        initialises_student=True,
        **settings,
    )


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the stages that were trained, as it happens."""
    names: list[str] = []
    train = stages.train

    def recorded(stage: Any, *rest: Any) -> None:
        names.append(stage.name)
        train(stage, *rest)

    monkeypatch.setattr(stages, "train", recorded)
    return names


def trainer(**settings: Any) -> Build:
    quieten_lightning()
    quiet = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "log_every_n_steps": 1000}
    return partial(Trainer, **quiet, **settings)


def run_stages(method: STTABT, data: TaskData, directory: Path, until: str | None = None) -> None:
    """Run the stages as a run does, to the end or until one of them is done."""
    for stage in method.stages():
        run_stage(stage, stage.data or data, trainer(), [], directory)
        if stage.name == until:
            break


def weights_of(*modules: nn.Module) -> list[Tensor]:
    return [tensor.clone() for module in modules for tensor in module.state_dict().values()]


def all_equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(one, two) for one, two in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16-mixed", "gradient_clip_val": 1.0}], ids=str)
def test_the_stages_run_in_order_and_theta_is_learned_in_the_soft_one_alone(
    settings: dict[str, Any],
    trained: list[str],
    data: TaskData,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    method = tiny_sttabt(tiny_tokenizer, soft_epochs=1)
    model, theta = method.model, method.retainer.theta
    thetas, nets, encoders = [], [], []
    for stage in method.stages():
        run_stage(stage, data, trainer(**settings), [], tmp_path)
        thetas.append(theta.tolist())
        nets.append(weights_of(method.scorer.net))
        encoders.append(weights_of(model.encoder, model.head))
    assert trained == ["teacher", "approx", "soft", "hard"]
    assert thetas[0] == thetas[1] == [0.0] * 3 and thetas[2] == thetas[3]
    assert all(0 < abs(one) < 1 for one in thetas[2])
    assert not all_equal(nets[1], nets[0]) and all_equal(nets[2], nets[1]) and all_equal(nets[3], nets[1])
    assert all_equal(encoders[1], weights_of(method.dense.encoder, method.dense.head))
    assert not all_equal(encoders[2], encoders[1]) and not all_equal(encoders[3], encoders[2])
    assert not theta.requires_grad and method.findings["approximation"]["distilled"]["kl"] > 0


def test_each_stage_has_its_own_curves_and_rates(
    data: TaskData, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    method = tiny_sttabt(tiny_tokenizer, approx_lr=3e-3, pruner_lr=7e-3)
    curves, rates = {}, {}
    for stage in method.stages():
        run_stage(stage, data, trainer(), [], tmp_path)
        curves[stage.name] = set(stage.module.trainer.callback_metrics)
        groups = stage.module.trainer.optimizers[0].param_groups
        rates[stage.name] = {group["initial_lr"] for group in groups}
    selected = {"selection_accuracy", "selection_retention", "loss", "cross_entropy"}
    expected = {
        "teacher": selected,
        "approx": {"loss", "attention", "hidden", "embedding", "prediction"}
        | {"selection_attention_kl", "selection_attention_mse"},
        "soft": selected | {"theta", "mask", "soft_share"},
        "hard": selected | {"retention"},
    }
    assert curves == {stage: {f"{stage}/{name}" for name in names} for stage, names in expected.items()}
    assert rates == {"teacher": {2e-3}, "approx": {3e-3}, "soft": {2e-3, 7e-3}, "hard": {2e-3}}


def errors_on(data: TaskData, model: PrunedClassifier) -> Any:
    """KL and mean squared error of the ApproxNet on the selection slice, as findings have them."""
    model.eval()
    batches = list(data.val_dataloader())
    kl, mse = (sum(error_of(model, one)[k] * len(one.labels) for one in batches) for k in (0, 1))
    return pytest.approx({"kl": kl / len(data.selection), "mse": mse / len(data.selection)}, rel=1e-4)


def with_net(method: STTABT, start: PrunedClassifier, initialisation: str) -> PrunedClassifier:
    """The dense model of a method with an ApproxNet that has just been initialised from another model."""
    model = copy.deepcopy(method.model)
    scorer = ApproxAttention(32, initialisation=initialisation)
    scorer.attach(start.encoder)
    scorer.initialise(start.encoder)
    model.pruning.scorer = scorer
    model.start_from(method.dense)
    return model


def test_the_error_of_the_approx_net_is_found_before_and_after_its_distillation_which_lowers_it(
    data: TaskData, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    method = tiny_sttabt(tiny_tokenizer, "approx_backtracking", epochs=0, approx_epochs=3)
    run_stages(method, data, tmp_path)
    found = method.findings["approximation"]
    assert set(found) == {"untrained", "random", "distilled"}
    assert found["distilled"] == errors_on(data, method.model)
    assert found["untrained"] == errors_on(data, with_net(method, method.dense, "interpolated"))
    assert found["distilled"]["kl"] < 0.9 * min(found["untrained"]["kl"], found["random"]["kl"])


@pytest.mark.parametrize("initialisation", ["interpolated", "random"])
def test_an_approx_net_is_held_against_a_random_one_without_a_change_of_what_is_trained(
    initialisation: Any, data: TaskData, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    method = tiny_sttabt(tiny_tokenizer, "approx_backtracking", initialisation=initialisation)
    run_stages(method, data, tmp_path, until="teacher")
    at_random = with_net(method, method.dense, "random")
    torch.manual_seed(7)
    at_random.pruning.scorer.initialise(method.dense.encoder)
    after_a_draw = torch.get_rng_state()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    method.start_approx(data, torch.device("cpu"))
    found = method.distillation[0].findings["approximation"]
    if initialisation == "random":
        assert set(found) == {"untrained"} and found["untrained"] == errors_on(data, at_random)
        assert torch.equal(torch.get_rng_state(), after_a_draw)
    else:
        assert set(found) == {"untrained", "random"} and found["random"] == errors_on(data, at_random)
        assert torch.equal(torch.get_rng_state(), before)
        net = with_net(method, method.dense, "interpolated").pruning.scorer.net
        assert all_equal(weights_of(method.scorer.net), weights_of(net))


@pytest.fixture
def text(tmp_path: Path, data_settings: Build) -> TaskData:
    """Lines without labels, some of them empty, as +text=wikitext2 has them."""
    (tmp_path / "texts" / "lines").mkdir(parents=True)
    for split, rows in (("train", 90), ("validation", 20)):
        lines = [" ".join(TINY_WORDS[(row * k) % 16] for k in range(row % 9)) for row in range(rows)]
        pd.DataFrame({"text": lines}).to_parquet(tmp_path / "texts" / "lines" / f"{split}.parquet")
    task = Task(name="lines", text=["text"], label=None, metrics=[], directory="lines")
    return TaskData(task, data_settings(root=str(tmp_path / "texts"), batch_size=16))


def test_texts_teach_the_approx_net_first_by_the_pretrained_encoder_and_without_its_answers(
    text: TaskData,
    trained: list[str],
    data: TaskData,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teachers: dict[str, list[Tensor]] = {}
    starts: dict[str, list[Tensor]] = {}
    terms = ApproxDistillation.terms

    def recorded(self: ApproxDistillation, batch: Batch) -> Terms:
        teachers.setdefault(self.prefix, weights_of(self.model.encoder))
        starts.setdefault(self.prefix, weights_of(self.approx.net))
        return terms(self, batch)

    monkeypatch.setattr(ApproxDistillation, "terms", recorded)
    method = tiny_sttabt(tiny_tokenizer, text=text, approx_text_epochs=3)
    pretrained = copy.deepcopy(method.model)
    assert [stage.name for stage in method.stages()] == ["approx_text", "teacher", "approx", "soft", "hard"]
    assert [stage.data for stage in method.stages()] == [text, None, None, None, None]
    first, *_ = method.stages()
    assert (first.epochs, first.chooses_by, first.patience) == (3, "attention_kl", None)
    run_stages(method, data, tmp_path, until="approx_text")
    curves = set(first.module.trainer.callback_metrics)
    assert {"approx_text/attention", "approx_text/hidden", "approx_text/embedding"} <= curves
    assert "approx_text/prediction" not in curves
    taught = copy.deepcopy(method.model)
    run_stages(method, data, tmp_path)
    assert trained == ["approx_text", "teacher", "approx", "soft", "hard"]

    assert all_equal(teachers["approx_text"], weights_of(pretrained.encoder))
    assert all_equal(teachers["approx"], weights_of(method.dense.encoder))
    assert not all_equal(teachers["approx"], teachers["approx_text"])
    interpolated = with_net(method, pretrained, "interpolated")
    assert all_equal(starts["approx_text"], weights_of(interpolated.pruning.scorer.net))
    assert all_equal(starts["approx"], weights_of(taught.pruning.scorer.net))
    assert not all_equal(starts["approx"], starts["approx_text"])

    found = method.findings["approximation"]
    assert set(found) == {"untrained", "random", "after_text", "distilled"}
    assert found["untrained"] == errors_on(data, interpolated)
    taught.start_from(method.dense)
    assert found["after_text"] == errors_on(data, taught)
    assert found["distilled"]["kl"] < found["after_text"]["kl"] < found["untrained"]["kl"]


def test_a_run_that_goes_on_after_the_texts_finds_the_same_errors(
    text: TaskData, trained: list[str], data: TaskData, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    first, second = (tiny_sttabt(tiny_tokenizer, text=text) for _ in range(2))
    run_stages(first, data, tmp_path, until="approx")
    (tmp_path / "checkpoints" / "approx" / "weights.safetensors").unlink()
    run_stages(second, data, tmp_path, until="approx")
    assert trained == ["approx_text", "teacher", "approx"]  # and that one comes from the cache
    ours, theirs = (one.distillation[0].findings["approximation"] for one in (second, first))
    assert all(ours[name] == pytest.approx(theirs[name]) for name in ("untrained", "after_text"))


def test_distillation_brings_the_attention_nearer_and_does_not_touch_the_teacher(
    data: TaskData, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    method = tiny_sttabt(tiny_tokenizer, "approx_backtracking", approx_epochs=4, approx_lr=1e-2)
    run_stages(method, data, tmp_path, until="teacher")
    method.start_approx(data, torch.device("cpu"))
    before = weights_of(method.model.encoder, method.model.head)
    untrained = method.distillation[0].findings["approximation"]["untrained"]
    run_stages(method, data, tmp_path, until="approx")
    assert all_equal(weights_of(method.model.encoder, method.model.head), before)
    distilled = method.distillation[0].approximation_error(data, "cpu")
    lengths = data.selection.lengths
    by_batch = [(error_of(method.model.eval(), batch), batch) for batch in data.val_dataloader()]
    assert distilled["kl"] < 0.7 * untrained["kl"] and distilled["mse"] < untrained["mse"]
    assert sum(len(batch.labels) for _, batch in by_batch) == len(lengths)
    kl = sum(error[0] * len(batch.labels) for error, batch in by_batch) / len(lengths)
    assert distilled["kl"] == pytest.approx(kl, rel=1e-4)


@pytest.mark.parametrize(("patience", "epochs"), [(1, 2), (2, 3), (None, 6)])
def test_distillation_ends_when_the_attention_no_longer_gets_better(
    patience: int | None, epochs: int, data: TaskData, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """At a learning rate of 0 no epoch is better than the first."""
    method = tiny_sttabt(tiny_tokenizer, approx_lr=0.0, approx_patience=patience, approx_epochs=6)
    run_stages(method, data, tmp_path, until="approx")
    assert method.distillation[0].trainer.current_epoch == epochs


def test_one_approx_net_serves_every_k_but_no_other_factor_and_no_other_teacher(
    trained: list[str], data: TaskData, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    dense = tiny_model(tiny_tokenizer, None)
    with torch.no_grad():
        for parameter in dense.encoder.parameters():
            parameter += 0.05
    build = partial(tiny_sttabt, tiny_tokenizer, "approx_backtracking", teacher=dense, epochs=0, approx_epochs=1)
    first, second = build(), build(retainer={"k": 0.7})
    run_stages(first, data, tmp_path / "first")
    assert trained == ["approx"] and len(list(data.cache.glob("approxnets/*.safetensors"))) == 1
    run_stages(second, data, tmp_path / "second")
    assert trained == ["approx"] and second.retainer.knob == 0.7
    assert all_equal(weights_of(second.scorer), weights_of(first.scorer))
    run_stages(build(factor=8), data, tmp_path / "factor")
    run_stages(build(approx_prediction="code"), data, tmp_path / "prediction")
    assert trained == ["approx"] * 3
    with torch.no_grad():
        dense.head.classifier.bias += 0.1
    run_stages(build(), data, tmp_path / "teacher")
    assert trained == ["approx"] * 4 and len(list(data.cache.glob("approxnets/*.safetensors"))) == 4


def test_an_approx_net_is_known_by_all_that_shapes_its_training(data: TaskData, random_classifier: Build) -> None:
    def kept_at(outputs: int = 2, dropout: float = 0.1, **settings: Any) -> Path:
        model = planned(random_classifier, "approx_backtracking", sizes={"outputs": outputs, **TINY})
        net = model.pruning.scorer.net
        net.shape = replace(net.shape, dropout=dropout)
        method = ApproxDistillation(model, ["accuracy"], torch.optim.AdamW, 1, None, **settings)
        return method.shared_weights(data, trainer(max_epochs=1, logger=False, enable_checkpointing=False)())[0]

    paths = {kept_at(), kept_at(outputs=3), kept_at(prediction=None), kept_at(warmup_fraction=0.5)}
    assert len({*paths, kept_at(dropout=0.0)}) == 5 and kept_at() in paths
    assert kept_at(outputs=3, prediction=None) == kept_at(prediction=None)  # without answers the head plays no part


def test_the_distillation_warms_up_as_the_other_stages_do(random_classifier: Build) -> None:
    model = planned(random_classifier, "approx_concrete", sizes=TINY)
    method = STTABT(model, ["accuracy"], torch.optim.AdamW, STTABTLoss(), warmup_fraction=0.3)
    assert [stage.module.warmup_fraction for stage in method.stages()] == [0.3] * 3


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_the_rate_falls_or_stays_after_the_warm_up_in_every_stage_but_the_teachers(
    schedule: Any, data: TaskData, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    method = tiny_sttabt(tiny_tokenizer, schedule=schedule)
    for stage in method.stages():
        run_stages(method, data, tmp_path, until=stage.name)
        for group in stage.module.trainer.optimizers[0].param_groups:
            stays = schedule == "constant" and stage.name != "teacher"
            assert group["lr"] == (group["initial_lr"] if stays else pytest.approx(0, abs=1e-4))


def test_a_shorter_distillation_is_not_taken_for_the_whole_one(
    trained: list[str], data: TaskData, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """`epochs=1` (as in trainer=smoke) shortens every stage of a run after the method has built them."""
    build = partial(tiny_sttabt, tiny_tokenizer, "approx_backtracking", teacher=tiny_model(tiny_tokenizer, None))
    for stage in build(epochs=0).stages():
        run_stage(replace(stage, epochs=min(stage.epochs, 1)), data, trainer(), [], tmp_path / "short")
    run_stages(build(epochs=0), data, tmp_path / "whole")
    assert trained == ["approx", "approx"]


def test_stages_that_are_done_are_loaded(
    trained: list[str], data: TaskData, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    first, again, last = (tiny_sttabt(tiny_tokenizer, approx_epochs=1) for _ in range(3))
    run_stages(first, data, tmp_path)
    assert trained == ["teacher", "approx", "soft", "hard"]
    run_stages(again, data, tmp_path)
    assert len(trained) == 4 and again.findings == first.findings
    assert all_equal(weights_of(again.model), weights_of(first.model))
    (tmp_path / "checkpoints" / "hard" / "weights.safetensors").unlink()
    run_stages(last, data, tmp_path)
    assert trained[4:] == ["hard"] and last.retainer.theta.tolist() == first.retainer.theta.tolist()
    assert last.findings == first.findings and not last.retainer.theta.requires_grad
    assert not any(parameter.requires_grad for parameter in last.scorer.parameters())
    written = json.loads((tmp_path / "checkpoints" / "hard" / "findings.json").read_text())
    assert written == first.findings


@pytest.mark.parametrize("pair", ["approx_backtracking", "exact_backtracking"])
def test_back_tracking_without_epochs_prunes_the_dense_model_as_it_is(
    pair: str, trained: list[str], data: TaskData, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    method = tiny_sttabt(tiny_tokenizer, pair, epochs=0, approx_epochs=1)
    run_stages(method, data, tmp_path)
    assert trained == (["teacher", "approx"] if pair == "approx_backtracking" else ["teacher"])
    assert all_equal(
        weights_of(method.model.encoder, method.model.head), weights_of(method.dense.encoder, method.dense.head)
    )
    assert ("approximation" in method.findings) == (pair == "approx_backtracking")


def test_with_exact_attention_the_hard_stage_goes_on_from_the_soft_one(
    data: TaskData, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    method = tiny_sttabt(tiny_tokenizer, "exact_concrete", epochs=0)
    run_stages(method, data, tmp_path, until="soft")
    softened = weights_of(method.model.encoder, method.model.head)
    assert not all_equal(softened, weights_of(method.dense.encoder, method.dense.head))
    run_stages(method, data, tmp_path)
    assert all_equal(weights_of(method.model.encoder, method.model.head), softened)


def test_the_approx_net_trains_along_where_that_is_asked_for(
    data: TaskData, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rates = {"lr": 2e-3, "approx_lr": 3e-3, "pruner_lr": 7e-3}
    method = tiny_sttabt(tiny_tokenizer, trains_approx=True, approx_epochs=1, approx_lr=3e-3, pruner_lr=7e-3)
    run_stages(method, data, tmp_path, until="approx")
    distilled = weights_of(method.scorer)
    run_stages(method, data, tmp_path, until="soft")
    assert not all_equal(weights_of(method.scorer), distilled)
    taught = {
        id(one): group["initial_lr"] for group in method.trainer.optimizers[0].param_groups for one in group["params"]
    }
    for part, name in ((method.scorer.net, "approx_lr"), (method.retainer, "pruner_lr"), (method.model.encoder, "lr")):
        assert {taught[id(one)] for one in part.parameters()} == {rates[name]}


@pytest.mark.parametrize(
    ("pair", "epochs"), [("approx_backtracking", 0), ("approx_backtracking", 1), ("approx_concrete", 1)]
)
def test_after_training_at_a_budget_the_model_costs_it(
    pair: str, epochs: int, data: TaskData, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    method = tiny_sttabt(tiny_tokenizer, pair, budget=0.6, epochs=epochs, approx_epochs=1)
    run_stages(method, data, tmp_path)
    assert cost_share(method.model, method.calibration) == pytest.approx(0.6, abs=0.03)
    assert cost_share(method.model, data.evaluation_batches()) == pytest.approx(0.6, abs=0.05)


def random_sttabt(build: Build, loss: STTABTLoss, budget: float | None = None, **settings: Any) -> STTABT:
    """STTABT on large random weights, whose answers change with every token, without dropout."""
    sizes = {"outputs": 2, **TINY}
    model = planned(build, "approx_concrete", sizes=sizes, theta_init=-0.4, temperature=0.5)
    return STTABT(model, ["accuracy"], torch.optim.AdamW, loss, budget=budget, **settings).eval()


@pytest.mark.parametrize("layers", ["paper", "code"])
def test_the_loss_of_the_soft_stage_is_eq_6(layers: Any, data: TaskData, random_classifier: Build) -> None:
    method = random_sttabt(random_classifier, STTABTLoss(lam_theta=0.3, lam_mask=11.0, mask_layers=layers))
    method.learns_theta = True
    batch = data.train.collate([3, 11, 40, 117])
    terms, output = method.terms(batch), relaxed(method.model, batch)
    lengths, log_probabilities = batch.valid.sum(1).tolist(), output.logits.log_softmax(-1).tolist()
    cross_entropy = -sum(row[label] for row, label in zip(log_probabilities, batch.labels.tolist(), strict=True)) / 4
    theta = sum((one + 0.4) ** 2 for one in THETAS[-2:])
    plans = [
        [one.soft[row, :n].tolist() for one in (output.trace.entry, *output.trace.decisions)]
        for row, n in enumerate(lengths)
    ]
    assert all(plan[-1] == [1.0] + [0.0] * (n - 1) for plan, n in zip(plans, lengths, strict=True))
    mean = sum(mean_mask_by_hand(plan, layers) for plan in plans) / 4
    mask = (mean - 1 / (1 + math.exp(0.4))) ** 2
    assert terms.total.item() == pytest.approx(cross_entropy + 0.3 * theta + 11.0 * mask, rel=1e-5)
    assert terms.parts["mask"].item() == pytest.approx(mask, rel=1e-4) and mask > 0.001
    assert mean_mask(*soft_masks(output.trace), layers).item() == pytest.approx(mean, rel=1e-5)


def test_every_theta_has_its_mask_in_eq_6_and_in_the_official_codes_mean_all_but_the_first(
    random_classifier: Build, ragged_batch: Build
) -> None:
    model = planned(random_classifier, "exact_concrete", temperature=0.5)
    gradients = {}
    for layers in ("paper", "code"):
        model.pruning.retainer.theta.grad = None
        mean_mask(*soft_masks(relaxed(model, ragged_batch(model, LENGTHS)).trace), layers).backward()
        gradients[layers] = model.pruning.retainer.theta.grad.abs().tolist()
    assert min(gradients["paper"]) > 1e-4
    assert gradients["code"][0] == 0 and min(gradients["code"][1:]) > 1e-4


@pytest.mark.parametrize("layers", ["paper", "code"])
def test_the_regularisers_go_on_under_the_hard_plan_where_that_is_asked_for_and_move_theta_alone(
    layers: Any, data: TaskData, random_classifier: Build
) -> None:
    loss = STTABTLoss(lam_theta=0.3, lam_mask=11.0, mask_layers=layers)
    method = random_sttabt(random_classifier, loss, regularises_hard=True)
    batch = data.train.collate([3, 11, 40, 117])
    terms, output = method.terms(batch), method.model(batch)
    plan, lengths = soft_masks(relaxed(method.model, batch).trace)
    by_text = [[mask[row, :n].tolist() for mask in plan] for row, n in enumerate(lengths.tolist())]
    mask = (sum(mean_mask_by_hand(one, layers) for one in by_text) / 4 - 1 / (1 + math.exp(0.4))) ** 2
    theta = sum((one + 0.4) ** 2 for one in THETAS[-2:])
    cross_entropy = F.cross_entropy(output.logits, batch.labels).item()
    assert output.trace.retention.mean() < 0.9  # hard masks, not soft ones, are in the task's loss
    assert terms.parts["cross_entropy"].item() == pytest.approx(cross_entropy, rel=1e-5)
    assert terms.total.item() == pytest.approx(cross_entropy + 0.3 * theta + 11.0 * mask, rel=1e-5)
    encoder, theta_of = method.model.encoder, method.retainer.theta
    (terms.total - terms.parts["cross_entropy"]).backward(retain_graph=True)
    assert theta_of.grad.abs().min() > 1e-4 and all(
        one.grad is None or not one.grad.any() for one in encoder.parameters()
    )
    theta_of.grad = None
    terms.parts["cross_entropy"].backward()
    assert theta_of.grad is None and encoder.layers[0].value.weight.grad.abs().max() > 0


@pytest.mark.parametrize("regularises", [False, True])
def test_theta_moves_in_the_hard_stage_only_where_the_regularisers_go_on(
    regularises: bool, data: TaskData, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    method = tiny_sttabt(tiny_tokenizer, approx_epochs=1, regularises_hard=regularises)
    run_stages(method, data, tmp_path, until="soft")
    before = method.retainer.theta.detach().clone()
    run_stages(method, data, tmp_path)
    assert torch.equal(method.retainer.theta, before) != regularises


def test_with_a_budget_the_squared_distance_from_it_takes_the_place_of_the_masks_term(
    data: TaskData, random_classifier: Build
) -> None:
    method = random_sttabt(random_classifier, STTABTLoss(lam_theta=0.3, lam_mask=100.0, budget_weight=7.0), budget=0.2)
    method.learns_theta = True
    batch = data.train.collate([3, 11, 40, 117])
    terms, output = method.terms(batch), relaxed(method.model, batch)
    cost = dense = 0.0
    for row, n in enumerate(batch.valid.sum(1).tolist()):
        masks = [one.soft[row].tolist() for one in (output.trace.entry, *output.trace.decisions)]
        for keys, outputs in ((sum(masks[0]), sum(masks[1])), (sum(masks[1]), sum(masks[2]))):
            cost += 2 * 32 * 32 * (keys + outputs) + 2 * 32 * keys * outputs + 2 * 32 * 128 * outputs
            dense += 4 * 32 * 32 * n + 2 * 32 * n * n + 2 * 32 * 128 * n
    cost += pruner_share(method.model, batch) * dense
    assert terms.parts["soft_share"].item() == pytest.approx(cost / dense, rel=1e-5)
    theta = sum((one + 0.4) ** 2 for one in THETAS[-2:])
    expected = F.cross_entropy(output.logits, batch.labels).item() + 0.3 * theta + 7 * (cost / dense - 0.2) ** 2
    assert terms.total.item() == pytest.approx(expected, rel=1e-5) and "mask" not in terms.parts


@pytest.mark.parametrize("pair", PAIRS)
def test_the_hard_stages_loss_is_the_task_loss_under_the_plan(
    pair: str, data: TaskData, random_classifier: Build
) -> None:
    model = planned(random_classifier, pair, sizes={"outputs": 2, **TINY})
    method = STTABT(model, ["accuracy"], torch.optim.AdamW, STTABTLoss()).eval()
    batch = data.train.collate([3, 11, 40, 117])
    with torch.no_grad():
        expected = F.cross_entropy(model(batch).logits, batch.labels)
        terms = method.terms(batch)
    assert terms.total.item() == terms.parts["cross_entropy"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert terms.parts["retention"] < 0.9


def test_the_stages_are_named_in_order(random_classifier: Build) -> None:
    expected = {
        "approx_backtracking": [("approx", 6), ("hard", 5)],
        "approx_concrete": [("approx", 6), ("soft", 3), ("hard", 5)],
        "exact_backtracking": [("hard", 5)],
        "exact_concrete": [("soft", 3), ("hard", 5)],
    }
    for pair, named in expected.items():
        model = planned(random_classifier, pair, sizes=TINY)
        settings = {"approx_epochs": 6, "soft_epochs": 3, "epochs": 5, "approx_patience": 2}
        method = STTABT(model, ["accuracy"], torch.optim.AdamW, STTABTLoss(), **settings)
        assert [(stage.name, stage.epochs) for stage in method.stages()] == named
        for stage in method.stages():
            if stage.name == "approx":
                assert (stage.chooses_by, stage.patience, stage.keeps) == ("attention_kl", 2, "best")


# Settings


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(Backtracking, 8, 4, k=0.0), r"retainer\.k=0\.0 must be above 0 and at most 1"),
        (partial(Backtracking, 8, 4, k=1.5), r"retainer\.k=1\.5 must be above 0 and at most 1; k_base=tokens makes it"),
        (partial(Backtracking, 8, 4, k=2.5, k_base="tokens"), r"retainer\.k=2\.5 with k_base=tokens is a number of"),
        (
            partial(Backtracking, 8, 4, k=0.0, k_base="tokens"),
            r"retainer\.k=0\.0 with k_base=tokens is a number of tokens",
        ),
        (partial(Backtracking, 8, 4, propagation=1.5), r"retainer\.propagation=1\.5 must lie between 0 and 1"),
        (partial(Concrete, 8, 4, propagation=-0.1), r"retainer\.propagation=-0\.1 must lie between 0 and 1"),
        (partial(Concrete, 8, 4, temperature=0.0), r"retainer\.temperature=0\.0 must be above 0"),
        (partial(Concrete, 8, 4, floor=0.0), r"retainer\.floor=0\.0 must lie between 0 and 1"),
        (partial(STTABTLoss, lam_theta=-1.0), r"loss\.lam_theta=-1\.0 must not be negative"),
        (partial(STTABTLoss, lam_mask=-1.0), r"loss\.lam_mask=-1\.0 must not be negative"),
        (partial(STTABTLoss, budget_weight=-1.0), r"loss\.budget_weight=-1\.0 must not be negative"),
        (lambda: Pruning(AttentionMass(8), Backtracking(8, 4)), "AttentionMass and Backtracking do not fit"),
        (lambda: Pruning(ExactAttention(8), StaticRatio(8, 4)), "ExactAttention and StaticRatio do not fit"),
    ],
)
def test_a_setting_out_of_its_bounds_is_refused_by_its_key(build: Build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("soft_epochs", 0, 1),
        ("approx_epochs", 0, 1),
        ("approx_text_epochs", 0, 1),
        ("approx_patience", -1, 0),
        ("approx_lr", -1e-3, 0),
    ],
)
def test_a_setting_of_the_method_out_of_its_bounds_is_refused_by_its_key(
    name: str, value: Any, least: int, random_classifier: Build
) -> None:
    model = planned(random_classifier, "approx_concrete", sizes=TINY)
    with pytest.raises(ValueError, match=rf"method\.{name}={value} must be at least {least}"):
        STTABT(model, ["accuracy"], torch.optim.AdamW, STTABTLoss(), **{name: value})
    STTABT(model, ["accuracy"], torch.optim.AdamW, STTABTLoss(), **{name: type(value)(least)})


def test_a_method_that_does_not_plan_is_refused(random_classifier: Build) -> None:
    model = random_classifier(AttentionMass, StaticRatio, **TINY)
    with pytest.raises(ValueError, match="sttabt plans ahead: retainer=backtracking or concrete"):
        STTABT(model, ["accuracy"], torch.optim.AdamW, STTABTLoss())


@pytest.mark.parametrize("scorer", ["approx_attention", "exact_attention"])
@pytest.mark.parametrize("retainer", ["backtracking", "concrete"])
def test_sttabt_takes_its_scorers_with_its_retainers(scorer: str, retainer: str) -> None:
    assert problems("+method=sttabt", f"scorer={scorer}", f"retainer={retainer}") == []
    with_budget = problems("+method=sttabt", f"scorer={scorer}", f"retainer={retainer}", "budget=0.5", "epochs=1")
    assert [line.partition(",")[0] for line in with_budget] == [
        "scorer=exact_attention costs a whole unpruned pass"
    ] * (scorer == "exact_attention")


NO_TEXT = "text is what an ApproxNet is distilled on: choose +method=sttabt scorer=approx_attention, or no text"
FIT = "scorer=approx_attention and exact_attention go with retainer=backtracking and concrete, and with no other"


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["+method=sttabt", "scorer=token_saliency"], FIT),
        (["+method=sttabt", "scorer=attention_mass", "retainer=backtracking"], FIT),
        (["+method=adtp", "scorer=approx_attention"], FIT),
        (["+method=adtp", "scorer=exact_attention"], FIT),
        (["+method=sttabt", "scorer=random", "retainer=topk"], "sttabt prunes with retainer=backtracking or concrete"),
        (["+method=sttabt", "loss=ltp"], "sttabt has a loss of its own: loss=sttabt"),
        (["+method=sttabt", "scorer.initialisation=no"], "scorer.initialisation=no: must be random or interpolated"),
        (["+method=sttabt", "method.approx_hidden=both"], "method.approx_hidden=both: must be paper or code"),
        (["+method=sttabt", "method.approx_prediction=mse"], "method.approx_prediction=mse: must be paper or code"),
        (["+method=sttabt", "method.schedule=cosine"], "method.schedule=cosine: must be linear or constant"),
        *(
            (
                ["+method=sttabt", "method.regularises_hard=true", other],
                "method.regularises_hard=true moves θ under a hard plan: it needs retainer=concrete, and no budget",
            )
            for other in ("retainer=backtracking", "budget=0.5")
        ),
        (["+method=sttabt", "loss.mask_layers=all"], "loss.mask_layers=all: must be paper or code"),
        (
            ["+method=sttabt", "retainer=backtracking", "retainer.k_base=all"],
            "retainer.k_base=all: must be valid, padded, tokens or dynamic",
        ),
        (
            ["+method=sttabt", "retainer=backtracking", "method.trains_approx=true"],
            "method.trains_approx=true needs masks that carry a gradient: choose retainer=concrete",
        ),
        (
            ["+method=sttabt", "scorer=exact_attention", "method.trains_approx=true"],
            "method.trains_approx=true trains an ApproxNet, and scorer=exact_attention has none: choose "
            "approx_attention",
        ),
        *(
            (
                ["+method=sttabt", "retainer=backtracking", f"retainer.k_base={k_base}", "budget=0.5"],
                "a budget is met by k as a share of the real tokens: set retainer.k_base=valid, or no budget",
            )
            for k_base in ("padded", "dynamic")
        ),
        (["+method=sttabt", "scorer=exact_attention", "+text=wikitext2"], NO_TEXT),
        (["+method=ltp", "+text=wikitext2"], NO_TEXT),
        (["+method=sttabt", "retainer=topk"], "sttabt prunes with retainer=backtracking or concrete"),
        (
            ["+method=adtp", "retainer=concrete"],
            "adtp prunes with retainer=adaptive or nucleus or min_p or static or random",
        ),
        (["+method=ltp", "retainer=backtracking"], "ltp prunes with retainer=learned_threshold"),
    ],
)
def test_parts_that_do_not_fit_are_one_problem(overrides: list[str], problem: str) -> None:
    assert problems(*overrides) == [problem]
