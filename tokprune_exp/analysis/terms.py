"""Terms of a domain: words that are more frequent in one class than chance and rarity explain, by the training split.

Log-odds ratio with an informative Dirichlet prior (Monroe, Colaresi and Quinn 2008, eqs. 15, 16, 20 to 22):

    δ_w = ln (y_w + α_w)/(n + α₀ − y_w − α_w) − ln (y'_w + α_w)/(n' + α₀ − y'_w − α_w)
    z_w = δ_w / √(1/(y_w + α_w) + 1/(y'_w + α_w))

y_w is how often word w stands in the class, n all words of the class; y', n' those of the other classes together. The
prior α_w = α₀·(share of w in the whole split) draws rare words towards no difference.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Num

PRIOR_WORDS = 500.0
"""α₀: the prior weighs as much as this many words."""
SURELY = 1.96
"""Terms are sought among the words with |z| of at least this."""


@dataclass(frozen=True)
class Term:
    """A word of the training split: the class that it speaks for most, δ and z there, and how often it stood where."""

    word: str
    label: int
    log_odds: float
    z: float
    in_class: int
    elsewhere: int


def log_odds(
    counts: Num[np.ndarray, "classes words"], prior_words: float = PRIOR_WORDS
) -> tuple[Float[np.ndarray, "classes words"], Float[np.ndarray, "classes words"]]:
    """Compute δ and z of every word in every class against the other classes; every word must occur somewhere."""
    inside = counts.astype(float)
    outside = inside.sum(0) - inside
    alpha = prior_words * inside.sum(0) / inside.sum()

    def odds(some: np.ndarray) -> np.ndarray:
        total = some.sum(1, keepdims=True) + prior_words
        return np.log(some + alpha) - np.log(total - some - alpha)

    delta = odds(inside) - odds(outside)
    return delta, delta / np.sqrt(1 / (inside + alpha) + 1 / (outside + alpha))


def domain_terms(
    texts: Iterable[Sequence[str]],
    labels: Sequence[int],
    classes: int,
    number: int,
    is_term: Callable[[str], bool],
    prior_words: float = PRIOR_WORDS,
) -> list[Term]:
    """Choose the `number` words with the largest |z| in any class, largest first, among those that `is_term` admits.

    `texts` holds the words of each training text, in lower case. All words count towards n and the prior. Ties go by
    the alphabet. A word's class is the one where its z is largest.
    """
    of_class = [Counter[str]() for _ in range(classes)]
    for words, label in zip(texts, labels, strict=True):
        of_class[label].update(words)
    vocabulary = sorted(set().union(*of_class))
    if not vocabulary:
        return []
    counts = np.array([[counter[word] for word in vocabulary] for counter in of_class])
    delta, z = log_odds(counts, prior_words)
    strength, speaks_for = np.abs(z).max(0), z.argmax(0)
    terms: list[Term] = []
    for place in np.argsort(-strength, kind="stable"):
        if len(terms) == number or strength[place] < SURELY:
            break
        if is_term(vocabulary[place]):
            label = int(speaks_for[place])
            in_class = int(counts[label, place])
            elsewhere = int(counts[:, place].sum()) - in_class
            numbers = float(delta[label, place]), float(z[label, place])
            terms.append(Term(vocabulary[place], label, *numbers, in_class, elsewhere))
    return terms
