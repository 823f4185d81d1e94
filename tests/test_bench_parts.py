"""What the bench is made of: operating points, batches, what is made of times, shares, and the accuracy of bf16."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from model_directories import MAX_TOKENS, save_random_model

from tokprune_exp.bench import shares
from tokprune_exp.bench.accuracy import accuracy
from tokprune_exp.bench.points import Point, flops_reduction, operating_points
from tokprune_exp.bench.race import best_of, padding_of, race, rows_of
from tokprune_exp.bench.texts import workloads
from tokprune_exp.bench.variants import Variant, our_variants
from tokprune_exp.data.tokenise import encode_texts
from tokprune_exp.encoder.layout import Packed
from tokprune_exp.errors import UserError
from tokprune_exp.measure.latency import Timing
from tokprune_exp.model import load_model
from tokprune_exp.pruning.retainers import Backtracking, KeepAll, StaticRatio
from tokprune_exp.pruning.scorers import AttentionMass, ExactAttention

WORDS = ["the", "film", "is", "very", "good", "and", "the", "plot", "is", "fine", "but", "long"]
TEXTS = [" ".join(WORDS[: 1 + 5 * row % 12]) for row in range(12)]


@pytest.fixture
def model(random_classifier, tiny_tokenizer, tmp_path):
    return load_model(save_random_model(tmp_path, random_classifier, tiny_tokenizer))[0]


@pytest.fixture
def split(tiny_tokenizer):
    labels = torch.tensor([0, 1] * 6)
    return encode_texts(tiny_tokenizer, TEXTS, MAX_TOKENS, labels)


# Operating points


def test_the_reduction_is_that_of_the_texts_timed(model, tiny_tokenizer):
    split = encode_texts(tiny_tokenizer, ["good film", "the plot is not very good but long"], MAX_TOKENS)
    dim, ff_dim = model.encoder.shape.dim, model.encoder.shape.ff_dim

    def layer(before, after):
        return 3 * dim**2 * before + 2 * dim * before**2 + (dim**2 + 2 * dim * ff_dim) * after

    # 4 and 10 tokens, of which [CLS] and ⌈0.4 · 3⌉ = 2, ⌈0.4 · 9⌉ = 4 others survive the second of four layers
    dense = 4 * (layer(4, 4) + layer(10, 10))
    pruned = sum(layer(n, n) + layer(n, k) + 2 * layer(k, k) for n, k in ((4, 3), (10, 5)))
    assert flops_reduction(model, [split.collate([0, 1])]) == pytest.approx(dense / pruned)


def test_the_knob_is_turned_to_a_reduction_and_the_model_stays_where_it_was(model, split):
    batches = [split.collate(range(12))]
    before = flops_reduction(model, batches)
    points, notes = operating_points(model, batches, [1.3, 50.0])
    assert [(point.name, point.asked) for point in points] == [("own", None), ("1.3x", 1.3)]
    assert flops_reduction(points[1].of(model), batches) == pytest.approx(1.3, abs=0.1)
    assert flops_reduction(points[0].of(model), batches) == flops_reduction(model, batches) == before
    (note,) = notes
    assert note.startswith("--reductions 50: out of reach on these texts (1.00× to ")


def test_what_cannot_be_turned_is_said(random_classifier, split):
    batches = [split.collate(range(12))]
    kept = random_classifier(AttentionMass, KeepAll)
    assert operating_points(kept, batches, [2.0]) == (
        [Point(None)],
        ["--reductions: KeepAll has no knob to turn, so only its own point is timed."],
    )
    assert operating_points(random_classifier(), batches, [2.0]) == (
        [],
        ["It prunes nothing, so it is timed dense only."],
    )


def test_variants_of_one_precision_share_their_weights(model):
    dense, pruned = our_variants({"fp32": model.for_inference()}, [Point(None), Point(0.2, 2.0)])
    assert [one.key for one in (*dense, *pruned)] == ["dense_fp32", "pruned_fp32_own", "pruned_fp32_2x"]
    own, moved = (one.model for one in pruned)
    assert own.encoder.layers[0] is moved.encoder.layers[0]
    assert (float(own.pruning.retainer.knob), float(moved.pruning.retainer.knob)) == (0.4, 0.2)


# Batches


def test_all_variants_read_the_same_texts(split):
    (load,) = workloads(split, [5, 50])
    assert (load.size, load.batches, load.texts) == (5, 2, 10)
    for batches in (load.packed, load.sorted, load.unsorted):
        assert sum(len(batch.index) for batch in batches) == 10
        rows = sorted(torch.cat([batch.index for batch in batches]).tolist())
        assert rows == sorted(torch.cat([batch.index for batch in load.sorted]).tolist())
    assert torch.cat([batch.index for batch in load.unsorted]).diff().min() > 0
    assert load.tokens == int(split.lengths.sort().values[:10].sum())


def test_a_batch_of_many_tokens_is_served_in_micro_batches(split, monkeypatch):
    monkeypatch.setattr("tokprune_exp.bench.texts.BATCH_TOKENS", 30)
    (load,) = workloads(split, [6])
    assert (len(load.sorted), load.batches) == (2, 2)
    assert len(load.packed) > 2
    assert all(int(batch.valid.sum()) <= 30 for batch in load.packed)
    assert sum(int(batch.valid.sum()) for batch in load.packed) == load.tokens


def test_the_share_of_real_tokens_is_that_of_the_grid(tiny_tokenizer):
    split = encode_texts(tiny_tokenizer, ["good", "a very long film", "bad", "the plot is good"], MAX_TOKENS)
    (load,) = workloads(split, [2])  # 3, 6, 3, 6 tokens
    assert (load.filled("sorted"), load.filled("unsorted")) == (1.0, 18 / 24)


def test_too_few_texts_are_refused(split):
    with pytest.raises(UserError, match="12 texts fill no batch of 16: raise --examples"):
        workloads(split, [32, 16])


# What is made of times


def variant(key, reference="dense_fp32", **others):
    values = {"side": "ours", "forward": len, "reads": "packed", "precision": "fp32", **others}
    return Variant(key, key, reference=reference, **values)


def a_load(split, size=4):
    return next(load for load in workloads(split, [size]))


def test_a_row_is_what_the_times_mean(model, split):
    load = a_load(split)
    timings = {"dense_fp32": Timing([6.0, 9.0, 6.0]), "pruned": Timing([3.0, 3.0, 6.0])}
    prepared = model.for_inference()
    dense, pruned = rows_of([variant("dense_fp32"), variant("pruned", point="own", model=prepared)], load, timings)
    assert (dense["ms"], dense["texts_per_s"], dense["speedup"]) == (2000.0, 2.0, 1.0)
    assert (dense["flops_reduction"], dense["attained"]) == (None, None)
    assert (pruned["speedup"], pruned["speedup_quartiles"]) == (2.0, [1.5, 2.5])
    assert pruned["tokens_per_s"] == load.tokens / 3.0
    assert pruned["attained"] == pytest.approx(2.0 / flops_reduction(model, load.packed))


def test_padding_is_compared_without_pruning(split):
    load = a_load(split)
    timings = {"dense_fp32": Timing([2.0, 2.0]), "transformers": Timing([4.0, 8.0])}
    padding = padding_of([variant("dense_fp32"), variant("transformers")], load, timings)
    assert padding["time_over_ours_dense"] == {"transformers": 3.0}
    assert padding["filled_sorted"] > padding["filled_unsorted"]


def test_everyone_is_taken_at_their_best_batch_size():
    def row(name, size, texts_per_s, point):
        kept = {"label": name, "side": "ours", "precision": "fp32", "tokens_per_s": 1.0}
        return {"variant": name, "batch_size": size, "texts_per_s": texts_per_s, "point": point, **kept}

    best = best_of([row("peer", 1, 5.0, None), row("pruned", 1, 9.0, "own"), row("peer", 8, 4.0, None)])
    assert [(one["variant"], one["batch_size"], one["ratios"]) for one in best] == [
        ("peer", 1, {"pruned": 9 / 5}),
        ("pruned", 1, {"pruned": 1.0}),
    ]


def test_each_variant_gets_the_batches_that_it_reads(split):
    load = a_load(split)
    seen = {name: [] for name in ("packed", "sorted", "unsorted")}
    steps = []
    variants = [variant(name, forward=seen[name].append, reads=name) for name in seen]
    timings = race(variants, load, rounds=2, after_each=lambda: steps.append(1))
    for name, batches in seen.items():
        assert [id(batch) for batch in batches] == 3 * [id(batch) for batch in getattr(load, name)]
        assert len(timings[name].seconds) == 2
    assert len(steps) == 9


# Shares of time


@pytest.fixture
def prepared(model):
    return model.for_inference()


def test_scores_asked_for_change_no_answer(prepared, split):
    batch = split.collate(range(12))
    with torch.inference_mode():
        dense = prepared(batch, "gathered", prune=False).logits
        torch.testing.assert_close(shares.run_scored(prepared, batch), dense, rtol=0, atol=1e-5)


def test_a_watched_pass_puts_out_the_same_and_leaves_no_trace(prepared, split):
    batch = split.collate(range(12))
    keep, to_grid = Packed.keep, Packed.to_grid
    watched = shares.WatchedPass(prepared, [batch])
    with torch.inference_mode():
        watched()
        ours, theirs = prepared(batch, "gathered").logits, watched.model(batch, "gathered").logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert (Packed.keep, Packed.to_grid) == (keep, to_grid)
    assert "forward" not in vars(prepared.pruning.scorer)
    (lap,) = watched.laps
    assert lap["selection"] > 0 and lap["gathering"] > 0


def test_scoring_is_attention_with_scores_less_attention_without(prepared, split, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(shares.time, "perf_counter", lambda: clock[0])

    def slow(attention):
        def attend(*given):
            clock[0] += 3.0 if given[-1] else 1.0
            return attention(*given)

        return attend

    watched = shares.WatchedPass(shares.with_attention(prepared, slow), [split.collate([0, 1]), split.collate([2])])
    watched()
    # of four layers one asks for scores, in each of the two batches
    assert watched.laps == [{"scoring": 4.0, "selection": 0.0, "gathering": 0.0}]


def test_shares_are_measured_for_each_attention_and_size(prepared, split):
    loads = workloads(split, [2, 12])
    rows = shares.shares(prepared, loads, rounds=2)
    # heads of 16 numbers have no compiled attention
    assert [(row["batch_size"], row["attention"]) for row in rows] == [(2, "loop"), (12, "loop")]
    for row in rows:
        assert all(0 < row[part] < 1 for part in ("selection", "gathering"))
        low, high = row["scores_of_layer_quartiles"]
        assert low <= row["scores_of_layer"] <= high


def test_a_plan_is_scored_before_the_first_layer(random_classifier, split):
    model = random_classifier(ExactAttention, partial(Backtracking, k=0.4)).for_inference()
    rows = shares.shares(model, [a_load(split, 12)], rounds=1)
    assert rows[0]["scoring"] > 0.1  # a whole pass of the unpruned model


def test_a_dense_model_has_the_cost_of_scores_only(random_classifier, split):
    (row,) = shares.shares(random_classifier().for_inference(), [a_load(split)], rounds=1)
    assert "scores_of_layer" in row and "scoring" not in row


def test_both_attentions_are_measured_where_there_are_two(random_classifier, split):
    model = random_classifier(AttentionMass, partial(StaticRatio, layer=1), heads=2).for_inference()
    ways = shares.attentions_of(model)
    if len(ways) == 1:
        pytest.skip("no compiler")
    assert list(ways) == ["compiled", "loop"]
    batch = split.collate(range(12))
    with torch.inference_mode():
        compiled, loop = (way(batch, "gathered").logits for way in ways.values())
    torch.testing.assert_close(compiled, loop, rtol=0, atol=1e-4)


# Accuracy


def test_accuracy_says_how_many_answers_change(model, split):
    other = deepcopy(model)
    with torch.no_grad():
        other.head.classifier.bias += torch.tensor([100.0, 0.0])  # always the first class
    dense, pruned = accuracy(model, other, split, ["accuracy"], is_regression=False)
    batch = split.collate(range(12))
    for row, prune in ((dense, False), (pruned, True)):
        with torch.no_grad():
            answers = model(batch, prune=prune).logits
        is_first = (answers.argmax(1) == 0).float()
        assert row["equal_labels"] == pytest.approx(float(is_first.mean()))
        assert row["fp32"]["accuracy"] == pytest.approx(float((answers.argmax(1) == split.labels).float().mean()))
        assert row["bf16"]["accuracy"] == pytest.approx(0.5)
        assert row["largest_difference"] == pytest.approx(float(answers.softmax(1)[:, 1].max()), abs=1e-5)


def test_a_score_has_no_label_to_be_equal(random_classifier, split):
    model = random_classifier(outputs=1)
    split.labels = split.labels.float()
    (row,) = accuracy(model, model, split, ["pearson"], is_regression=True)
    assert (row["equal_labels"], row["largest_difference"]) == (None, 0.0)
