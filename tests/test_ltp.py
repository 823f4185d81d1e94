"""LTP against loops written from its equations, on transformers' own layers: scores, masks, losses, training."""

import copy
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gathered import (
    SENTENCES,
    assert_gathered_equals_masked,
    assert_gathered_has_the_gradients_of_masked,
    loaded_once,
)
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from tokprune_exp.data.batch import Batch
from tokprune_exp.data.batches import BatchLoader
from tokprune_exp.data.module import TaskData
from tokprune_exp.data.task import Task
from tokprune_exp.data.tokenise import encode_texts
from tokprune_exp.encoder.backbone import Backbone, RandomShape
from tokprune_exp.encoder.encoder import EncoderShape, PrunedEncoder
from tokprune_exp.encoder.layout import Padded, Sequences, Wants
from tokprune_exp.encoder.pretrained import random_encoder
from tokprune_exp.encoder.trace import Decision, LayerTrace, PruningTrace
from tokprune_exp.head import Head
from tokprune_exp.losses import LTPLoss, token_penalty
from tokprune_exp.measure.evaluation import check_flops
from tokprune_exp.methods.budget import cost_share, dense_cost, soft_cost, soft_cost_share
from tokprune_exp.methods.finetune import Finetune
from tokprune_exp.methods.hard import HardPruning
from tokprune_exp.methods.ltp import LTP
from tokprune_exp.model import ClassifierOutput, PrunedClassifier
from tokprune_exp.pruning.pruning import Pruning
from tokprune_exp.pruning.retainers import LearnedThreshold, ManualThreshold, StaticRatio, TopKSchedule
from tokprune_exp.pruning.scorers import AttentionMass
from tokprune_exp.stages import run_stage
from tokprune_exp.tracking import quieten_lightning

LENGTHS = [23, 1, 2, 3, 40, 11, 5]
LAYERS = 4
OFFSETS = [0.001, 0.001, -0.001, 0.0005]
"""What the thresholds are taken to have learned."""
TINY = {"layers": 2, "dim": 32, "heads": 4}

Build = Callable[..., Any]


def by_constant(dim: int) -> AttentionMass:
    return AttentionMass(dim, normalisation="constant")


def ltp_model(
    build: Build, normalisation: str = "constant", offsets: list[float] | None = None, **settings: Any
) -> Any:
    """A random classifier with learned thresholds; its offsets are set, since `build` makes them far too large."""
    sizes = settings.pop("sizes", {})
    model = build(partial(AttentionMass, normalisation=normalisation), partial(LearnedThreshold, **settings), **sizes)
    learned = model.pruning.retainer
    with torch.no_grad():
        learned.offset.copy_(torch.zeros(len(learned.offset)) if offsets is None else torch.tensor(offsets))
    return model


def relaxed(model: PrunedClassifier, batch: Batch) -> ClassifierOutput:
    with model.pruning.retainer.relaxed():
        return model(batch)


def thresholds_by_hand(offsets: list[float], final: float = 0.01, first: int = 1) -> list[float]:
    return [final * (layer + first) / len(offsets) + offset for layer, offset in enumerate(offsets)]


def by_hand(
    theirs: Any,
    ids: Tensor,
    types: Tensor,
    thresholds: Tensor | list[float],
    norm: int | None = 128,
    mode: str = "hard",
    temperature: float = 1e-3,
    frozen: list[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """LTP of one text, in double precision: [CLS] after the last layer; scores, hard and soft masks of every layer.

    `norm=None` divides by the alive tokens. With `mode=gated` a token is worth its soft mask to all later layers. With
    `mode=straight_through` tokens are dropped by their mask, which moves with the soft one from its value in `frozen`.
    """
    hidden = theirs.embeddings(input_ids=ids[None], token_type_ids=types[None])
    gate, alive = torch.ones(len(ids), dtype=torch.float64), torch.ones(len(ids), dtype=torch.bool)
    scores, hard, soft = [], [], []
    for layer, block in enumerate(theirs.encoder.layer):
        attention = block.attention.self
        heads = (1, -1, attention.num_attention_heads, attention.attention_head_size)
        query, key, value = (
            linear(hidden).view(heads).transpose(1, 2) for linear in (attention.query, attention.key, attention.value)
        )
        products = query @ key.transpose(2, 3) / math.sqrt(attention.attention_head_size)
        weights = (products - products.amax(-1, keepdim=True)).exp() * gate
        weights = weights / weights.sum(-1, keepdim=True)
        s = (weights[0] * gate[:, None]).sum(1).sum(0) / heads[2] / (norm or int(alive.sum()))
        s = torch.where(alive, s, torch.zeros_like(s))
        m = torch.where(alive, 1 / (1 + (-(s - thresholds[layer]) / temperature).exp()), torch.zeros_like(s))
        m = torch.cat([torch.ones(1, dtype=torch.float64), m[1:]])
        keep = alive & (s > thresholds[layer])
        keep[0] = True
        attended = block.attention.output((weights @ value).transpose(1, 2).flatten(2), hidden)
        hidden = block.output(block.intermediate(attended), attended)
        if mode == "soft":
            hidden = hidden * m[None, :, None]
        elif mode == "gated":
            gate = gate * m
        else:
            alive, gate = keep, gate * (keep + (0.0 if frozen is None else m - frozen[layer]))
        scores.append(s)
        hard.append(keep)
        soft.append(m)
    return hidden[:, 0], scores, hard, soft


def doubled(module: nn.Module) -> Any:
    return copy.deepcopy(module).double()


def rows_of(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Ids and types of every sequence, without padding."""
    lengths = batch.valid.sum(1).tolist()
    return [(batch.input_ids[row, :n], batch.token_type_ids[row, :n]) for row, n in enumerate(lengths)]


# The scores (eq. 7)


@pytest.mark.parametrize("execution", ["masked", "gathered"])
@pytest.mark.parametrize("normalisation", ["constant", "length"])
def test_the_importance_of_an_unpruned_token_is_the_attention_that_transformers_gives_it(
    normalisation: str, execution: str, random_transformer: Build, random_classifier: Build, ragged_batch: Build
) -> None:
    model = ltp_model(random_classifier, normalisation, offsets=[-1.0] * LAYERS)
    theirs = copy.deepcopy(random_transformer())
    theirs.set_attn_implementation("eager")
    batch = ragged_batch(model, LENGTHS, extra=2)
    with torch.no_grad():
        trace = model(batch, execution).trace
        attentions = theirs(
            input_ids=batch.input_ids,
            token_type_ids=batch.token_type_ids,
            attention_mask=batch.valid.long(),
            output_attentions=True,
        ).attentions
    assert (trace.retention == 1).all()
    for layer, attention in zip(trace.layers, attentions, strict=True):
        for row, length in enumerate(LENGTHS):
            norm = 128 if normalisation == "constant" else length
            expected = [
                sum(float(attention[row, h, j, i]) for h in range(4) for j in range(length)) / (4 * norm)
                for i in range(length)
            ]
            assert layer.importance[row].tolist() == pytest.approx(expected + [0] * (42 - length), abs=1e-5)


@pytest.mark.parametrize("execution", ["masked", "gathered"])
@pytest.mark.parametrize("normalisation", ["constant", "length"])
def test_the_scores_of_a_layer_sum_to_the_tokens_it_attends_to(
    normalisation: str, execution: str, random_classifier: Build, ragged_batch: Build
) -> None:
    final = 0.01 if normalisation == "constant" else 0.05
    model = ltp_model(random_classifier, normalisation, final_threshold=final)
    with torch.no_grad():
        trace = model(ragged_batch(model, LENGTHS, extra=3), execution).trace
    alive = trace.counts("keys")
    assert (alive[4].diff() < 0).all()
    expected = alive / 128 if normalisation == "constant" else torch.ones(alive.shape)
    sums = torch.stack([layer.importance.sum(1) for layer in trace.layers], dim=1)
    torch.testing.assert_close(sums, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("theta", [0.03, 0.1, 0.3])
def test_divided_by_the_length_at_most_one_over_theta_tokens_lie_above_theta(
    theta: float, random_classifier: Build, ragged_batch: Build
) -> None:
    offsets = [theta - 0.01 * layer / LAYERS for layer in range(1, LAYERS + 1)]
    model = ltp_model(random_classifier, "length", offsets=offsets)
    with torch.no_grad():
        trace = model(ragged_batch(model, LENGTHS)).trace
    for layer in trace.layers:
        above = (layer.importance > theta).sum(1)
        assert above.max() <= math.floor(1 / theta)
        assert (layer.outputs.sum(1) <= above + 1).all()


@pytest.mark.parametrize("mode", ["hard", "soft", "gated", "straight_through", "manual", "topk"])
@pytest.mark.parametrize("execution", ["masked", "gathered"])
def test_padding_changes_no_score_no_mask_and_no_logit(
    execution: str, mode: str, random_classifier: Build, ragged_batch: Build
) -> None:
    if mode in ("manual", "topk"):
        model = random_classifier(by_constant, ManualThreshold if mode == "manual" else TopKSchedule)
    else:
        model = ltp_model(random_classifier, relaxation="soft" if mode == "hard" else mode, offsets=OFFSETS)
        model.pruning.retainer.is_relaxed = mode != "hard"
    if execution == "gathered" and mode in ("gated", "straight_through"):
        with pytest.raises(ValueError, match="a gate needs the masked layout"):
            model(ragged_batch(model, LENGTHS), execution)
        return
    with torch.no_grad():
        narrow, wide = (model(ragged_batch(model, LENGTHS, extra), execution) for extra in (0, 19))
    torch.testing.assert_close(wide.logits, narrow.logits, atol=1e-5, rtol=0)
    for ours, theirs in zip(wide.trace.layers, narrow.trace.layers, strict=True):
        assert torch.equal(ours.outputs, F.pad(theirs.outputs, (0, 19)))
        torch.testing.assert_close(ours.importance, F.pad(theirs.importance, (0, 19)), atol=1e-6, rtol=1e-5)
        if mode in ("soft", "gated", "straight_through"):
            torch.testing.assert_close(ours.decision.soft, F.pad(theirs.decision.soft, (0, 19)), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("execution", "learns", "relaxation"),
    [("masked", True, "soft"), ("gathered", False, "soft"), ("gathered", True, "soft"), ("masked", True, "gated")],
)
def test_under_bf16_autocast_too_scores_sum_to_the_tokens_that_attend_and_differ_from_one_another(
    execution: str, learns: bool, relaxation: Any, random_classifier: Build, ragged_batch: Build
) -> None:
    """Weights that were rounded to bf16 sum to 1 within 0.4 % and give one score to many of 40 tokens."""
    offsets = None if relaxation == "gated" else [-1.0] * LAYERS
    model = ltp_model(random_classifier, offsets=offsets, relaxation=relaxation, temperature=5e-3)
    model.pruning.retainer.is_relaxed = relaxation == "gated"
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(learns):
        trace = model(ragged_batch(model, LENGTHS, extra=3), execution).trace
    attending = trace.valid.float()
    for layer in trace.layers:
        assert layer.importance is not None and layer.decision is not None
        torch.testing.assert_close(layer.importance.sum(1), attending.sum(1) / 128, atol=1e-5, rtol=0)
        assert all(len(layer.importance[row, :n].unique()) == n for row, n in enumerate(LENGTHS))
        if layer.decision.gate is not None:
            attending = attending * layer.decision.gate
    assert (attending[4].sum() < 30) == (relaxation == "gated")


def test_in_double_precision_scores_are_summed_in_it(random_classifier: Build, ragged_batch: Build) -> None:
    model = doubled(ltp_model(random_classifier))
    encoder, layout = model.encoder, Padded.start(Sequences(*2 * [ragged_batch(model, LENGTHS).valid]))
    hidden = torch.randn(7, 40, encoder.shape.dim, dtype=torch.float64)
    attended = encoder.layers[0].attend(hidden, hidden, layout, layout, Wants(received=True))
    assert attended.received.dtype == attended.context.dtype == torch.float64


# Hard masks (eq. 8)


@pytest.mark.parametrize("retainer", [LearnedThreshold, ManualThreshold])
@pytest.mark.parametrize(
    ("rise", "expected"),
    [("paper", [0.0025, 0.005, 0.0075, 0.01]), ("code", [0.0, 0.0025, 0.005, 0.0075])],
)
def test_thresholds_start_on_a_line(rise: Any, expected: list[float], retainer: Build) -> None:
    assert retainer(8, 4, rise=rise).thresholds.tolist() == pytest.approx(expected)
    doubled_end = retainer(8, 4, rise=rise, final_threshold=0.02).thresholds
    assert doubled_end.tolist() == pytest.approx([2 * theta for theta in expected])


def test_what_was_learned_is_added_to_a_threshold_and_the_knob_multiplies_it() -> None:
    learned = LearnedThreshold(8, 4)
    with torch.no_grad():
        learned.offset.copy_(torch.tensor(OFFSETS))
    theirs = thresholds_by_hand(OFFSETS)
    assert learned.thresholds.tolist() == pytest.approx(theirs)
    learned.knob.fill_(math.log(3))
    assert learned.thresholds.tolist() == pytest.approx([3 * theta for theta in theirs])


@pytest.mark.parametrize("rise", ["paper", "code"])
@pytest.mark.parametrize(("normalisation", "final"), [("constant", 0.01), ("length", 0.06)])
def test_scores_masks_and_logits_equal_a_plain_loop_over_the_layers_of_transformers(
    normalisation: str,
    final: float,
    rise: str,
    random_transformer: Build,
    random_classifier: Build,
    ragged_batch: Build,
) -> None:
    model = ltp_model(random_classifier, normalisation, OFFSETS, final_threshold=final, rise=rise)
    theirs, head = doubled(random_transformer()), doubled(model.head)
    thresholds = thresholds_by_hand(OFFSETS, final, first=int(rise == "paper"))
    if rise == "code":
        thresholds[0] = -1.0  # its first layer prunes nothing, whatever its offset
    batch = ragged_batch(model, LENGTHS, extra=1)
    pruned = [0] * LAYERS
    with torch.no_grad():
        outputs = [model(batch), model(batch, "gathered")]
        for row, (ids, types) in enumerate(rows_of(batch)):
            norm = 128 if normalisation == "constant" else None
            first, scores, masks, _ = by_hand(theirs, ids, types, thresholds, norm)
            for output in outputs:
                torch.testing.assert_close(output.logits[row].double(), head(first)[0], atol=1e-5, rtol=0)
                for number, layer in enumerate(output.trace.layers):
                    assert layer.outputs[row].nonzero()[:, 0].tolist() == masks[number].nonzero()[:, 0].tolist()
                    if layer.importance is not None:
                        ours = layer.importance[row, : len(ids)].double()
                        torch.testing.assert_close(ours, scores[number], atol=1e-6, rtol=1e-4)
            for number in range(LAYERS):
                pruned[number] += int((~masks[number]).sum())
    assert (pruned[0] == 0) == (rise == "code") and pruned[0] < pruned[1] < pruned[3] < sum(LENGTHS) - 7


@pytest.mark.parametrize("keeps_separators", [False, True])
@pytest.mark.parametrize("execution", ["masked", "gathered"])
@pytest.mark.parametrize("retainer", [LearnedThreshold, ManualThreshold])
def test_a_token_goes_when_its_score_is_not_above_the_threshold_and_never_comes_back(
    retainer: Build, execution: str, keeps_separators: bool, random_classifier: Build, ragged_batch: Build
) -> None:
    """The recorded scores against the rule, token by token."""
    model = random_classifier(by_constant, partial(retainer, keeps_separators=keeps_separators))
    offsets = [0.0] * LAYERS
    if retainer is LearnedThreshold:
        offsets = OFFSETS
        with torch.no_grad():
            model.pruning.retainer.offset.copy_(torch.tensor(OFFSETS))
    batch = ragged_batch(model, LENGTHS, extra=2)
    with torch.no_grad():
        trace = model(batch, execution).trace
    separators_gone = 0
    for row, length in enumerate(LENGTHS):
        alive, separators = set(range(length)), set((batch.input_ids[row] == 3).nonzero()[:, 0].tolist())
        for theta, layer in zip(thresholds_by_hand(offsets), trace.layers, strict=True):
            scores = layer.importance[row].tolist()
            assert all(scores[i] == 0 for i in range(42) if i not in alive)
            stays = {0} | (separators if keeps_separators else set())
            separators_gone += len(separators & alive)
            alive = {i for i in alive if i in stays or scores[i] > theta}
            separators_gone -= len(separators & alive)
            assert layer.outputs[row].nonzero()[:, 0].tolist() == sorted(alive)
    assert (separators_gone > 0) == (not keeps_separators)


def test_a_score_that_equals_the_threshold_is_not_above_it() -> None:
    valid = torch.tensor([[True, True, True, True, False]])
    protected = torch.tensor([[True, False, False, False, False]])
    layout = Padded.start(Sequences(valid, protected))
    retainer = ManualThreshold(6, 1, final_threshold=0.5)
    decision = retainer(torch.tensor([[0.1, 0.5, 0.50001, 0.4, 0.9]]), torch.zeros(1, 5, 6), layout, 0)
    assert decision.keep.tolist() == [[True, False, True, False, False]]


def test_in_the_codes_reading_the_first_layer_never_prunes_and_never_learns(
    random_classifier: Build, ragged_batch: Build
) -> None:
    model = ltp_model(random_classifier, rise="code", offsets=[0.5, 0.0, 0.0, 0.0], temperature=0.01)
    batch = ragged_batch(model, LENGTHS)
    trace = model(batch).trace
    assert torch.equal(trace.layers[0].outputs, batch.valid) and trace.layers[0].decision is None
    assert (trace.layers[1].outputs.sum(1) < batch.valid.sum(1))[4]
    output = relaxed(model, batch)
    assert len(output.trace.decisions) == LAYERS - 1
    (output.logits.square().sum() + token_penalty(output.trace)).backward()
    gradient = model.pruning.retainer.offset.grad
    assert gradient[0] == 0 and (gradient[1:] != 0).all()


@pytest.mark.parametrize("mode", ["hard", "gathered", "soft", "gated", "straight_through"])
def test_enormous_thresholds_leave_the_first_token_and_finite_answers(
    mode: str, random_classifier: Build, ragged_batch: Build
) -> None:
    relaxation: Any = "soft" if mode in ("hard", "gathered") else mode
    model = ltp_model(random_classifier, offsets=[1e4] * LAYERS, relaxation=relaxation)
    batch = ragged_batch(model, LENGTHS, extra=1)
    if mode in ("hard", "gathered"):
        output = model(batch, "gathered" if mode == "gathered" else "masked")
    else:
        output = relaxed(model, batch)
    (output.logits.square().sum()).backward()
    assert output.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    for layer in output.trace.layers:
        if mode in ("soft", "gated"):
            assert layer.decision.soft.sum(1).tolist() == [1.0] * 7
        else:
            assert layer.outputs.nonzero().tolist() == [[row, 0] for row in range(7)]


# Soft masks (eqs. 9 and 12)


@pytest.mark.parametrize("relaxation", ["soft", "gated"])
@pytest.mark.parametrize("normalisation", ["constant", "length"])
@pytest.mark.parametrize("temperature", [1e-3, 2e-2])
def test_soft_masks_and_what_they_multiply_equal_a_plain_loop_over_the_layers_of_transformers(
    temperature: float,
    normalisation: str,
    relaxation: Any,
    random_transformer: Build,
    random_classifier: Build,
    ragged_batch: Build,
) -> None:
    model = ltp_model(random_classifier, normalisation, OFFSETS, temperature=temperature, relaxation=relaxation)
    theirs, head = doubled(random_transformer()), doubled(model.head)
    batch = ragged_batch(model, LENGTHS, extra=2)
    with torch.no_grad():
        output, dense = relaxed(model, batch), model(batch, prune=False)
        for row, (ids, types) in enumerate(rows_of(batch)):
            first, scores, _, soft = by_hand(
                theirs,
                ids,
                types,
                thresholds_by_hand(OFFSETS),
                128 if normalisation == "constant" else None,
                relaxation,
                temperature,
            )
            torch.testing.assert_close(output.logits[row].double(), head(first)[0], atol=1e-5, rtol=0)
            for number, decision in enumerate(output.trace.decisions):
                ours = decision.soft[row].tolist()
                theta, given = thresholds_by_hand(OFFSETS)[number], decision.importance[row, : len(ids)].tolist()
                loop = [1 / (1 + math.exp((theta - s) / temperature)) for s in given]
                assert ours == pytest.approx([1.0, *loop[1:]] + [0.0] * (42 - len(ids)), abs=1e-5)
                assert ours[: len(ids)] == pytest.approx(soft[number].tolist(), abs=1e-4)
                ours = decision.importance[row, : len(ids)].double()
                torch.testing.assert_close(ours, scores[number], atol=1e-6, rtol=1e-4)
    assert (output.trace.retention == 1).all()
    assert (output.logits - dense.logits).abs().max() > 0.01


def total_of(logits: Tensor, soft: list[list[Tensor]], penalty: str) -> Tensor:
    """A weighted sum of all logits, plus 0.7 times eq. 13 in a reading."""
    weights = torch.arange(1, logits.numel() + 1, dtype=logits.dtype).view(logits.shape).sin()
    counted = sum(one.sum() for masks in soft for one in masks) / len(logits)
    return (logits * weights).sum() + 0.7 * counted / (LAYERS if penalty == "paper" else 128)


@pytest.mark.parametrize("relaxation", ["soft", "gated", "straight_through"])
@pytest.mark.parametrize(("temperature", "penalty"), [(2e-3, "paper"), (2e-2, "paper"), (2e-2, "code")])
def test_the_thresholds_gradient_equals_finite_differences_of_the_plain_loop(
    temperature: float,
    penalty: str,
    relaxation: Any,
    random_transformer: Build,
    random_classifier: Build,
    ragged_batch: Build,
) -> None:
    """The loop is in double precision. Straight-through: what differs is the surrogate, keep + M̃(θ) − M̃(θ now)."""
    model = ltp_model(random_classifier, offsets=OFFSETS, temperature=temperature, relaxation=relaxation)
    theirs, head = doubled(random_transformer()), doubled(model.head)
    batch = ragged_batch(model, [9, 1, 2, 14, 6], extra=1)
    output = relaxed(model, batch)
    loss = total_of(output.logits, [], penalty) + 0.7 * token_penalty(output.trace, penalty)
    loss.backward()
    now = thresholds_by_hand(OFFSETS)

    with torch.no_grad():
        hand = partial(by_hand, theirs, mode=relaxation, temperature=temperature)
        through = relaxation == "straight_through"
        frozen = [hand(ids, types, now)[3] if through else None for ids, types in rows_of(batch)]

        def loss_at(thresholds: list[float]) -> float:
            results = [
                hand(ids, types, thresholds, frozen=one)
                for (ids, types), one in zip(rows_of(batch), frozen, strict=True)
            ]
            logits = head(torch.cat([first for first, *_ in results]))
            return float(total_of(logits, [soft for *_, soft in results], penalty))

        assert loss.item() == pytest.approx(loss_at(now), abs=1e-4)
        numeric = []
        for layer in range(LAYERS):
            up, down = ([theta + step * (k == layer) for k, theta in enumerate(now)] for step in (1e-7, -1e-7))
            numeric.append((loss_at(up) - loss_at(down)) / 2e-7)
    gradient = model.pruning.retainer.offset.grad.tolist()
    assert all(abs(one) > 1e-2 for one in gradient)
    assert gradient == pytest.approx(numeric, rel=2e-3, abs=1e-3)


@pytest.mark.parametrize("relaxation", ["soft", "gated", "straight_through"])
def test_the_task_loss_alone_teaches_every_threshold_but_the_last_and_the_encoder(
    relaxation: Any, random_classifier: Build, ragged_batch: Build
) -> None:
    """What leaves the last layer is read at the first token only, so its mask changes no answer."""
    model = ltp_model(random_classifier, relaxation=relaxation, temperature=5e-3)
    batch = ragged_batch(model, LENGTHS)
    F.cross_entropy(relaxed(model, batch).logits, batch.labels).backward()
    gradient = model.pruning.retainer.offset.grad
    assert (gradient[:-1] != 0).all() and gradient[-1] == 0 and gradient.isfinite().all()
    for parameter in (model.encoder.embeddings.word.weight, *(layer.key.weight for layer in model.encoder.layers)):
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0


def test_at_a_vanishing_temperature_the_gated_model_is_the_hard_one_and_the_soft_model_is_not(
    random_classifier: Build, ragged_batch: Build
) -> None:
    hard_from = {}
    for relaxation in ("gated", "soft"):
        model = ltp_model(random_classifier, offsets=OFFSETS, temperature=1e-12, relaxation=relaxation)
        batch = ragged_batch(model, LENGTHS, extra=2)
        with torch.no_grad():
            ours, hard = relaxed(model, batch), model(batch)
        hard_from[relaxation] = float((ours.logits - hard.logits).abs().max())
        first = torch.arange(batch.valid.shape[1]) == 0
        for one, two in zip(ours.trace.decisions, hard.trace.decisions, strict=True):
            above = batch.valid & (first | (one.importance > one.threshold))
            assert torch.equal(one.soft, above.float())
            assert relaxation == "soft" or torch.equal(one.soft, two.keep.float())
    assert hard_from["gated"] < 1e-5 and hard_from["soft"] > 1e-2


@pytest.mark.parametrize("temperature", [1e-4, 1e-2])
def test_straight_through_answers_as_the_hard_model_does(
    temperature: float, random_classifier: Build, ragged_batch: Build
) -> None:
    model = ltp_model(random_classifier, offsets=OFFSETS, temperature=temperature, relaxation="straight_through")
    batch = ragged_batch(model, LENGTHS, extra=2)
    ours, hard = relaxed(model, batch), model(batch)
    torch.testing.assert_close(ours.logits, hard.logits, atol=1e-5, rtol=0)
    for one, two in zip(ours.trace.layers, hard.trace.layers, strict=True):
        assert torch.equal(one.keys, two.keys) and torch.equal(one.outputs, two.outputs)
        torch.testing.assert_close(one.decision.gate, one.decision.keep.float(), atol=1e-6, rtol=0)
        assert two.decision.soft is None and two.decision.gate is None
    assert hard.trace.retention[4, -1] < 0.9


def test_thresholds_are_hard_again_after_the_block_even_after_an_error(
    random_classifier: Build, ragged_batch: Build
) -> None:
    model = ltp_model(random_classifier)
    batch = ragged_batch(model, LENGTHS)
    with pytest.raises(RuntimeError, match="stop"), model.pruning.retainer.relaxed():
        assert model(batch).trace.decisions[0].soft is not None
        raise RuntimeError("stop")
    assert model(batch).trace.decisions[0].soft is None


def test_soft_masks_are_differentiated_in_single_precision_under_bf16_autocast_too(
    random_classifier: Build, ragged_batch: Build
) -> None:
    model = ltp_model(random_classifier, offsets=OFFSETS)
    batch = ragged_batch(model, LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        output = relaxed(model, batch)
        loss = F.cross_entropy(output.logits.float(), batch.labels) + token_penalty(output.trace)
    loss.backward()
    assert {decision.soft.dtype for decision in output.trace.decisions} == {torch.float32}
    gradient = model.pruning.retainer.offset.grad
    assert gradient.isfinite().all() and (gradient != 0).all()


# The loss (eq. 13) and the expected cost


def soft_trace(lengths: list[int], seed: int = 0, skipped: tuple[int, ...] = (), binary: bool = False) -> PruningTrace:
    """Three layers of random soft masks, none in those that are `skipped`; binary ones are hard, and fall."""
    valid = torch.arange(max(lengths) + 2) < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(seed)
    trace, alive = PruningTrace(valid), valid
    for layer in range(3):
        soft = torch.rand(valid.shape, generator=generator) * alive
        if binary:
            soft = (soft > 0.3).float()
        soft[:, 0] = 1.0
        decision = None if layer in skipped else Decision(soft, alive, soft=soft)
        after = alive & (soft > 0) if binary and decision is not None else alive
        trace.layers.append(LayerTrace(alive, alive, after, decision))
        alive = after
    return trace


@pytest.mark.parametrize("skipped", [(), (0,)])
def test_the_token_penalty_equals_a_plain_loop(skipped: tuple[int, ...]) -> None:
    lengths = [9, 1, 4, 17]
    trace = soft_trace(lengths, skipped=skipped)
    masks = [[row[:n] for row, n in zip(one.soft.tolist(), lengths, strict=True)] for one in trace.decisions]
    paper = sum(sum(sum(row) for row in layer) / 4 for layer in masks) / 3
    code = sum(sum(sum(row) / 128 for row in layer) / 4 for layer in masks)
    assert token_penalty(trace).item() == pytest.approx(paper, rel=1e-6)
    assert token_penalty(trace, "code").item() == pytest.approx(code, rel=1e-6)
    assert code / paper == pytest.approx(3 / 128)


@pytest.mark.parametrize("penalty", ["paper", "code"])
def test_the_token_penalty_of_a_model_is_that_of_its_texts_whatever_the_padding(
    penalty: str, random_classifier: Build, ragged_batch: Build
) -> None:
    model = ltp_model(random_classifier, offsets=OFFSETS)
    with torch.no_grad():
        alone = [
            float(token_penalty(relaxed(model, ragged_batch(model, [n], seeds=[row])).trace, penalty))
            for row, n in enumerate(LENGTHS)
        ]
        together = float(token_penalty(relaxed(model, ragged_batch(model, LENGTHS, extra=30)).trace, penalty))
    assert together == pytest.approx(sum(alone) / len(alone), rel=1e-4)


def layer_cost(d: int, ff: int, keys: float, outputs: float) -> float:
    """Queries are keys: 2d²K + d²K + 2dK² + d²O + 2·d·ff·O."""
    return 3 * d**2 * keys + 2 * d * keys**2 + d**2 * outputs + 2 * d * ff * outputs


def of_shape(layers: int) -> PrunedClassifier:
    """A model of the sizes that `layer_cost` is asked for, whose pruner costs nothing."""
    shape = EncoderShape(vocabulary=5, dim=16, heads=2, layers=layers, ff_dim=48, positions=8)
    pruning = Pruning(by_constant(16), LearnedThreshold(16, layers))
    return PrunedClassifier(PrunedEncoder(shape), Head(16, 2), pruning, separator=3)


@pytest.mark.parametrize("skipped", [(), (0,), (1,)])
def test_the_soft_cost_equals_a_plain_loop_over_texts_layers_and_tokens(skipped: tuple[int, ...]) -> None:
    lengths = [9, 1, 4, 17]
    trace = soft_trace(lengths, skipped=skipped)
    model = of_shape(len(trace.layers))
    cost = dense = 0.0
    for row, length in enumerate(lengths):
        lives = [1.0] * length
        for layer in trace.layers:
            before = sum(lives)
            if layer.decision is not None:
                lives = [p * m for p, m in zip(lives, layer.decision.soft[row].tolist(), strict=False)]
            cost += layer_cost(16, 48, before, sum(lives))
            dense += layer_cost(16, 48, length, length)
    assert soft_cost_share(model, trace).item() == pytest.approx(cost / dense, rel=1e-6)


def test_the_soft_cost_of_masks_of_zeros_and_ones_is_the_cost_of_running_them() -> None:
    lengths = [9, 1, 4, 17]
    trace = soft_trace(lengths, binary=True)
    pairs = [(int(layer.keys[row].sum()), int(layer.outputs[row].sum())) for layer in trace.layers for row in range(4)]
    dense = sum(3 * layer_cost(16, 48, n, n) for n in lengths)
    model = of_shape(len(trace.layers))
    assert soft_cost_share(model, trace).item() == pytest.approx(
        sum(layer_cost(16, 48, *pair) for pair in pairs) / dense, rel=1e-6
    )
    assert soft_cost_share(model, trace) < 0.7


@pytest.mark.parametrize(
    ("relaxation", "temperature"), [("gated", 1e-12), ("straight_through", 1e-12), ("straight_through", 1e-2)]
)
def test_where_the_relaxed_model_is_the_hard_one_its_price_is_what_that_costs(
    relaxation: str, temperature: float, random_classifier: Build, ragged_batch: Build
) -> None:
    model = ltp_model(random_classifier, temperature=temperature, relaxation=relaxation)
    batch = ragged_batch(model, LENGTHS)
    with torch.no_grad():
        soft = soft_cost_share(model, relaxed(model, batch).trace).item()
    assert soft == pytest.approx(cost_share(model, [batch]), rel=1e-5)


@pytest.mark.parametrize("relaxation", ["soft", "gated", "straight_through"])
def test_the_cost_teaches_the_thresholds_and_not_the_weights(
    relaxation: str, random_classifier: Build, ragged_batch: Build
) -> None:
    model = ltp_model(random_classifier, relaxation=relaxation)
    soft_cost_share(model, relaxed(model, ragged_batch(model, LENGTHS)).trace).backward()
    taught = {name for name, one in model.named_parameters() if one.grad is not None and one.grad.any()}
    assert taught == {"pruning.retainer.offset"}


# Gathered equals masked

PRUNED = {
    "ltp": (partial(LearnedThreshold), OFFSETS),
    "ltp_code": (partial(LearnedThreshold, rise="code"), OFFSETS),
    "manual": (partial(ManualThreshold, keeps_separators=True), None),
    "topk": (partial(TopKSchedule, ratio=0.3), None),
    "topk_shares": (partial(TopKSchedule, shares=[0.8, 0.8, 0.4, 0.1]), None),
}


@pytest.mark.parametrize("retainer", PRUNED)
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_gathered_equals_masked_on_random_weights(
    family: str, retainer: str, random_classifier: Build, ragged_batch: Build
) -> None:
    build, offsets = PRUNED[retainer]
    model = random_classifier(by_constant, build, family)
    if offsets is not None:
        with torch.no_grad():
            model.pruning.retainer.offset.copy_(torch.tensor(offsets))
    for size in (1, 2, 7, 32):
        trace = assert_gathered_equals_masked(model, ragged_batch(model, (LENGTHS * 5)[:size], extra=2))
        kept = trace.counts("outputs")[0].tolist()
        assert kept[-1] < kept[1] <= 23
    assert_gathered_has_the_gradients_of_masked(model, ragged_batch(model, LENGTHS, extra=2))


def test_fvcore_counts_the_closed_form_of_a_model_that_prunes_at_every_layer(
    random_classifier: Build, ragged_batch: Build
) -> None:
    model = ltp_model(random_classifier, offsets=OFFSETS)
    assert check_flops(model, [ragged_batch(model, lengths) for lengths in ([23], [11, 1, 7])]) == 2


def assert_gathered_equals_masked_with_the_weights_of(directory: Path, retainer: str) -> None:
    torch.manual_seed(0)
    loaded = loaded_once(directory)
    layers = loaded.encoder.shape.layers
    build = {
        "ltp": partial(LearnedThreshold, final_threshold=0.008),
        "manual": partial(ManualThreshold, final_threshold=0.006, rise="code"),
        "topk": TopKSchedule,
    }[retainer]
    pruning = Pruning(by_constant(384), build(384, layers))
    model = PrunedClassifier(loaded.encoder, Head(384, 2), pruning, loaded.tokenizer.sep_token_id).eval()
    with torch.no_grad():
        model.head.classifier.weight.mul_(20)
        if retainer == "ltp":
            pruning.retainer.offset.copy_(5e-4 * torch.randn(layers))
    texts = [f"{one} {two}" if place % 2 else one for place, one in enumerate(SENTENCES) for two in SENTENCES][:32]
    split = encode_texts(loaded.tokenizer, SENTENCES + texts, 128)
    for size in (1, 2, 7, 32):
        trace = assert_gathered_equals_masked(model, split.collate(range(size)))
        if size == 32:
            assert 0.05 < trace.retention.mean() < 0.8


@pytest.mark.parametrize("retainer", ["ltp", "manual", "topk"])
def test_gathered_equals_masked_with_the_weights_of_minilm(retainer: str, minilm_directory: Path) -> None:
    assert_gathered_equals_masked_with_the_weights_of(minilm_directory, retainer)


@pytest.mark.parametrize("retainer", ["ltp", "manual", "topk"])
def test_gathered_equals_masked_with_the_weights_of_gte_small(retainer: str, shared_weights: Path) -> None:
    if not (shared_weights / "gte_small").is_dir():
        pytest.skip(f"no gte_small in {shared_weights}")
    assert_gathered_equals_masked_with_the_weights_of(shared_weights / "gte_small", retainer)


def test_top_k_keeps_the_best_of_what_earlier_layers_left(random_classifier: Build, ragged_batch: Build) -> None:
    shares = {"ratio": [0.8, 0.6, 0.4, 0.2], "shares": [1.0, 0.5, 0.5, 0.05]}
    for given, expected in shares.items():
        settings = {"ratio": 0.2} if given == "ratio" else {"shares": expected}
        model = random_classifier(by_constant, partial(TopKSchedule, **settings))
        with torch.no_grad():
            trace = model(ragged_batch(model, LENGTHS)).trace
        for row, length in enumerate(LENGTHS):
            alive = list(range(1, length))
            for share, layer in zip(expected, trace.layers, strict=True):
                scores = layer.importance[row].tolist()
                count = max(1, math.ceil(share * (length - 1) - 1e-6))
                alive = sorted(alive, key=lambda i, scores=scores: (-scores[i], i))[:count]
                assert layer.outputs[row].nonzero()[:, 0].tolist() == sorted([0, *alive])


# Training


@pytest.fixture
def data(tiny_task: Task, data_settings: Build) -> TaskData:
    return TaskData(tiny_task, data_settings())


def tiny_ltp(tokenizer: PreTrainedTokenizerFast, loss: LTPLoss | None = None, **settings: Any) -> LTP:
    """LTP on a random encoder that starts without a teacher; `retainer` has the retainer's settings."""
    torch.manual_seed(0)
    dropout = settings.pop("dropout", 0.1)
    encoder = random_encoder(Backbone(name="tiny", dropout=dropout, random=RandomShape(layers=2)), tokenizer)
    pruning = Pruning(by_constant(32), LearnedThreshold(32, 2, **settings.pop("retainer", {})))
    model = PrunedClassifier(encoder, Head(32, 2, dropout), pruning, tokenizer.sep_token_id)
    settings = {"soft_epochs": 1, "epochs": 1, "pruner_lr": 1e-3, **settings}
    return LTP(model, ["accuracy"], partial(torch.optim.AdamW, lr=2e-3), loss or LTPLoss(), **settings)


def random_ltp(build: Build, loss: LTPLoss | None = None, budget: float | None = None, **settings: Any) -> LTP:
    """LTP on large random weights, whose answers change with every token, without dropout."""
    model = ltp_model(build, offsets=[0.001, 0.0], sizes={"outputs": 2, **TINY}, temperature=5e-3, **settings)
    return LTP(model, ["accuracy"], torch.optim.AdamW, loss or LTPLoss(), budget=budget).eval()


def trainer(**settings: Any) -> Build:
    quieten_lightning()
    quiet = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "log_every_n_steps": 1000}
    return partial(Trainer, **{**quiet, **settings})


def run_stages(method: LTP, data: TaskData, directory: Path, **settings: Any) -> list[list[float]]:
    """Run the stages as a run does; returns what was learned after each."""
    offsets = []
    for stage in method.stages():
        run_stage(stage, data, trainer(**settings), [], directory)
        offsets.append(method.learned.offset.tolist())
    return offsets


@pytest.mark.parametrize(
    "settings", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}], ids=str
)
def test_thresholds_are_learned_in_the_soft_stage_and_frozen_in_the_hard_one(
    settings: dict[str, Any], data: TaskData, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    method = tiny_ltp(tiny_tokenizer, LTPLoss(lam=0.2))
    before = {name: tensor.clone() for name, tensor in method.model.named_parameters()}
    soft, hard = run_stages(method, data, tmp_path, **settings)
    assert all(theta > 1e-4 for theta in soft)  # λ alone pulls at the last layer's: upwards, to fewer tokens
    assert hard == soft and method.learned.knob == 0
    assert not torch.equal(method.model.encoder.layers[0].key.weight, before["encoder.layers.0.key.weight"])


def test_each_stage_has_its_own_loss_and_its_own_rate_and_writes_its_own_curves(
    data: TaskData, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    method = tiny_ltp(tiny_tokenizer, hard_lr=5e-4)
    weights, curves, rates = [], [], []
    for stage in method.stages():
        run_stage(stage, data, trainer(), [], tmp_path)
        weights.append(method.model.encoder.layers[0].query.weight.clone())
        curves.append({name: float(value) for name, value in method.trainer.callback_metrics.items()})
        rates.append({group["initial_lr"] for group in method.trainer.optimizers[0].param_groups})
    assert (weights[1] - weights[0]).abs().max() > 1e-3
    assert rates == [{2e-3, 1e-3}, {5e-4}]
    selected = ("selection_accuracy", "selection_retention", "threshold_01", "threshold_02", "loss", "cross_entropy")
    assert set(curves[0]) == {f"soft/{name}" for name in (*selected, "tokens", "soft_share")}
    assert set(curves[1]) == {f"hard/{name}" for name in (*selected, "retention")}
    for stage_name, curve in zip(("soft", "hard"), curves, strict=True):
        logged = [curve[f"{stage_name}/threshold_0{layer}"] for layer in (1, 2)]
        assert logged == pytest.approx(method.learned.thresholds.tolist())
        assert curve[f"{stage_name}/selection_retention"] < 1  # an epoch is judged by what is deployed
    assert curves[1]["hard/retention"] < 1


@pytest.mark.parametrize("penalty", ["paper", "code"])
def test_the_loss_of_the_soft_stage_is_the_task_loss_plus_lambda_times_eq_13(
    penalty: Any, data: TaskData, random_classifier: Build
) -> None:
    method = random_ltp(random_classifier, LTPLoss(lam=0.3, penalty=penalty))
    method.learns_thresholds = True
    batch = data.train.collate([3, 11, 40, 117])
    terms, output = method.terms(batch), relaxed(method.model, batch)
    lengths, log_probabilities = batch.valid.sum(1).tolist(), output.logits.log_softmax(-1).tolist()
    cross_entropy = -sum(row[label] for row, label in zip(log_probabilities, batch.labels.tolist(), strict=True)) / 4
    masks = [row[:n] for one in output.trace.decisions for row, n in zip(one.soft.tolist(), lengths, strict=True)]
    tokens = sum(sum(row) for row in masks) / 4 / (2 if penalty == "paper" else 128)
    assert terms.total.item() == pytest.approx(cross_entropy + 0.3 * tokens, rel=1e-5)
    assert terms.parts["tokens"].item() == pytest.approx(tokens, rel=1e-5)


def test_with_a_budget_the_squared_distance_from_it_takes_the_penaltys_place(
    data: TaskData, random_classifier: Build
) -> None:
    method = random_ltp(random_classifier, LTPLoss(lam=100.0, budget_weight=7.0), budget=0.4)
    method.learns_thresholds = True
    batch = data.train.collate([3, 11, 40, 117])
    terms, output = method.terms(batch), relaxed(method.model, batch)
    share = soft_cost_share(method.model, output.trace).item()
    expected = F.cross_entropy(output.logits, batch.labels).item() + 7 * (share - 0.4) ** 2
    assert terms.total.item() == pytest.approx(expected, rel=1e-5) and "tokens" not in terms.parts
    assert abs(share - 0.4) > 0.05


def test_the_hard_stages_loss_is_the_task_loss_of_the_pruned_model(data: TaskData, random_classifier: Build) -> None:
    method = random_ltp(random_classifier)
    batch = data.train.collate([3, 11, 40, 117])
    with torch.no_grad():
        pruned, dense = (F.cross_entropy(method.model(batch, prune=one).logits, batch.labels) for one in (True, False))
        terms = method.terms(batch)
    assert terms.total.item() == terms.parts["cross_entropy"].item() == pytest.approx(pruned.item(), rel=1e-5)
    assert abs(pruned - dense) > 0.01 and terms.parts["retention"] < 0.9


def test_accumulated_half_batches_move_weights_and_thresholds_as_the_whole_batch_does(
    data: TaskData, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Texts of equal number, so that a mean of means is the mean; plain SGD, so that a step is its gradient."""
    build = partial(tiny_ltp, tiny_tokenizer, LTPLoss(lam=2.0), retainer={"temperature": 5e-3}, dropout=0.0)
    rows = torch.arange(0, 220, 14)
    moved = []
    for batches, accumulate in ((rows.split(8), 2), ([rows], 1)):
        method = build(pruner_lr=1e-5)
        method.learns_thresholds = True
        method.build_optimizer = partial(torch.optim.SGD, lr=1e-3)
        settings = {"max_steps": 1, "limit_val_batches": 0, "enable_model_summary": False, "logger": False}
        fit = trainer(accumulate_grad_batches=accumulate, enable_checkpointing=False, **settings)
        before = [parameter.detach().clone() for parameter in method.parameters()]
        fit().fit(method, *2 * [BatchLoader(data.train, list(batches))])
        assert method.trainer.global_step == 1
        moved.append([after.detach() - one for one, after in zip(before, method.parameters(), strict=True)])
        offset = method.learned.offset.detach()

    fresh = build()
    output = relaxed(fresh.model, data.train.collate(rows))
    tokens = sum(decision.soft.sum() for decision in output.trace.decisions) / 16
    (F.cross_entropy(output.logits, data.train.collate(rows).labels) + 2.0 * tokens / 2).backward()
    torch.testing.assert_close(offset, -1e-5 * fresh.learned.offset.grad, atol=0, rtol=1e-4)
    assert fresh.learned.offset.grad.abs().min() > 1
    for accumulated, whole in zip(*moved, strict=True):
        torch.testing.assert_close(accumulated, whole, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(("weights", "thresholds"), [(10.0, 500.0), (0.3, 500.0), (10.0, 0.3), (0.3, 0.2)])
def test_thresholds_and_weights_are_clipped_each_by_their_own_norm(
    weights: float, thresholds: float, data: TaskData, random_classifier: Build
) -> None:
    """By one norm the weights' steps would be as many times shorter as the thresholds' gradient is longer."""
    method, optimizer = random_ltp(random_classifier), torch.optim.SGD([torch.zeros(1)])
    method._trainer = SimpleNamespace(precision="bf16-mixed")
    parts: dict[float, list[nn.Parameter]] = {weights: [], thresholds: []}
    for name, one in method.trained_parameters():
        parts[thresholds if name.startswith("pruning.") else weights].append(one)
        one.grad = torch.randn(one.shape)

    def norm(parameters: list[nn.Parameter]) -> Tensor:
        return torch.stack([one.grad.norm() for one in parameters if one.grad is not None]).norm()

    assert len(parts[thresholds]) == 1 and len(parts[weights]) > 10
    for expected, parameters in parts.items():
        before = norm(parameters)
        for one in parameters:
            assert one.grad is not None
            one.grad *= expected / before
    method.configure_gradient_clipping(optimizer, 1.0)
    for before, parameters in parts.items():
        assert float(norm(parameters)) == pytest.approx(min(before, 1.0), rel=1e-4)


def test_what_binarising_costs_is_measured_on_the_selection_slice_with_soft_and_with_hard_masks(
    data: TaskData, random_classifier: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, batches = random_ltp(random_classifier), list(data.val_dataloader())
    model, labels = method.model, torch.cat([batch.labels for batch in batches])
    with torch.no_grad():
        soft = [relaxed(model, batch) for batch in batches]
        hard = [model(batch, "gathered") for batch in batches]
    monkeypatch.setattr("tokprune_exp.methods.ltp.evaluate_metrics", lambda *given: {"given": given})
    model.train()
    found = method.gap(data, torch.device("cpu"))
    assert model.training and len(batches) > 1
    for name, outputs in (("soft", soft), ("hard", hard)):
        names, answers, theirs = found[name]["given"]
        assert names == ["accuracy"] and torch.equal(theirs, labels)
        torch.testing.assert_close(answers, torch.cat([output.logits for output in outputs]), atol=1e-5, rtol=0)
    assert (found["soft"]["given"][1] - found["hard"]["given"][1]).abs().max() > 0.01
    cost, dense = (sum(float(count(model, output.trace)) for output in soft) for count in (soft_cost, dense_cost))
    assert found["soft"]["cost_share"] == pytest.approx(cost / dense)
    assert found["hard"]["cost_share"] == pytest.approx(cost_share(model, batches))


def test_what_binarising_costs_is_written_and_found_again_when_the_stages_are_loaded(
    data: TaskData, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    method, again = tiny_ltp(tiny_tokenizer), tiny_ltp(tiny_tokenizer)
    soft_stage, hard_stage = method.stages()
    run_stage(soft_stage, data, trainer(), [], tmp_path)
    assert json.loads((tmp_path / "checkpoints" / "soft" / "findings.json").read_text()) == {}
    expected = method.gap(data, torch.device("cpu"))
    run_stage(hard_stage, data, trainer(), [], tmp_path)
    assert method.findings == {"binarisation": expected}
    assert json.loads((tmp_path / "checkpoints" / "hard" / "findings.json").read_text()) == method.findings
    for stage in again.stages():
        run_stage(stage, data, trainer(), [], tmp_path)
    assert again.findings == method.findings
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, method.model.state_dict()[name])


def test_a_stage_says_the_metric_of_each_epoch_and_of_the_one_that_it_keeps(
    data: TaskData,
    tiny_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],  # its stdout is no terminal
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    falling = iter((0.9, 0.6, 0.8, 0.5))
    monkeypatch.setattr("tokprune_exp.methods.module.evaluate_metrics", lambda *given: {"accuracy": next(falling)})
    with caplog.at_level("INFO", "tokprune_exp"):
        run_stages(tiny_ltp(tiny_tokenizer, soft_epochs=2, epochs=2), data, tmp_path)
    said = [record.getMessage() for record in caplog.records if "epoch" in record.getMessage()]
    assert said == [
        "stage soft: epoch 1 of 2, soft/selection_accuracy = 0.9000",
        "stage soft: epoch 2 of 2, soft/selection_accuracy = 0.6000",
        "stage soft: last epoch has soft/selection_accuracy = 0.6000",
        "stage hard: epoch 1 of 2, hard/selection_accuracy = 0.8000",
        "stage hard: epoch 2 of 2, hard/selection_accuracy = 0.5000",
        "stage hard: best epoch has hard/selection_accuracy = 0.8000",
    ]


def test_only_the_hard_stage_is_run_again_when_the_soft_one_is_there(
    data: TaskData, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    first, again = tiny_ltp(tiny_tokenizer), tiny_ltp(tiny_tokenizer)
    learned = run_stages(first, data, tmp_path)[0]
    (tmp_path / "checkpoints" / "hard" / "weights.safetensors").unlink()
    assert run_stages(again, data, tmp_path) == [learned, learned]
    assert again.findings == first.findings and not again.learned.offset.requires_grad


def test_with_straight_through_the_step_to_hard_masks_changes_neither_accuracy_nor_cost(
    data: TaskData, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    method = tiny_ltp(tiny_tokenizer, retainer={"relaxation": "straight_through"})
    soft, hard = run_stages(method, data, tmp_path)
    found = method.findings["binarisation"]
    assert found["soft"]["accuracy"] == found["hard"]["accuracy"]
    assert found["soft"]["cost_share"] == pytest.approx(found["hard"]["cost_share"], rel=1e-5)
    assert found["hard"]["cost_share"] < 0.9
    assert soft == hard and all(theta != 0 for theta in soft)


def test_the_stages_are_those_of_algorithm_1(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    stages = tiny_ltp(tiny_tokenizer, soft_epochs=3, epochs=5).stages()
    assert [(stage.name, stage.epochs, stage.keeps) for stage in stages] == [("soft", 3, "last"), ("hard", 5, "best")]


@pytest.mark.parametrize("initialises_student", [True, False])
@pytest.mark.parametrize("build", [tiny_ltp, HardPruning])
def test_pruning_starts_from_the_dense_model_where_that_is_asked_for(
    build: Build,
    initialises_student: bool,
    data: TaskData,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = tiny_ltp(tiny_tokenizer).model
    dense = PrunedClassifier(copy.deepcopy(model.encoder), copy.deepcopy(model.head), None, model.separator)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter += 0.1
    given = {"teacher": Finetune(dense, ["accuracy"], torch.optim.AdamW), "initialises_student": initialises_student}
    method = (
        build(tiny_tokenizer, **given) if build is tiny_ltp else build(model, ["accuracy"], torch.optim.AdamW, **given)
    )
    before = {name: tensor.clone() for name, tensor in method.model.state_dict().items()}
    first, second, *_ = method.stages()
    assert first.name == "teacher" and first.module is method.teachers[0] and second.before is not None
    second.before(data, torch.device("cpu"))
    expected = {**before, **dense.state_dict()} if initialises_student else before
    for name, tensor in method.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(LearnedThreshold, 8, 4, final_threshold=0.0), r"retainer\.final_threshold=0\.0 must be above 0"),
        (partial(LearnedThreshold, 8, 4, temperature=0.0), r"retainer\.temperature=0\.0 must be above 0"),
        (partial(TopKSchedule, 8, 4, ratio=1.5), r"retainer\.ratio=1\.5 must be above 0 and at most 1"),
        (partial(TopKSchedule, 8, 4, shares=[0.5, 0.5]), r"retainer\.shares=\[0\.5, 0\.5\]: give 4 shares"),
        (partial(TopKSchedule, 8, 2, shares=[0.5, 0.0]), r"retainer\.shares=\[0\.5, 0\.0\]: give 2 shares"),
        (partial(LTPLoss, lam=-1.0), r"loss\.lam=-1\.0 must not be negative"),
        (partial(LTPLoss, budget_weight=-1.0), r"loss\.budget_weight=-1\.0 must not be negative"),
    ],
)
def test_a_setting_out_of_its_bounds_is_refused_by_its_key(build: Build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_ltp_without_learned_thresholds_or_without_a_soft_epoch_is_refused(
    random_classifier: Build, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=r"method\.soft_epochs=0 must be at least 1"):
        tiny_ltp(tiny_tokenizer, soft_epochs=0)
    for retainer in (ManualThreshold, StaticRatio):
        model = random_classifier(by_constant, retainer, **TINY)
        HardPruning(model, ["accuracy"], torch.optim.AdamW)
        with pytest.raises(ValueError, match="ltp learns thresholds: retainer=learned_threshold"):
            LTP(model, ["accuracy"], torch.optim.AdamW, LTPLoss())


def test_the_trace_says_which_threshold_was_in_force_in_each_layer(
    random_classifier: Build, ragged_batch: Build
) -> None:
    model = ltp_model(random_classifier, offsets=OFFSETS)
    model.pruning.retainer.knob.fill_(math.log(2))
    with torch.no_grad():
        decisions = model(ragged_batch(model, LENGTHS)).trace.decisions
    expected = [2 * (0.01 * (layer + 1) / LAYERS + offset) for layer, offset in enumerate(OFFSETS)]
    assert [float(one.threshold) for one in decisions] == pytest.approx(expected)
