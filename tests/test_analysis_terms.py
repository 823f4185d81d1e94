"""Domain terms: log-odds with a prior against a loop that follows the formula word by word."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokprune_exp.analysis.terms import domain_terms, log_odds


def plain(counts, label, word, prior_words):
    """δ and z of one word, after Monroe et al., with counts as a list of Counters."""
    everywhere = Counter()
    for counter in counts:
        everywhere.update(counter)
    alpha = prior_words * everywhere[word] / sum(everywhere.values())
    y, n = counts[label][word], sum(counts[label].values())
    others = [counter for number, counter in enumerate(counts) if number != label]
    y_other, n_other = sum(one[word] for one in others), sum(sum(one.values()) for one in others)
    omega = (y + alpha) / (n + prior_words - y - alpha)
    omega_other = (y_other + alpha) / (n_other + prior_words - y_other - alpha)
    delta = math.log(omega) - math.log(omega_other)
    variance = 1 / (y + alpha) + 1 / (y_other + alpha)
    return delta, delta / math.sqrt(variance)


TEXTS = [
    (0, "the match was won by the team in the last match"),
    (0, "the team lost a match"),
    (1, "the bank raised the price of oil"),
    (1, "oil oil and the bank of the team"),
    (2, "a phone and a chip and a phone"),
]


def counters():
    found = [Counter() for _ in range(3)]
    for label, text in TEXTS:
        found[label].update(text.split())
    return found


@pytest.mark.parametrize("prior_words", [0.5, 10.0, 500.0])
def test_log_odds_equal_the_formula_word_by_word(prior_words):
    counts = counters()
    words = sorted(set().union(*counts))
    delta, z = log_odds(np.array([[one[word] for word in words] for one in counts]), prior_words)
    for label in range(3):
        for place, word in enumerate(words):
            assert (delta[label, place], z[label, place]) == pytest.approx(plain(counts, label, word, prior_words))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).filter(any), min_size=2, max_size=6))
@settings(max_examples=50, deadline=None)
def test_with_two_classes_one_is_the_others_mirror(counts):
    matrix = np.array(counts).T
    if (matrix.sum(1) == 0).any():
        return
    delta, z = log_odds(matrix)
    np.testing.assert_allclose(delta[0], -delta[1])
    np.testing.assert_allclose(z[0], -z[1])


def test_the_terms_are_the_words_with_the_largest_z_of_the_class_they_speak_for():
    texts = [text.split() * 20 for _, text in TEXTS]
    labels = [label for label, _ in TEXTS]
    terms = domain_terms(texts, labels, 3, 6, lambda word: word not in ("the", "a", "and", "of", "in", "by", "was"))
    counts = [Counter({word: 20 * number for word, number in one.items()}) for one in counters()]
    strengths = {
        word: max(abs(plain(counts, label, word, 500.0)[1]) for label in range(3)) for word in set().union(*counts)
    }
    assert [term.word for term in terms[:4]] == sorted(("match", "phone", "oil", "bank"), key=strengths.get)[::-1]
    assert [abs(term.z) for term in terms] == sorted((abs(term.z) for term in terms), reverse=True)
    for term in terms:
        expected = plain(counts, term.label, term.word, 500.0)
        assert (term.log_odds, term.z) == pytest.approx(expected)
        assert term.z == pytest.approx(max(plain(counts, label, term.word, 500.0)[1] for label in range(3)))
        assert term.in_class == counts[term.label][term.word]
        assert term.elsewhere == sum(one[term.word] for one in counts) - term.in_class


def test_no_word_is_a_term_by_chance():
    random = np.random.default_rng(0)
    words = [f"word{number}" for number in range(20)]
    texts = [[words[number] for number in random.integers(20, size=50)] for _ in range(40)]
    few = domain_terms(texts, [number % 2 for number in range(40)], 2, 20, lambda word: True)
    assert all(abs(term.z) >= 1.96 for term in few)
    assert len(few) <= 3
    assert domain_terms([], [], 2, 5, lambda word: True) == []
