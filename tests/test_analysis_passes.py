"""What passes leave: every token of the trace in the flat arrays, names forced in and out exactly, states by hand."""

from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tokprune_exp.analysis.forced import ForcedIn, ForcedOut, as_many_at_random, forced_in, forced_out
from tokprune_exp.analysis.passes import flat_places, forwards, importance_of, logits_of, observe, on_grid
from tokprune_exp.analysis.states import States, save_states, silhouette_rows, states_of
from tokprune_exp.data.tokenise import encode_texts
from tokprune_exp.encoder.layout import LAYOUTS
from tokprune_exp.pruning.retainers import Backtracking, LearnedThreshold, StaticRatio, TopKSchedule
from tokprune_exp.pruning.scorers import AttentionMass, ExactAttention, TokenSaliency

TEXTS = [
    "the film is good and the plot is not bad",
    "dull",
    "a very long film but it was fine and not dull",
    "good plot",
    "it was not a good film and the plot was very very dull",
]
METHODS = {
    "ltp": (partial(AttentionMass, normalisation="length"), partial(LearnedThreshold, final_threshold=0.12)),
    "top-k": (AttentionMass, TopKSchedule),
    "adtp": (TokenSaliency, partial(StaticRatio, ratio=0.5, layer=0)),
    "adtp later": (TokenSaliency, partial(StaticRatio, ratio=0.5, layer=2)),
    "separators": (AttentionMass, partial(StaticRatio, ratio=0.3, layer=1, keeps_separators=True)),
    "sttabt": (ExactAttention, partial(Backtracking, k=0.4)),
    "unpruned": (None, None),
}


@pytest.fixture(scope="module", params=METHODS)
def model(request, random_classifier):
    return random_classifier(*METHODS[request.param], outputs=2)


@pytest.fixture(scope="module")
def split(tiny_tokenizer):
    return encode_texts(tiny_tokenizer, TEXTS, 24, torch.tensor([1, 0, 0, 1, 0]))


@pytest.fixture(scope="module")
def named(split):
    """Every third token, [CLS] and [SEP] among them."""
    return np.arange(len(split.input_ids)) % 3 == 0


def decisions_of(rule, hidden, layout, layers):
    """What a rule says at its first place."""
    for layer in range(layers):
        for place in ("before", "queries", "after"):
            if rule.decides(layer, place):
                return (layer, place), rule.decide(hidden, layout, layout.alive.float(), layer, place)
    return None, None


def test_what_is_observed_is_what_the_trace_of_each_text_alone_says(model, split):
    observed, layers = observe(model, split), model.encoder.shape.layers
    for number in range(len(TEXTS)):
        inside = slice(int(split.offsets[number]), int(split.offsets[number + 1]))
        with torch.no_grad():
            alone = model(split.collate([number]))
        outputs = torch.stack([layer.outputs[0] for layer in alone.trace.layers])
        assert observed.survived[inside].tolist() == outputs.sum(0).tolist()
        assert observed.read[inside].tolist() == alone.trace.layers[-1].keys[0].tolist()
        assert observed.tokens_kept[number].tolist() == outputs.sum(1).tolist()
        torch.testing.assert_close(observed.logits[number], alone.logits[0], atol=1e-5, rtol=0)
        # the sets are nested, which is what the depth of a token rests on
        assert all((outputs[layer] & ~outputs[layer - 1]).sum() == 0 for layer in range(1, layers))
        read = torch.tensor(observed.read[inside])
        assert (outputs[-1] & ~read).sum() == 0 and (layers == 1 or (read & ~outputs[-2]).sum() == 0)


def test_importance_is_there_while_the_token_is_and_where_something_is_chosen(model, split):
    observed = observe(model, split)
    for batch, _, encoded in forwards(model, split, ""):
        trace, places = encoded.trace, flat_places(split, batch)
        importance, valid = importance_of(trace), batch.valid
        torch.testing.assert_close(torch.tensor(observed.importance[places]), importance[valid], equal_nan=True)
        for layer in range(len(trace.layers)):
            if trace.entry is not None:
                decision = trace.entry if layer == 0 else trace.layers[layer - 1].decision
                there = valid if layer == 0 else trace.layers[layer - 1].keys
            else:
                decision = trace.layers[layer].decision
                there = valid if layer == 0 else trace.layers[layer - 1].outputs
            if decision is None:
                assert importance[..., layer].isnan().all()
            else:
                assert torch.equal(~importance[..., layer].isnan(), there)
                torch.testing.assert_close(importance[..., layer][there], decision.importance[there])


def test_learned_thresholds_are_recorded_per_layer(random_classifier, split):
    model = random_classifier(*METHODS["ltp"], outputs=2)
    assert observe(model, split).thresholds == pytest.approx(model.pruning.retainer.thresholds.tolist())
    assert observe(random_classifier(outputs=2), split).thresholds == [None] * 4


def test_the_first_decision_differs_at_the_named_tokens_and_nowhere_else(model, split, named):
    batch = split.collate(torch.arange(len(TEXTS)))
    grid = on_grid(named, split, batch)
    assert torch.equal(grid[batch.valid], torch.tensor(named))
    first = torch.zeros_like(batch.valid)
    first[:, 0] = True
    with torch.no_grad():
        for execution in LAYOUTS:
            hidden, layout = model.start(batch, execution)
            rule = None if model.pruning is None else model.pruning.rule(model.encoder, hidden, layout)
            layers, protected = model.encoder.shape.layers, layout.sequences.protected
            if rule is not None:
                place, own = decisions_of(rule, hidden, layout, layers)
                assert (own.keep & ~batch.valid).sum() == 0
                same_place, stay = decisions_of(ForcedIn(rule, grid), hidden, layout, layers)
                assert same_place == place
                assert torch.equal(stay.keep, own.keep | (grid & batch.valid))
                assert torch.equal(stay.importance, own.importance)
            place, leave = decisions_of(ForcedOut(rule, grid), hidden, layout, layers)
            assert place == (0, "before")
            before = own.keep if rule is not None and rule.decides(0, "before") else batch.valid
            assert torch.equal(leave.keep, before & ~(grid & ~protected))
            assert leave.keep[:, 0].all()


def test_forced_tokens_are_read_to_the_end_or_never(model, split, named):
    for batch, _, encoded in forwards(model, split, "", wrap=forced_in(named, split)):
        grid = on_grid(named, split, batch)
        for layer in encoded.trace.layers:
            assert (grid & batch.valid & ~layer.outputs).sum() == 0
    for batch, _, encoded in forwards(model, split, "", wrap=forced_out(named, split)):
        grid = on_grid(named, split, batch)
        protected = model.sequences(batch).protected
        for layer in encoded.trace.layers:
            assert (grid & ~protected & layer.keys).sum() == 0
            assert layer.keys[:, 0].all() and layer.outputs[:, 0].all()


def test_naming_no_token_changes_nothing(model, split):
    nothing = np.zeros(len(split.input_ids), bool)
    own = observe(model, split).logits
    for force in (forced_in, forced_out):
        torch.testing.assert_close(logits_of(model, split, "", wrap=force(nothing, split)), own)


def test_a_text_without_its_named_tokens_is_a_text_that_never_had_them(random_classifier, split, named):
    """Without any further pruning, by masked attention over the rest alone."""
    from tokprune_exp.pruning.pruning import Prescribed

    model = random_classifier(outputs=2)
    ours = logits_of(model, split, "", wrap=forced_out(named, split))
    batch = split.collate(torch.arange(len(TEXTS)))
    keep = batch.valid & ~on_grid(named, split, batch)
    keep[:, 0] = True
    with torch.no_grad():
        hidden, layout = model.start(batch)
        theirs = model.head(model.encoder(hidden, layout, Prescribed(keep)).first)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (ours - logits_of(model, split, "", prune=False)).abs().max() > 1e-3


def test_the_control_names_as_many_others_of_each_text(split, named):
    others = ~named & (np.arange(len(named)) % 2 == 0)
    control = as_many_at_random(named, others, split)
    assert not (control & ~others).any()
    for number in range(len(TEXTS)):
        inside = slice(int(split.offsets[number]), int(split.offsets[number + 1]))
        assert control[inside].sum() == min(named[inside].sum(), others[inside].sum())
    assert not np.array_equal(control, as_many_at_random(named, others, split, seed=1))


def test_states_are_those_that_the_layers_hand_on(model, split):
    """By hand, from the masked model's inner life: what leaves the last layer but one, where the last one reads it."""
    in_text = np.isin(split.input_ids.numpy(), [2, 3], invert=True)
    for prune in (False, True):
        states = states_of(model, split, in_text, prune)
        for number in range(len(TEXTS)):
            with torch.no_grad():
                hidden, layout = model.start(split.collate([number]))
                rule = model.pruning.rule(model.encoder, hidden, layout) if prune and model.pruning else None
                encoded = model.encoder(hidden, layout, rule, wants_inner=True)
            inside = slice(int(split.offsets[number]), int(split.offsets[number + 1]))
            read = encoded.trace.layers[-1].keys[0] & torch.tensor(in_text[inside])
            assert states.read[number] == read.sum()
            into_last = encoded.layer_outputs[-2][0]
            mean = into_last[read].mean(0) if read.any() else into_last[0]
            torch.testing.assert_close(states.mean[number], mean, atol=1e-4, rtol=0)
            torch.testing.assert_close(states.first[number], encoded.first[0], atol=1e-4, rtol=0)


def test_states_are_written_and_their_silhouette_is_the_definition(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = np.array([0] * 5 + [1] * 4 + [2] * 3)
    centres = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])[labels]
    first = centres + torch.randn(12, 2, generator=generator)
    read = torch.tensor([1] * 11 + [0])
    states = {"pruned": States(first, first * 2, read)}
    rows = {row["states"]: row for row in silhouette_rows(states, labels, 500)}

    distance = torch.cdist(first.double(), first.double()).numpy()
    each = []
    for one in range(12):
        own = [distance[one, other] for other in range(12) if labels[other] == labels[one] and other != one]
        a = sum(own) / len(own)
        b = min(distance[one][labels == label].mean() for label in range(3) if label != labels[one])
        each.append((b - a) / max(a, b))
    assert rows["first"]["silhouette"] == pytest.approx(sum(each) / 12, abs=1e-5)
    assert rows["first"]["silhouette_low"] < rows["first"]["silhouette"] < rows["first"]["silhouette_high"]
    assert (rows["first"]["examples"], rows["mean"]["examples"]) == (12, 11)
    assert silhouette_rows(states, np.zeros(12, int), 10) == []

    save_states(tmp_path / "states.safetensors", states, list(range(12)), labels, torch.zeros(12))
    saved = load_file(tmp_path / "states.safetensors")
    assert set(saved) == {"example", "label", "predicted", "pruned_first", "pruned_mean", "pruned_read"}
    torch.testing.assert_close(saved["pruned_mean"], first * 2)
