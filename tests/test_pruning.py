"""Pruned tokens are gone: gathered = masked for every scorer and retainer, and both equal the removal by hand."""

import math
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from gathered import assert_gathered_has_the_gradients_of_masked
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tokprune_exp.data.batch import Batch
from tokprune_exp.data.tokenise import encode_texts
from tokprune_exp.encoder.backbone import Backbone
from tokprune_exp.encoder.layout import Padded, Sequences
from tokprune_exp.encoder.pretrained import load_backbone
from tokprune_exp.encoder.trace import PruningTrace
from tokprune_exp.head import Head
from tokprune_exp.measure.evaluation import check_flops
from tokprune_exp.model import ClassifierOutput, PrunedClassifier
from tokprune_exp.pruning.pruning import RETAINERS, SCORERS, Prescribed, Pruning
from tokprune_exp.pruning.retainers import AdaptiveRatio, KeepAll, MinP, Nucleus, RandomRatio, StaticRatio
from tokprune_exp.pruning.scorers import AttentionMass, RandomScores, TokenSaliency
from tokprune_exp.pruning.selection import keep_top, kept_count, ranks, uniform_noise

FAMILIES = ["bert", "roberta", "distilbert"]
LENGTHS = [23, 1, 2, 3, 40, 11, 5]
LAST = 3

SCORER_VARIANTS = {
    "token_saliency": TokenSaliency,
    "token_saliency_relu": partial(TokenSaliency, activation="relu"),
    "token_saliency_none": partial(TokenSaliency, activation="none", hidden_dim=8),
    "attention_mass": AttentionMass,
    "attention_mass_length": partial(AttentionMass, normalisation="length"),
    "random": partial(RandomScores, seed=5),
}
RETAINER_VARIANTS = {
    "static": StaticRatio,
    "static_half_with_separators": partial(StaticRatio, ratio=0.5, keeps_separators=True),
    "random": partial(RandomRatio, seed=5),
    "adaptive": AdaptiveRatio,
    "nucleus": Nucleus,
    "min_p": MinP,
    "adaptive_cls_mean": partial(AdaptiveRatio, summary="cls_mean", candidates=5),
    "keep_all": KeepAll,
}

Build = Callable[..., Any]


def both(model: PrunedClassifier, batch: Batch) -> tuple[ClassifierOutput, ClassifierOutput]:
    with torch.no_grad():
        return model(batch), model(batch, "gathered")


def assert_equal_traces(ours: PruningTrace, theirs: PruningTrace) -> None:
    assert torch.equal(ours.valid, theirs.valid) and len(ours.layers) == len(theirs.layers)
    for one, two in zip(ours.layers, theirs.layers, strict=True):
        for kind in ("keys", "queries", "outputs"):
            assert torch.equal(getattr(one, kind), getattr(two, kind))
        assert (one.importance is None) == (two.importance is None)
        if one.importance is not None and two.importance is not None:
            torch.testing.assert_close(one.importance, two.importance, atol=1e-5, rtol=1e-5)
    for kind in ("keys", "queries", "outputs"):
        assert torch.equal(ours.counts(kind), theirs.counts(kind))
    for one, two in zip(ours.decisions, theirs.decisions, strict=True):
        assert (one.ratio_logits is None) == (two.ratio_logits is None)
        if one.ratio_logits is not None:
            torch.testing.assert_close(one.ratio_logits, two.ratio_logits, atol=1e-5, rtol=0)


# The invariant


@pytest.mark.parametrize("layer", [0, 1, LAST])
@pytest.mark.parametrize("retainer", ["static", "random", "adaptive", "nucleus", "min_p"])
@pytest.mark.parametrize("scorer", ["token_saliency", "attention_mass", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gathered_equals_masked_for_every_scorer_and_retainer(
    family: str, scorer: str, retainer: str, layer: int, random_classifier: Build, ragged_batch: Build
) -> None:
    model = random_classifier(SCORERS[scorer], partial(RETAINERS[retainer], layer=layer), family)
    if retainer == "min_p":  # attention through random weights is almost even
        model.pruning.retainer.knob.fill_(0.95)
    for size in (1, 2, 7, 32):
        masked, gathered = both(model, batch := ragged_batch(model, (LENGTHS * 5)[:size], extra=2))
        torch.testing.assert_close(gathered.logits, masked.logits, atol=1e-5, rtol=0)
        assert_equal_traces(gathered.trace, masked.trace)
        assert retainer == "adaptive" or (masked.trace.counts("outputs")[0] < 23).tolist()[LAST]
        assert (masked.trace.layers[LAST].outputs & ~batch.valid).sum() == 0


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("retainer", RETAINER_VARIANTS)
@pytest.mark.parametrize("scorer", SCORER_VARIANTS)
def test_gathered_equals_masked_with_every_setting(
    scorer: str, retainer: str, layer: int, random_classifier: Build, ragged_batch: Build
) -> None:
    at = {} if retainer == "keep_all" else {"layer": layer}
    model = random_classifier(SCORER_VARIANTS[scorer], partial(RETAINER_VARIANTS[retainer], **at))
    masked, gathered = both(model, ragged_batch(model, LENGTHS))
    torch.testing.assert_close(gathered.logits, masked.logits, atol=1e-5, rtol=0)
    assert_equal_traces(gathered.trace, masked.trace)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("retainer", ["static", "random", "adaptive", "nucleus", "min_p", "adaptive_cls_mean"])
@pytest.mark.parametrize("scorer", SCORER_VARIANTS)
def test_gathered_training_has_the_gradients_of_masked_training(
    scorer: str, retainer: str, layer: int, random_classifier: Build, ragged_batch: Build
) -> None:
    model = random_classifier(SCORER_VARIANTS[scorer], partial(RETAINER_VARIANTS[retainer], layer=layer))
    if retainer == "min_p":
        model.pruning.retainer.knob.fill_(0.95)
    elif "adaptive" in retainer:
        model.pruning.retainer.knob.fill_(0.1)
    assert_gathered_has_the_gradients_of_masked(model, ragged_batch(model, LENGTHS, extra=2))


@pytest.mark.parametrize("scorer", ["token_saliency", "attention_mass"])
def test_a_summary_of_cls_works_from_layer_one_on(scorer: str, random_classifier: Build, ragged_batch: Build) -> None:
    model = random_classifier(SCORERS[scorer], partial(AdaptiveRatio, summary="cls", layer=1))
    masked, gathered = both(model, ragged_batch(model, LENGTHS))
    torch.testing.assert_close(gathered.logits, masked.logits, atol=1e-5, rtol=0)
    assert_equal_traces(gathered.trace, masked.trace)


@pytest.mark.parametrize("execution", ["masked", "gathered"])
@pytest.mark.parametrize("retainer", ["static", "random", "adaptive", "nucleus", "min_p"])
@pytest.mark.parametrize("scorer", ["token_saliency", "attention_mass", "random"])
def test_padding_columns_change_no_logit_no_mask_and_no_count(
    scorer: str, retainer: str, execution: str, random_classifier: Build, ragged_batch: Build
) -> None:
    model = random_classifier(SCORERS[scorer], partial(RETAINERS[retainer], layer=1))
    with torch.no_grad():
        narrow, wide = (model(ragged_batch(model, LENGTHS, extra), execution) for extra in (0, 19))
    torch.testing.assert_close(wide.logits, narrow.logits, atol=1e-5, rtol=0)
    for ours, theirs in zip(wide.trace.layers, narrow.trace.layers, strict=True):
        assert torch.equal(ours.outputs[:, :40], theirs.outputs) and not ours.outputs[:, 40:].any()
    assert torch.equal(wide.trace.counts("outputs"), narrow.trace.counts("outputs"))


@pytest.mark.parametrize("execution", ["masked", "gathered"])
@pytest.mark.parametrize("retainer", ["static", "random", "adaptive", "nucleus", "min_p"])
@pytest.mark.parametrize("scorer", ["token_saliency", "attention_mass", "random"])
def test_a_sequence_is_pruned_in_the_same_way_in_any_company(
    scorer: str, retainer: str, execution: str, random_classifier: Build, ragged_batch: Build
) -> None:
    model = random_classifier(SCORERS[scorer], partial(RETAINERS[retainer], layer=1))
    with torch.no_grad():
        together = model(ragged_batch(model, LENGTHS), execution)
        for seed, length in enumerate(LENGTHS):
            alone = model(ragged_batch(model, [length], seeds=[seed]), execution)
            torch.testing.assert_close(alone.logits[0], together.logits[seed], atol=1e-5, rtol=0)
            kept = together.trace.layers[LAST].outputs[seed]
            assert torch.equal(alone.trace.layers[LAST].outputs[0], kept[:length])


@pytest.mark.parametrize(("scorer", "layer"), [("token_saliency", 0), ("attention_mass", 3), ("random", 11)])
def test_gathered_equals_masked_with_the_weights_of_gte_small(
    scorer: str, layer: int, shared_weights: Path, tmp_path: Path
) -> None:
    if not (shared_weights / "gte_small").is_dir():
        pytest.skip(f"no gte_small in {shared_weights}")
    torch.manual_seed(0)
    loaded = load_backbone(Backbone(name="gte_small", path=str(shared_weights / "gte_small")), str(tmp_path))
    pruning = Pruning(SCORERS[scorer](384), AdaptiveRatio(384, 6, layer=layer))
    model = PrunedClassifier(loaded.encoder, Head(384, 2), pruning, loaded.tokenizer.sep_token_id).eval()
    with torch.no_grad():
        model.head.classifier.weight.mul_(20)
        pruning.retainer.classifier.bias[4:] -= 10
    sentences = ["dull", "a gripping, beautifully acted film that never once lets go", "two hours of nothing. " * 12]
    masked, gathered = both(model, encode_texts(loaded.tokenizer, sentences, 128).collate(range(3)))
    torch.testing.assert_close(gathered.logits, masked.logits, atol=1e-5, rtol=0)
    assert_equal_traces(gathered.trace, masked.trace)
    assert masked.trace.retention[1:, -1].max() < 0.6


# Pruning by hand, in transformers' own models


def first_hidden_by_hand(theirs: Any, ids: Tensor, types: Tensor, places: list[int]) -> Tensor:
    """The hidden state of [CLS] when transformers is given only the surviving tokens, at their old positions."""
    offset = 2 if theirs.config.model_type == "roberta" else 0
    inputs = {"input_ids": ids[None, places], "position_ids": torch.tensor([places]) + offset}
    if theirs.config.model_type == "bert":
        inputs["token_type_ids"] = types[None, places]
    return theirs(**inputs).last_hidden_state[0, 0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scorer", ["token_saliency", "random"])
def test_pruning_at_the_input_equals_transformers_on_the_surviving_tokens(
    scorer: str, family: str, random_transformer: Build, random_classifier: Build, ragged_batch: Build
) -> None:
    model, theirs = random_classifier(SCORERS[scorer], StaticRatio, family), random_transformer(family)
    batch = ragged_batch(model, LENGTHS)
    with torch.no_grad():
        for output in both(model, batch):
            kept, importance = output.trace.layers[0].keys, output.trace.layers[0].importance
            for row, length in enumerate(LENGTHS):
                order = sorted(range(1, length), key=lambda i, row=row: -float(importance[row, i]))
                places = sorted([0, *order[: math.ceil(0.3 * (length - 1) - 1e-9)]])
                assert kept[row].nonzero()[:, 0].tolist() == places
                first = first_hidden_by_hand(theirs, batch.input_ids[row], batch.token_type_ids[row], places)
                torch.testing.assert_close(output.logits[row], model.head(first[None])[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("after_attention", [False, True])
@pytest.mark.parametrize("layer", [0, 1, LAST])
def test_pruning_at_a_layer_equals_a_plain_loop_over_the_layers_of_transformers(
    layer: int, after_attention: bool, random_transformer: Build, random_classifier: Build, ragged_batch: Build
) -> None:
    """Each sequence alone; scores from transformers' own attention weights; rows cut out of the hidden states."""
    scorer = partial(AttentionMass, normalisation="length") if after_attention else TokenSaliency
    model, theirs = random_classifier(scorer, partial(StaticRatio, layer=layer)), random_transformer()
    batch = ragged_batch(model, LENGTHS)

    def survivors(importance: Tensor) -> Tensor:
        order = sorted(range(1, len(importance)), key=lambda i: -float(importance[i]))
        return torch.tensor(sorted([0, *order[: math.ceil(0.3 * len(order) - 1e-9)]]))

    with torch.no_grad():
        outputs = both(model, batch)
        for row, length in enumerate(LENGTHS):
            ids, types = batch.input_ids[row : row + 1, :length], batch.token_type_ids[row : row + 1, :length]
            hidden = theirs.embeddings(input_ids=ids, token_type_ids=types)
            places = torch.arange(length)
            for number, block in enumerate(theirs.encoder.layer):
                if number == layer and not after_attention:
                    mlp = model.pruning.scorer
                    saliency = mlp.outer(mlp.inner(hidden).relu()).exp().log1p()[0, :, 0]
                    places = survivors(saliency)
                    hidden = hidden[:, places]
                attention = block.attention.self
                heads = (1, -1, attention.num_attention_heads, attention.attention_head_size)
                query, key, value = (
                    linear(hidden).view(heads).transpose(1, 2)
                    for linear in (attention.query, attention.key, attention.value)
                )
                weights = (query @ key.transpose(2, 3) / math.sqrt(attention.attention_head_size)).softmax(-1)
                context = (weights @ value).transpose(1, 2).flatten(2)
                if number == layer and after_attention:
                    received = weights[0].mean(0).mean(0)  # over heads, over queries
                    places = survivors(received)
                    context, hidden = context[:, places], hidden[:, places]
                    for output in outputs:
                        ours = output.trace.layers[layer].importance[row, :length]
                        torch.testing.assert_close(ours, received, atol=1e-5, rtol=0)
                attended = block.attention.output(context, hidden)
                hidden = block.output(block.intermediate(attended), attended)
            logits = model.head(hidden[:, 0])[0]
            for output in outputs:
                assert output.trace.layers[LAST].outputs[row].nonzero()[:, 0].tolist() == places.tolist()
                torch.testing.assert_close(output.logits[row], logits, atol=1e-5, rtol=0)


# What is never pruned, what is never computed


@pytest.mark.parametrize("execution", ["masked", "gathered"])
@pytest.mark.parametrize("retainer", ["static", "random", "adaptive", "nucleus", "min_p"])
@pytest.mark.parametrize("scorer", ["token_saliency", "attention_mass", "random"])
def test_the_first_position_stays_and_short_sequences_never_become_empty(
    scorer: str, retainer: str, execution: str, random_classifier: Build, ragged_batch: Build
) -> None:
    model = random_classifier(SCORERS[scorer], partial(RETAINERS[retainer], ratio=0.01, layer=1))
    lengths = [1, 2, 3, 3, 2, 1, 40]
    with torch.no_grad():
        output = model(ragged_batch(model, lengths), execution)
    assert output.logits.isfinite().all()
    assert all(layer.outputs[:, 0].all() for layer in output.trace.layers)
    kept = output.trace.counts("outputs")[:, LAST]
    assert kept.tolist()[:6] == [1, 2, 2, 2, 2, 1] or retainer in ("adaptive", "nucleus", "min_p")
    assert (kept >= torch.tensor(lengths).clamp(max=2)).all()


@pytest.mark.parametrize("execution", ["masked", "gathered"])
def test_separators_stay_on_request(execution: str, random_classifier: Build, ragged_batch: Build) -> None:
    kept = {}
    for keeps in (True, False):
        model = random_classifier(RandomScores, partial(StaticRatio, ratio=0.2, keeps_separators=keeps))
        batch = ragged_batch(model, LENGTHS, extra=2)
        with torch.no_grad():
            kept[keeps] = model(batch, execution).trace.layers[0].outputs
    separators = batch.valid & (batch.input_ids == 3)
    assert separators.sum() == 9
    assert kept[True][separators].all() and not kept[False][separators].all()
    prunable = batch.valid.sum(1) - 1 - separators.sum(1)
    expected = [math.ceil(0.2 * n - 1e-9) for n in prunable.tolist()]
    assert (kept[True].sum(1) - 1 - separators.sum(1)).tolist() == expected


@pytest.mark.parametrize("execution", ["masked", "gathered"])
@pytest.mark.parametrize("retainer", [StaticRatio, RandomRatio])
@pytest.mark.parametrize("scorer", ["token_saliency", "attention_mass", "random"])
def test_a_ratio_of_one_is_the_dense_model(
    scorer: str, retainer: Build, execution: str, random_classifier: Build, ragged_batch: Build
) -> None:
    model = random_classifier(SCORERS[scorer], partial(retainer, ratio=1.0, layer=1))
    batch = ragged_batch(model, LENGTHS)
    with torch.no_grad():
        pruned, dense = model(batch, execution), model(batch, execution, prune=False)
    torch.testing.assert_close(pruned.logits, dense.logits, atol=1e-5, rtol=0)
    assert (pruned.trace.retention == 1).all()


@pytest.mark.parametrize("layer", [0, 1, LAST])
@pytest.mark.parametrize("scorer", ["token_saliency", "attention_mass"])
def test_gathered_running_computes_no_pruned_row(
    scorer: str, layer: int, random_classifier: Build, ragged_batch: Build
) -> None:
    """The rows that pass the linear layers are counted and compared with the trace and with the ratio itself."""
    model = random_classifier(SCORERS[scorer], partial(StaticRatio, layer=layer))
    batch = ragged_batch(model, LENGTHS, extra=9)
    rows: dict[str, list[int]] = {}
    for block in model.encoder.layers:
        for name, linear in block.named_children():
            if isinstance(linear, nn.Linear):
                linear.register_forward_pre_hook(
                    lambda _, args, name=name: rows.setdefault(name, []).append(args[0].shape[:-1].numel())
                )
    with torch.no_grad():
        trace = model(batch, "gathered").trace

    everything = sum(LENGTHS)
    survivors = sum(1 + min(math.ceil(0.3 * (n - 1) - 1e-9), n - 1) for n in LENGTHS)
    outputs = [everything if number < layer else survivors for number in range(4)]
    entering = outputs if scorer == "token_saliency" else [everything, *outputs[:-1]]
    assert rows["query"] == rows["key"] == rows["value"] == entering == trace.counts("keys").sum(0).tolist()
    assert rows["attention_output"] == rows["intermediate"] == rows["output"] == outputs
    assert outputs == trace.counts("outputs").sum(0).tolist()
    assert survivors < everything / 2


# Choosing by rank


grids = st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, -1.0]), min_size=7, max_size=7), min_size=1, max_size=4)
masks = st.lists(st.booleans(), min_size=7, max_size=7)


@settings(max_examples=60, deadline=None)
@given(grid=grids, mask=masks)
def test_ranks_equal_a_stable_sort_of_the_eligible_tokens(grid: list[list[float]], mask: list[bool]) -> None:
    eligible = torch.tensor(mask).expand(len(grid), 7)
    ours = ranks(torch.tensor(grid), eligible)
    for row, values in enumerate(grid):
        order = sorted((i for i in range(7) if mask[i]), key=lambda i: (-values[i], i))
        assert [int(ours[row, i]) for i in order] == list(range(len(order)))
        assert sorted(ours[row].tolist()) == list(range(7))


@settings(max_examples=60, deadline=None)
@given(grid=grids, mask=masks, percent=st.integers(min_value=1, max_value=100))
def test_keep_top_equals_a_plain_loop(grid: list[list[float]], mask: list[bool], percent: int) -> None:
    prunable = torch.tensor(mask).expand(len(grid), 7).clone()
    prunable[:, 0] = False
    protected = torch.zeros_like(prunable)
    protected[:, 0] = True
    ours = keep_top(torch.tensor(grid), percent / 100, prunable, protected)
    for row, values in enumerate(grid):
        order = sorted((i for i in range(1, 7) if mask[i]), key=lambda i: (-values[i], i))
        kept = order[: max(1, -(-percent * len(order) // 100))]
        assert sorted([0, *kept]) == ours[row].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("candidates", [5, 10, 20])
def test_the_kept_count_is_the_ceiling_of_the_decimal_ratio_for_every_length(candidates: int) -> None:
    """As the ratios come: a Python float, and the candidates r_c = c/C in single precision."""
    lengths = torch.arange(0, 1025)
    ratios = AdaptiveRatio(4, 4, candidates=candidates).ratios
    for c, ratio in enumerate(ratios, start=1):
        exact = [min(n, max(1, -(-c * n // candidates))) for n in lengths.tolist()]
        assert kept_count(c / candidates, lengths).tolist() == exact
        assert kept_count(float(ratio), lengths).tolist() == exact
        assert kept_count(ratio.expand(len(lengths)), lengths).tolist() == exact


def test_three_tenths_of_ten_tokens_are_three() -> None:
    assert kept_count(0.3, torch.tensor([10, 11, 1, 0])).tolist() == [3, 4, 1, 0]


def test_a_ratio_drawn_as_zero_still_keeps_one_token_where_there_is_one() -> None:
    assert kept_count(torch.zeros(3), torch.tensor([10, 1, 0])).tolist() == [1, 1, 0]


def test_ties_go_to_the_earlier_token() -> None:
    importance = torch.tensor([[9.0, 1.0, 2.0, 1.0, 2.0, 1.0]])
    prunable = torch.tensor([[False, True, True, True, True, True]])
    assert ranks(importance, prunable)[0, 1:].tolist() == [2, 0, 3, 1, 4]
    assert ranks(torch.zeros(1, 512), torch.ones(1, 512, dtype=torch.bool))[0].tolist() == list(range(512))
    assert keep_top(importance, 0.6, prunable, ~prunable).tolist() == [[True, True, True, False, True, False]]


def test_noise_depends_on_seed_fingerprint_and_position_only() -> None:
    fingerprints = torch.tensor([12, 10**15, 7, -5])
    noise = uniform_noise(fingerprints, 50, seed=3)
    assert torch.equal(uniform_noise(fingerprints, 90, seed=3)[:, :50], noise)
    assert torch.equal(uniform_noise(fingerprints[2:3], 50, seed=3), noise[2:3])
    torch.manual_seed(9)
    assert torch.equal(uniform_noise(fingerprints, 50, seed=3), noise)
    assert not torch.equal(uniform_noise(fingerprints, 50, seed=4), noise)
    assert len({tuple(row) for row in noise.tolist()}) == 4


def test_noise_is_uniform_and_neighbours_do_not_know_of_each_other() -> None:
    noise = uniform_noise(torch.arange(200), 100, seed=0).double()
    assert noise.min() >= 0 and noise.max() < 1
    shares = torch.histc(noise, bins=20, min=0, max=1) / noise.numel()
    assert (shares - 0.05).abs().max() < 0.006
    for one, two in ((noise[:, 1:], noise[:, :-1]), (noise[1:], noise[:-1])):
        correlation = torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1]
        assert abs(correlation) < 0.03


def test_a_text_gets_other_random_scores_than_another_text_and_than_its_own_anagram(
    random_classifier: Build, ragged_batch: Build
) -> None:
    model = random_classifier(RandomScores, StaticRatio)
    batch = ragged_batch(model, [12, 12, 12])
    batch.input_ids[2] = batch.input_ids[1]
    batch.input_ids[2, [4, 5]] = batch.input_ids[1, [5, 4]]
    fingerprints = model.sequences(batch).fingerprint.tolist()
    assert len(set(fingerprints)) == 3


# Scorers and retainers by themselves


def a_layout(lengths: list[int]) -> tuple[Padded, Tensor]:
    generator = torch.Generator().manual_seed(0)
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    protected = torch.zeros_like(valid)
    protected[:, 0] = True
    hidden = torch.randn(len(lengths), max(lengths), 6, generator=generator)
    return Padded.start(
        Sequences(valid, protected, (torch.arange(len(lengths)) + 7)[:, None].expand(valid.shape))
    ), hidden


def test_attention_mass_divides_by_the_length_or_by_a_constant_and_only_after_an_attention() -> None:
    layout, hidden = a_layout([5, 3])
    received = torch.rand(2, 5)
    by_length = AttentionMass(6, normalisation="length")(hidden, layout, received)
    torch.testing.assert_close(by_length, received / torch.tensor([[5.0], [3.0]]))
    torch.testing.assert_close(AttentionMass(6)(hidden, layout, received), received / 128)
    torch.testing.assert_close(AttentionMass(6, constant=64)(hidden, layout, received), received / 64)
    with pytest.raises(ValueError, match="attention_mass is asked before any attention was computed"):
        AttentionMass(6)(hidden, layout, None)


def test_attention_received_sums_to_the_number_of_tokens(random_classifier: Build, ragged_batch: Build) -> None:
    """LTP: the scores of a sequence sum to n / norm, whatever the padding."""
    for normalisation, expected in (("length", [1.0] * 7), ("constant", [n / 128 for n in LENGTHS])):
        model = random_classifier(partial(AttentionMass, normalisation=normalisation), partial(StaticRatio, layer=1))
        for output in both(model, ragged_batch(model, LENGTHS, extra=4)):
            sums = output.trace.layers[1].importance.sum(1)
            torch.testing.assert_close(sums, torch.tensor(expected), atol=1e-5, rtol=0)


def test_a_random_ratio_has_the_asked_mean_and_stays_in_its_range() -> None:
    layout, hidden = a_layout([101] * 2000)
    importance = torch.rand(2000, 101)
    for ratio, low, high in ((0.3, 1, 60), (0.8, 60, 100)):
        kept = RandomRatio(6, 4, ratio=ratio)(importance, hidden, layout, 0).keep.sum(1) - 1
        assert kept.min() >= low and kept.max() <= high
        assert kept.float().mean().item() == pytest.approx(100 * ratio, abs=2)
    assert kept.float().std() > 5


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_a_nucleus_is_the_shortest_beginning_of_the_ranking_that_holds_the_share(share: float) -> None:
    lengths = [21, 11, 6, 2, 1]
    layout, hidden = a_layout(lengths)
    retainer = Nucleus(6, 4)
    retainer.knob.fill_(share)
    importance = torch.randn(5, 21, generator=torch.Generator().manual_seed(1))
    keep = retainer(importance, hidden, layout, 0).keep
    for row, length in enumerate(lengths):
        falling = sorted(range(1, length), key=lambda place: -float(importance[row, place]))
        mass = [max(0.0, float(importance[row, place])) for place in falling]
        enough = next((k for k in range(1, length) if sum(mass[:k]) >= share * sum(mass) - 1e-12), 0)
        assert set(keep[row].nonzero()[:, 0].tolist()) == {0, *falling[:enough]}


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_min_p_keeps_what_reaches_a_share_of_the_largest_importance(share: float) -> None:
    lengths = [21, 11, 6, 2, 1]
    layout, hidden = a_layout(lengths)
    retainer = MinP(6, 4)
    retainer.knob.fill_(share)
    importance = torch.randn(5, 21, generator=torch.Generator().manual_seed(1))
    importance[:, 0] = 9.0  # the first token stays anyhow, and is no measure for the others
    keep = retainer(importance, hidden, layout, 0).keep
    for row, length in enumerate(lengths):
        falling = sorted(range(1, length), key=lambda place: -float(importance[row, place]))
        tall = 0
        for place in falling:
            if share > 0 and tall and float(importance[row, place]) < share * float(importance[row, falling[0]]):
                break
            tall += 1
        assert set(keep[row].nonzero()[:, 0].tolist()) == {0, *falling[:tall]}


def test_min_p_keeps_one_token_where_none_is_important() -> None:
    layout, hidden = a_layout([6, 4])
    keep = MinP(6, 4)(torch.zeros(2, 6), hidden, layout, 0).keep
    assert keep.tolist() == [[True, True] + 4 * [False]] * 2


def test_a_gate_is_refused_where_what_is_dropped_is_gone(random_classifier: Build, ragged_batch: Build) -> None:
    model = random_classifier(TokenSaliency, partial(StaticRatio, gate_temperature=0.1)).train()
    with pytest.raises(ValueError, match="a gate needs the masked layout"):
        model(ragged_batch(model, LENGTHS), "gathered")


def test_an_adaptive_ratio_is_a_quantile_of_what_is_predicted() -> None:
    layout, hidden = a_layout([21, 11, 6])
    retainer = AdaptiveRatio(6, 4, candidates=5)
    assert retainer.ratios.tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    nn.init.normal_(retainer.classifier.weight)
    decision = retainer(torch.rand(3, 21), hidden, layout, 0)
    for row, length in enumerate([21, 11, 6]):
        scores = retainer.classifier(hidden[row, :length].mean(0))
        torch.testing.assert_close(decision.ratio_logits[row], scores, atol=1e-5, rtol=0)
        for quantile in (0.5, 0.1, 0.9):
            retainer.knob.fill_(quantile)
            so_far = list(accumulate(scores.softmax(0).tolist()))
            chosen = 1 + next(place for place, share in enumerate(so_far) if share >= quantile)
            keep = retainer(torch.rand(3, 21), hidden, layout, 0).keep
            assert int(keep[row].sum()) == 1 + math.ceil(chosen / 5 * (length - 1) - 1e-9)
        retainer.knob.fill_(0.5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(StaticRatio, layers=4, ratio=0.0), r"retainer\.ratio=0\.0 must be above 0 and at most 1"),
        (partial(StaticRatio, layers=4, ratio=1.2), r"retainer\.ratio=1\.2 must be above 0 and at most 1"),
        (partial(RandomRatio, layers=4, ratio=-0.1), r"retainer\.ratio=-0\.1 must be above 0"),
        (partial(AdaptiveRatio, layers=4, ratio=2.0), r"retainer\.ratio=2\.0 must be above 0"),
        (partial(StaticRatio, layers=4, layer=-1), r"retainer\.layer=-1 must be 0 or more"),
        (partial(AdaptiveRatio, layers=4, candidates=1), r"retainer\.candidates=1 must be at least 2"),
        (partial(AdaptiveRatio, layers=4, summary="cls"), r"retainer\.summary=cls with retainer\.layer=0"),
        (partial(TokenSaliency, hidden_dim=0), r"scorer\.hidden_dim=0 must be at least 1"),
        (partial(AttentionMass, constant=0), r"scorer\.constant=0 must be at least 1"),
    ],
)
def test_a_setting_out_of_its_bounds_is_refused_by_its_key(build: Build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(8)


@pytest.mark.parametrize("retainer", [StaticRatio, RandomRatio, AdaptiveRatio, Nucleus, MinP])
def test_a_layer_that_the_encoder_does_not_have_is_refused(retainer: Build, random_classifier: Build) -> None:
    with pytest.raises(ValueError, match=r"retainer\.layer=4, but this encoder has layers 0 to 3"):
        random_classifier(TokenSaliency, partial(retainer, layer=4))


# Learning a ratio through a sample


def exploring(build: Build, **settings: Any) -> PrunedClassifier:
    """A classifier whose retainer samples its ratio, without dropout."""
    model = build(TokenSaliency, partial(AdaptiveRatio, **settings))
    model.pruning.retainer.explores = True
    model.pruning.retainer.train()
    return model


@pytest.mark.parametrize("layer", [0, 1, LAST])
def test_a_sampled_ratio_gives_a_gate_that_equals_the_keep_mask(
    layer: int, random_classifier: Build, ragged_batch: Build
) -> None:
    torch.manual_seed(0)
    model = exploring(random_classifier, layer=layer)
    batch = ragged_batch(model, LENGTHS)
    start, layout = model.start(batch)
    hidden = torch.randn_like(start)
    kept = set()
    for _ in range(10):
        decision = model.pruning.layerwise.decide(hidden, layout, None, 0, "before")
        assert decision.gate is not None and torch.equal(decision.gate.detach(), decision.keep.float())
        ratio_of = (decision.keep.sum(1) - 1)[4].item()
        kept.add(ratio_of)
        assert ratio_of in [math.ceil(39 * c / 10 - 1e-9) for c in range(1, 11)]
    assert len(kept) > 1


def test_a_sampled_ratio_computes_the_same_logits_as_hard_masking_with_its_mask(
    random_classifier: Build, ragged_batch: Build
) -> None:
    torch.manual_seed(0)
    model = exploring(random_classifier, layer=1)
    batch = ragged_batch(model, LENGTHS)
    sampled = model(batch)
    keep = sampled.trace.layers[1].outputs
    hard = model.encoder(*model.start(batch), Prescribed(keep, 1))
    torch.testing.assert_close(sampled.logits, model.head(hard.first), atol=1e-5, rtol=0)


def test_in_evaluation_and_without_exploring_the_ratio_is_not_sampled(
    random_classifier: Build, ragged_batch: Build
) -> None:
    model = exploring(random_classifier)
    batch = ragged_batch(model, LENGTHS)
    model.eval()
    assert torch.equal(model(batch).logits, model(batch).logits)
    model.pruning.retainer.train().explores = False
    assert torch.equal(model(batch).logits, model(batch).logits)


@pytest.mark.parametrize("layer", [0, LAST])
def test_the_task_loss_teaches_the_ratio_through_the_gate(
    layer: int, random_classifier: Build, ragged_batch: Build
) -> None:
    torch.manual_seed(0)
    model = exploring(random_classifier, layer=layer)
    batch = ragged_batch(model, LENGTHS)
    nn.functional.cross_entropy(model(batch).logits, batch.labels).backward()
    gradient = model.pruning.retainer.classifier.weight.grad
    assert gradient.isfinite().all() and gradient.abs().max() > 1e-6


@pytest.mark.parametrize("retainer", [StaticRatio, RandomRatio, AdaptiveRatio, Nucleus, MinP])
def test_a_gate_temperature_lets_the_task_teach_the_scorer_and_changes_no_value(
    retainer: Callable[..., Any], random_classifier: Build, ragged_batch: Build
) -> None:
    model = random_classifier(TokenSaliency, partial(retainer, gate_temperature=0.5))
    batch = ragged_batch(model, LENGTHS)
    hard = model(batch)
    assert model.pruning.retainer.settings()["gate_temperature"] == 0.5
    model.pruning.retainer.train()  # the gate is for training only; the rest stays without dropout
    gated = model(batch)
    torch.testing.assert_close(gated.logits, hard.logits, atol=1e-5, rtol=1e-5)
    assert_equal_traces(gated.trace, hard.trace)
    gated.logits.square().sum().backward()
    for parameter in model.pruning.scorer.parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
    assert model.pruning.scorer.inner.weight.grad.abs().max() > 0


def test_a_gate_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"retainer\.gate_temperature=0"):
        StaticRatio(8, 4, gate_temperature=0.0)


def test_fvcore_counts_what_chose_even_where_nothing_goes(random_classifier: Build, ragged_batch: Build) -> None:
    model = random_classifier(TokenSaliency, partial(StaticRatio, ratio=1.0))
    assert check_flops(model, [ragged_batch(model, lengths) for lengths in ([23], [11, 1, 7])]) == 2
