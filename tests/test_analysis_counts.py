"""Group-bys on the long table against plain loops: retention, random pruning, frequencies, lengths, reports, claims."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import classification_report

from tokprune_exp.analysis.claims import Claim, from_accuracy, kept_more, nouns_dominate, terms_against_others
from tokprune_exp.analysis.frequency import frequency_rows
from tokprune_exp.analysis.lengths import length_rows
from tokprune_exp.analysis.resampling import Bootstrap, interval, ratio
from tokprune_exp.analysis.retention import composition_rows, count_units, retention_rows, special_rows
from tokprune_exp.analysis.scores import difference_of_means, report_rows, right_answers, score_rows
from tokprune_exp.analysis.units import LAST_READ, MEAN, Pieces, classes_of, shuffled_depth, words_of
from tokprune_exp.measure.metrics import evaluate_metrics

LAYERS = 3
STAGES = ["1", "2", LAST_READ, "3"]
EXAMPLES = 12
POS = ["NOUN", "VERB", "DET", ""]
LEXICON = ["film", "plot", "runs", "the", "dull"]


def made_up_rows():
    """Words of one to three pieces with random fates; every example begins and ends with a special token."""
    random = np.random.default_rng(3)
    rows = []
    for example in range(EXAMPLES):
        fates = ["special", *(word for word in range(5 + example % 4) for _ in range(random.integers(1, 4))), "special"]
        for piece, word in enumerate(fates):
            depth = int(random.integers(0, LAYERS + 2))
            name = "" if word == "special" else LEXICON[(word + example) % 5]
            rows.append(
                {
                    "example": 100 + example,
                    "text": 0,
                    "piece": piece,
                    "word": -1 if word == "special" else word,
                    "word_text": name.title(),
                    "survived": max(0, depth - 1) if depth >= LAYERS else depth,
                    "kept_last_read": depth >= LAYERS,
                    "n_layers": LAYERS,
                    "pos": {"film": "NOUN", "plot": "NOUN", "runs": "VERB", "the": "DET"}.get(name, ""),
                    "tag": "",
                    "stop": name == "the",
                    "entity": "ORG" if name == "plot" and example % 2 else "",
                    "number": False,
                    "punctuation": name == "dull" and example == 3,
                    "domain_term": name in ("film", "runs"),
                    "special": word == "special",
                }
            )
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def rows():
    return made_up_rows()


@pytest.fixture(scope="module")
def pieces(rows):
    """The same as `read_pieces` makes of the table; that it does is tested with the command."""
    frame = rows.copy()
    frame["depth"] = frame["survived"] + ((frame["survived"] >= LAYERS - 1) & frame["kept_last_read"])
    frame["example"] -= 100
    special = frame["special"].to_numpy()
    return Pieces(frame[~special], frame[special], STAGES, EXAMPLES)


@pytest.fixture(scope="module")
def counts(pieces):
    return count_units(pieces, words_of(pieces), draws=400)


@pytest.fixture(scope="module")
def groups():
    odd = np.arange(EXAMPLES) % 2 == 1
    return {"all": np.ones(EXAMPLES, bool), "class odd": odd}


def kept_at(row, stage):
    return bool(row["kept_last_read"]) if stage == LAST_READ else row["survived"] >= int(stage)


def plain_words(rows):
    """Each word once, with its pieces; no special tokens."""
    words = {}
    for _, row in rows.iterrows():
        if not row["special"]:
            words.setdefault((row["example"], row["word"]), []).append(row)
    return words


MEMBERS = {
    ("all", "all"): lambda row: True,
    ("flag", "stop word"): lambda row: row["stop"],
    ("flag", "content word"): lambda row: not row["stop"] and not row["punctuation"],
    ("flag", "named entity"): lambda row: row["entity"] != "",
    ("flag", "domain term"): lambda row: row["domain_term"],
    ("flag", "other noun"): lambda row: row["pos"] == "NOUN" and not row["domain_term"],
    ("flag", "other content word"): lambda row: not (row["stop"] or row["punctuation"] or row["domain_term"]),
    ("pos", "NOUN"): lambda row: row["pos"] == "NOUN",
    ("pos", "DET"): lambda row: row["pos"] == "DET",
    ("pos without stop words", "VERB"): lambda row: row["pos"] == "VERB" and not row["stop"],
    ("entity", "ORG"): lambda row: row["entity"] == "ORG",
}


@pytest.mark.parametrize("unit", ["word", "piece"])
@pytest.mark.parametrize("name", MEMBERS)
def test_retention_counts_what_a_loop_over_words_or_pieces_counts(unit, name, rows, counts, groups):
    table = {
        (row["group"], row["kind"], row["class"], row["layer"]): row
        for row in retention_rows(counts[unit], groups, replicates=10)
    }
    for group, belongs in (("all", lambda example: True), ("class odd", lambda example: example % 2 == 1)):
        words = plain_words(rows)
        units = list(words.values()) if unit == "word" else [[row] for some in words.values() for row in some]
        units = [some for some in units if belongs(some[0]["example"])]
        mine = [some for some in units if MEMBERS[name](some[0])]
        shares = []
        for stage in STAGES:
            row = table[group, *name, stage]
            kept = sum(any(kept_at(piece, stage) for piece in some) for some in mine)
            overall = sum(any(kept_at(piece, stage) for piece in some) for some in units) / len(units)
            assert (row["total"], row["kept"], row["dropped"]) == (len(mine), kept, len(mine) - kept)
            assert row["kept"] + row["dropped"] == row["total"]
            assert row["retention"] == pytest.approx(kept / len(mine))
            assert row["lift"] == pytest.approx(kept / len(mine) / overall)
            if stage != LAST_READ:
                shares.append(kept / len(mine))
        assert table[group, *name, MEAN]["retention"] == pytest.approx(sum(shares) / LAYERS)


def test_random_pruning_keeps_as_many_pieces_of_each_text_in_each_layer_and_they_stay_away(pieces):
    example, depth = pieces.frame["example"].to_numpy(), pieces.depth
    shuffled = shuffled_depth(pieces, np.random.default_rng(1))
    assert (shuffled != depth).any()
    for number in range(EXAMPLES):
        # one number per piece says of all stages whether it is kept, so no piece comes back
        assert sorted(shuffled[example == number]) == sorted(depth[example == number])


def test_over_random_is_one_for_any_class_of_pieces_on_average(rows, counts, groups):
    """Of pieces, the expectation of random pruning is known: in each text the class gets its share of what is kept."""
    table = retention_rows(counts["piece"], {"all": groups["all"]}, replicates=10)
    of_text = rows[~rows["special"]]
    for row in table:
        if row["kind"] != "pos" or row["layer"] == MEAN:
            continue
        expected = 0.0
        for _, text in of_text.groupby("example"):
            kept = sum(kept_at(piece, row["layer"]) for _, piece in text.iterrows())
            expected += kept * (text["pos"] == row["class"]).mean()
        assert row["random_retention"] * row["total"] == pytest.approx(expected, rel=0.1)
        assert row["over_random"] == pytest.approx(row["kept"] / row["random_retention"] / row["total"])


def test_special_tokens_are_counted_apart(rows, pieces):
    table = {row["layer"]: row for row in special_rows(pieces.special, STAGES)}
    special = rows[rows["special"]]
    for stage in STAGES:
        kept = sum(kept_at(piece, stage) for _, piece in special.iterrows())
        assert (table[stage]["total"], table[stage]["kept"]) == (2 * EXAMPLES, kept)


def test_the_composition_is_of_the_text_and_of_what_was_kept(rows, counts, groups):
    table = composition_rows(counts["word"], groups, LAST_READ, replicates=50)
    words = list(plain_words(rows).values())
    for row in table:
        mine = [some for some in words if row["group"] == "all" or some[0]["example"] % 2 == 1]
        mine = [some for some in mine if some[0]["pos"] and not (row["stop_words"] == "without" and some[0]["stop"])]
        kept = [some for some in mine if any(kept_at(piece, LAST_READ) for piece in some)]
        for part, share in ((mine, "share_of_text"), (kept, "share_of_kept")):
            expected = sum(some[0]["pos"] == row["pos"] for some in part) / len(part)
            assert row[share] == pytest.approx(expected)
            assert row[f"{share}_low"] <= expected <= row[f"{share}_high"]
    assert {row["pos"] for row in table if row["stop_words"] == "without"} >= {"NOUN", "VERB"}


def test_frequent_words_are_counted_with_stop_words_and_without(rows, pieces, groups):
    table = frequency_rows(words_of(pieces).frame, STAGES.index(LAST_READ) + 1, groups, most=4)
    for group in groups:
        for stop_words in ("with", "without"):
            expected, totals, examples = {}, {}, {}
            for some in plain_words(rows).values():
                first = some[0]
                if (group != "all" and first["example"] % 2 == 0) or first["punctuation"]:
                    continue
                if stop_words == "without" and first["stop"]:
                    continue
                word = first["word_text"].lower()
                totals[word] = totals.get(word, 0) + 1
                if any(piece["kept_last_read"] for piece in some):
                    expected[word] = expected.get(word, 0) + 1
                    examples.setdefault(word, set()).add(first["example"])
            ranked = sorted(expected, key=lambda word: (-expected[word], word))[:4]
            ours = [row for row in table if (row["group"], row["stop_words"]) == (group, stop_words)]
            assert [row["word"] for row in ours] == ranked
            assert [row["rank"] for row in ours] == list(range(1, len(ranked) + 1))
            for row in ours:
                assert (row["kept"], row["total"]) == (expected[row["word"]], totals[row["word"]])
                assert row["examples"] == len(examples[row["word"]])
    assert any(row["word"] == "the" for row in table if row["stop_words"] == "with")


def test_lengths_are_means_over_the_examples_of_a_group(groups):
    random = np.random.default_rng(0)
    lengths = random.integers(5, 20, EXAMPLES)
    kept = np.stack([lengths - 1, lengths // 2], axis=1)
    table = {(row["group"], row["layer"]): row for row in length_rows(kept, lengths, groups, replicates=200)}
    for group, inside in groups.items():
        assert table[group, 0]["tokens"] == pytest.approx(lengths[inside].mean())
        assert table[group, 0]["share"] == table[group, 0]["share_low"] == 1
        row = table[group, 2]
        assert row["tokens"] == pytest.approx((lengths[inside] // 2).mean())
        assert row["median"] == np.median(lengths[inside] // 2)
        assert row["share"] == pytest.approx((lengths[inside] // 2).sum() / lengths[inside].sum())
        assert row["tokens_low"] < row["tokens"] < row["tokens_high"] and row["examples"] == inside.sum()


# Resampling


def test_resamples_are_sums_over_drawn_examples():
    counts = np.arange(24.0).reshape(6, 2, 2)
    sums = Bootstrap(6, 5, seed=4).sums(counts)
    random = np.random.default_rng(4)
    for number in range(5):
        drawn = random.integers(6, size=6)
        np.testing.assert_allclose(sums[number], sum(counts[one] for one in drawn))


def test_the_interval_of_a_mean_is_the_one_that_statistics_knows():
    values = np.random.default_rng(0).normal(2.0, 3.0, 400)
    low, high = interval(Bootstrap(400, 4000).sums(values) / 400)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_what_is_nowhere_has_no_interval_and_no_ratio():
    low, high = interval(np.array([[np.nan, 1.0, np.nan], [np.nan, 3.0, 2.0]]))
    np.testing.assert_allclose(low, [np.nan, 1.05, 2.0])
    np.testing.assert_allclose(high, [np.nan, 2.95, 2.0])
    np.testing.assert_allclose(ratio(np.array([1.0, 2.0]), np.array([0.0, 4.0])), [np.nan, 0.5])


# Metrics before and after pruning


@pytest.mark.parametrize("kind", ["random", "collapsed", "a class that is nowhere"])
def test_the_report_is_that_of_scikit_learn(kind):
    random = np.random.default_rng(5)
    labels = random.integers(2 if kind == "a class that is nowhere" else 3, size=60)
    predicted = np.ones(60, int) if kind == "collapsed" else np.where(random.random(60) < 0.6, labels, 1)
    names = ["World", "Sports", "Sci/Tech"]
    seen = sorted(set(labels) | set(predicted))
    theirs = classification_report(
        labels, predicted, labels=seen, target_names=[names[one] for one in seen], output_dict=True, zero_division=0
    )
    ours = {row["class"]: row for row in report_rows(predicted, labels, names)}
    # where every label is among the predicted ones, scikit-learn names the accuracy by that word
    assert ours["accuracy"]["accuracy"] == pytest.approx((predicted == labels).mean())
    for name, key in [(names[one], names[one]) for one in seen] + [
        ("macro mean", "macro avg"),
        ("weighted mean", "weighted avg"),
    ]:
        for column, metric in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
            assert ours[name][column] == pytest.approx(theirs[key][metric]), (name, column)
        assert ours[name]["support"] == theirs[key]["support"]
    assert set(ours) == {*names, "accuracy", "macro mean", "weighted mean"}


def test_a_regression_has_its_correlations_and_no_report():
    logits, labels = torch.tensor([[0.1], [0.5], [0.3]]), np.array([1.0, 2.0, 4.0], np.float32)
    table = score_rows({"unpruned": logits, "pruned": logits * 2}, labels, [], ["pearson", "spearman"])
    assert [(row["model"], row["class"]) for row in table] == [
        (model, name) for model in ("unpruned", "pruned") for name in ("pearson", "spearman")
    ]
    expected = evaluate_metrics(["pearson", "spearman"], logits, torch.tensor(labels))
    assert [row["accuracy"] for row in table[:2]] == pytest.approx(list(expected.values()))


def test_a_difference_of_accuracies_is_paired():
    labels = np.zeros(100, int)
    ours = right_answers(torch.tensor([[1.0, 0.0]] * 90 + [[0.0, 1.0]] * 10), labels)
    theirs = right_answers(torch.tensor([[1.0, 0.0]] * 80 + [[0.0, 1.0]] * 20), labels)
    value, low, high = difference_of_means(ours, theirs, 2000)
    assert value == pytest.approx(0.1)
    # the 80 examples on which both are right add nothing to the width: sd = √(0.1·0.9/100)
    assert (low, high) == pytest.approx((0.1 - 1.96 * 0.03, 0.1 + 1.96 * 0.03), abs=0.012)


# Claims


@pytest.mark.parametrize(("low", "high", "side"), [(1.1, 2.0, "above"), (0.1, 0.9, "below"), (0.9, 1.1, "undecided")])
def test_a_claim_is_decided_by_its_interval(low, high, side):
    record = Claim("it is", "a number", "all", 1.0, low, high, 1.0).record()
    assert record["is"] == side and record["value"] == 1.0


def test_nouns_lead_by_the_share_of_what_was_kept(rows, counts, groups):
    claims = nouns_dominate(counts["word"], {"all": groups["all"]}, replicates=200)
    read = [claim for claim in claims if claim.stage == LAST_READ]
    kept = [some[0] for some in plain_words(rows).values() if any(piece["kept_last_read"] for piece in some)]
    for claim, without in zip(read, (False, True), strict=True):
        shown = [word["pos"] for word in kept if word["pos"] and not (without and word["stop"])]
        shares = {pos: shown.count(pos) / len(shown) for pos in set(shown)}
        noun = shares.pop("NOUN")
        assert claim.value == pytest.approx(noun - max(shares.values()))
        assert claim.low <= claim.value <= claim.high


def test_domain_terms_stand_against_other_nouns_and_other_content_words(rows, counts):
    claims = [claim for claim in terms_against_others(counts["word"], 200) if claim.stage == LAST_READ]
    words = list(plain_words(rows).values())

    def retention(name):
        mine = [some for some in words if MEMBERS["flag", name](some[0])]
        return sum(any(piece["kept_last_read"] for piece in some) for some in mine) / len(mine)

    for claim, other in zip(claims, ("other noun", "other content word"), strict=True):
        assert other in claim.quantity
        assert claim.value == pytest.approx(retention("domain term") - retention(other))


def test_classes_that_are_kept_more_are_read_from_the_retention_table(counts, groups):
    table = retention_rows(counts["word"], groups, replicates=50)
    claims = kept_more(table)
    row = next(
        row for row in table if (row["group"], row["kind"], row["class"], row["layer"]) == ("all", "pos", "NOUN", MEAN)
    )
    noun = [claim for claim in claims if (claim.claim, claim.stage) == ("nouns are kept more", MEAN)]
    assert [claim.value for claim in noun] == [row["lift"], row["over_random"]]
    assert not any(claim.claim == "proper nouns are kept more" for claim in claims)  # there are none
    assert from_accuracy([{"variant": "as it is", "difference": None}]) == []


def test_a_class_without_a_word_is_left_out(rows):
    found = classes_of(rows[~rows["special"]])
    assert ("flag", "number") not in found and ("flag", "markup") not in found
    assert ("pos", "") not in found
