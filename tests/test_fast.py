"""Models prepared for inference: the answers and the traces of plain running, whatever is fast on this machine."""

from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from gathered import SENTENCES, assert_gathered_equals_masked, assert_same_tokens, loaded_once

from tokprune_exp.data.batches import token_batches
from tokprune_exp.data.tokenise import encode_texts
from tokprune_exp.encoder import fast
from tokprune_exp.encoder.fast import FastLayer, filled_up
from tokprune_exp.head import Head
from tokprune_exp.kernels.attention import attend_in_loop
from tokprune_exp.kernels.linear import PackedProduct, PlainProduct
from tokprune_exp.model import PrunedClassifier
from tokprune_exp.pruning.pruning import Pruning
from tokprune_exp.pruning.retainers import (
    AdaptiveRatio,
    Backtracking,
    Concrete,
    LearnedThreshold,
    ManualThreshold,
    MinP,
    Nucleus,
    StaticRatio,
    TopKSchedule,
)
from tokprune_exp.pruning.scorers import ApproxAttention, AttentionMass, ExactAttention, TokenSaliency

LENGTHS = [23, 1, 2, 3, 40, 11, 5]
PRUNINGS = {
    "none": (None, None),
    "adtp": (TokenSaliency, AdaptiveRatio),
    "static": (TokenSaliency, StaticRatio),
    "nucleus": (TokenSaliency, Nucleus),
    "min_p": (TokenSaliency, MinP),
    "ltp": (AttentionMass, LearnedThreshold),
    "ltp_by_length": (partial(AttentionMass, normalisation="length"), partial(LearnedThreshold, final_threshold=0.06)),
    "manual_threshold": (AttentionMass, ManualThreshold),
    "manual_topk": (AttentionMass, TopKSchedule),
    "sttabt": (ApproxAttention, Concrete),
    "backtracking": (ApproxAttention, Backtracking),
    "exact_backtracking": (ExactAttention, Backtracking),
}


def built(random_classifier, pruning, **settings):
    """A random classifier; thresholds are moved a little, since large random offsets would keep all or nothing."""
    model = random_classifier(*PRUNINGS[pruning], **settings)
    if pruning.startswith("ltp"):
        with torch.no_grad():
            model.pruning.retainer.offset.copy_(torch.tensor([0.001, 0.001, -0.001, 0.0005]))
    return model


def dropping_layers(trace):
    """How many layers pass on fewer tokens than they attend to."""
    return sum(bool(layer.outputs.sum() < layer.keys.sum()) for layer in trace.layers)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("pruning", PRUNINGS)
@pytest.mark.parametrize("heads", [1, 2, 4])  # of 64 and 32 numbers, which the compiled attention knows, and of 16
def test_every_method_answers_and_prunes_as_it_does_masked(family, pruning, heads, random_classifier, ragged_batch):
    model = built(random_classifier, pruning, family=family, heads=heads)
    batch = ragged_batch(model, LENGTHS, extra=3)
    assert_gathered_equals_masked(model, batch)
    ready = model.for_inference()
    assert all(isinstance(layer, FastLayer) for layer in ready.encoder.layers)
    with torch.no_grad():
        expected, ours = model(batch), ready(batch, "gathered")
        torch.testing.assert_close(ours.logits, expected.logits, atol=1e-5, rtol=0)
        assert_same_tokens(ours.trace, expected.trace)
        assert not pruning.startswith(("ltp", "manual")) or dropping_layers(ours.trace) >= 3
        dense = model(batch, prune=False).logits
        torch.testing.assert_close(ready(batch, "gathered", prune=False).logits, dense, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 7, 32])
def test_batches_of_every_size(size, random_classifier, ragged_batch):
    model = built(random_classifier, "ltp", heads=2)
    batch = ragged_batch(model, (LENGTHS * 5)[:size], extra=2)
    with torch.no_grad():
        ours = model.for_inference()(batch, "gathered").logits
        torch.testing.assert_close(ours, model(batch).logits, atol=1e-5, rtol=0)


@pytest.fixture
def gte_directory(shared_weights):
    if not (shared_weights / "gte_small").is_dir():
        pytest.skip(f"no gte_small in {shared_weights}")
    return shared_weights / "gte_small"


@pytest.mark.parametrize("backbone", ["minilm_directory", "gte_directory"])
@pytest.mark.parametrize("pruning", ["none", "adtp", "ltp"])
def test_real_weights_and_real_sentences(backbone, pruning, request):
    loaded = loaded_once(Path(request.getfixturevalue(backbone)))
    scorer, retainer = PRUNINGS[pruning]
    shape = loaded.encoder.shape
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = Head(shape.dim, 2)
        chosen = None if scorer is None else Pruning(scorer(shape.dim), retainer(shape.dim, shape.layers))
    model = PrunedClassifier(loaded.encoder, head, chosen, separator=102).eval()
    batch = encode_texts(loaded.tokenizer, SENTENCES, 128).collate(range(len(SENTENCES)))
    with torch.no_grad():
        expected, ours = model(batch).logits, model.for_inference()(batch, "gathered")
        torch.testing.assert_close(ours.logits, expected, atol=1e-5, rtol=0)
        assert pruning != "ltp" or dropping_layers(ours.trace) >= 3
        coarse = model.for_inference("bf16")(batch, "gathered", prune=False).logits
        torch.testing.assert_close(coarse, model(batch, prune=False).logits, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("product", [PlainProduct, PackedProduct])
def test_without_any_compiled_part_the_answer_is_the_same(product, random_classifier, ragged_batch, monkeypatch):
    """As on a machine without a compiler, without oneDNN and with it."""
    model = built(random_classifier, "ltp", heads=2)
    monkeypatch.setattr(fast, "attention_for", lambda head_dim, device: lambda longest: attend_in_loop)
    monkeypatch.setattr(fast, "compiled_selection", lambda: None)
    monkeypatch.setattr("tokprune_exp.kernels.linear.fastest_product", lambda dtype: product)
    ready = model.for_inference()
    assert ready.encoder.layers[0].attention_up_to(40) is attend_in_loop
    assert isinstance(ready.encoder.layers[0].project, product) and ready.encoder.layers[0].block is None
    batch = ragged_batch(model, LENGTHS)
    with torch.no_grad():
        torch.testing.assert_close(ready(batch, "gathered").logits, model(batch).logits, atol=1e-5, rtol=0)


def test_bfloat16_differs_little_and_prunes_nearly_the_same(random_classifier, ragged_batch):
    model = random_classifier(AttentionMass, ManualThreshold, heads=2)
    batch = ragged_batch(model, [20] * 32)
    with torch.no_grad():
        exact, coarse = (model.for_inference(one)(batch, "gathered") for one in ("fp32", "bf16"))
    same = exact.trace.layers[0].outputs == coarse.trace.layers[0].outputs
    assert same[batch.valid].float().mean() > 0.98
    assert not torch.equal(exact.logits, coarse.logits)
    assert coarse.logits.dtype == torch.float32


def test_the_inner_life_is_that_of_plain_running(random_classifier, ragged_batch):
    model = random_classifier(heads=2)
    batch = ragged_batch(model, LENGTHS)
    ready = model.for_inference()
    with torch.no_grad():
        plain = model.encoder(*model.start(batch, "gathered"), wants_inner=True)
        ours = ready.encoder(*ready.start(batch, "gathered"), wants_inner=True)
    for name in ("scores", "layer_outputs"):
        for one, other in zip(getattr(ours, name), getattr(plain, name), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_the_model_itself_is_left_as_it_was(random_classifier, ragged_batch):
    model = random_classifier(AttentionMass, LearnedThreshold).train()
    names = set(model.state_dict())
    ready = model.for_inference()
    assert model.training and not ready.training
    assert set(model.state_dict()) == names
    assert not any(isinstance(layer, FastLayer) for layer in model.encoder.layers)
    assert ready.encoder.embeddings is model.encoder.embeddings and ready.pruning is model.pruning


def test_masked_running_is_refused(random_classifier, ragged_batch):
    model = random_classifier().for_inference()
    with pytest.raises(ValueError, match="prepared for inference runs gathered only"):
        model(ragged_batch(model, LENGTHS))


def test_rows_are_filled_up_with_whatever_lies_behind_them_or_with_zeros():
    rows = torch.randn(70, 3)
    filled = filled_up(rows)
    assert filled.shape == (72, 3) and torch.equal(filled[:70], rows) and not filled[70:].any()
    exact = torch.randn(64, 3)
    assert filled_up(exact) is exact
    inside = torch.randn(80, 3)[5:75]
    assert filled_up(inside).data_ptr() == inside.data_ptr() and torch.equal(filled_up(inside)[:70], inside)
    at_the_end = torch.randn(75, 3)[5:]
    assert torch.equal(filled_up(at_the_end)[:70], at_the_end) and not filled_up(at_the_end)[70:].any()
    columns = torch.randn(3, 80).T[:70]
    assert torch.equal(filled_up(columns)[:70], columns)


def test_batches_of_at_most_so_many_tokens():
    lengths = torch.tensor([5, 100, 1, 30, 60, 7, 512])
    batches = token_batches(lengths, 100)
    assert [batch.tolist() for batch in batches] == [[6], [1], [4, 3, 5], [0, 2]]  # longest first, a long text alone
    assert [int(lengths[batch].sum()) for batch in batches] == [512, 100, 97, 6]
    assert token_batches(torch.tensor([], dtype=torch.long), 100) == []


def test_heads_and_choices_are_made_by_the_same_weights_and_share_everything_else(random_classifier, ragged_batch):
    model = random_classifier(TokenSaliency, AdaptiveRatio, heads=2)
    ready = model.for_inference()
    assert ready.pruning.retainer.knob is model.pruning.retainer.knob
    exchanged = (
        ready.head.pooler,
        ready.head.classifier,
        ready.pruning.scorer.inner,
        ready.pruning.retainer.classifier,
    )
    assert all(isinstance(part, fast.FastLinear) for part in exchanged)
    assert isinstance(model.pruning.scorer.inner, torch.nn.Linear) and isinstance(model.head.pooler, torch.nn.Linear)
    batch = ragged_batch(model, LENGTHS)
    with torch.no_grad():
        plain, ours = model(batch, "gathered").trace.decisions[0], ready(batch, "gathered").trace.decisions[0]
    torch.testing.assert_close(ours.importance, plain.importance, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.ratio_logits, plain.ratio_logits, atol=1e-5, rtol=0)


def test_a_prepared_pruning_can_be_copied(random_classifier, ragged_batch):
    """The bench moves the knob of a copy."""
    model = random_classifier(TokenSaliency, AdaptiveRatio, heads=2).for_inference()
    twin = deepcopy(model.pruning)
    twin.retainer.knob.fill_(0.123)
    assert model.pruning.retainer.knob != twin.retainer.knob
    hidden = torch.randn(5, model.encoder.shape.dim)
    torch.testing.assert_close(twin.scorer.inner(hidden), model.pruning.scorer.inner(hidden))
